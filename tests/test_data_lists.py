from pathlib import Path

import numpy as np
import pytest
import torch

from avadclip_fast import data
from avadclip_fast.data import (
    DataError,
    FeatureSet,
    LabelError,
    Row,
    epoch_order,
    read_list,
    split,
    write_list,
)
from avadclip_fast.engine.evaluate import score_rows

CODES = data.XD_VIOLENCE


def write(folder, text, name="list.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "path,audio_path,label\na.npy,sub/b.npy,A\nc.npy,d.npy,B1-0-0\n",
        "\ufeffpath,audio_path,label\r\na.npy,sub/b.npy,A\r\nc.npy,d.npy,B1-0-0\r\n",
        "label, path ,audio_path,note\nA, a.npy ,sub/b.npy,x\n B1-0-0,c.npy,d.npy,\n",
        '"path","audio_path","label"\n"a.npy","sub/b.npy","A"\nc.npy,d.npy,B1-0-0',
    ],
    ids=["plain", "mark and CRLF", "other order", "quoted"],
)
def test_read(tmp_path, text):
    path = write(tmp_path, text)
    assert read_list(path) == [
        Row(tmp_path / "a.npy", tmp_path / "sub/b.npy", "A", 2),
        Row(tmp_path / "c.npy", tmp_path / "d.npy", "B1-0-0", 3),
    ]


def test_paths_start_from_the_root_and_stay_there(tmp_path):
    path = write(tmp_path, "path,audio_path,label\na.npy,/data/sound/b.npy,A\n")
    (row,) = read_list(path, root="/data")
    assert (str(row.visual), str(row.audio)) == ("/data/a.npy", "/data/sound/b.npy")
    for root, outside in ((None, "/data/sound/b.npy"), ("/data/sound/..x", "/data/sound/b.npy")):
        with pytest.raises(DataError, match=f"line 2: {outside} leads out of .*; name a --root that holds it"):
            read_list(path, root)
    write(tmp_path, "path,audio_path,label\n../a.npy,b.npy,A\n")
    with pytest.raises(DataError, match=r"line 2: \.\./a.npy leads out of"):
        read_list(path)
    (tmp_path / "set").mkdir()
    path = write(tmp_path / "set", "path,audio_path,label\n../set2/a.npy,b.npy,A\n")
    with pytest.raises(DataError, match=r"line 2: \.\./set2/a.npy leads out of"):
        read_list(path)


@pytest.mark.parametrize("again", ["a.npy", "./a.npy", "s/../a.npy", "{}/a.npy"])
def test_a_video_is_listed_once(tmp_path, again):
    path = write(tmp_path, f"path,label\na.npy,A\ns/a.npy,A\n{again.format(tmp_path)},A\n")
    with pytest.raises(DataError, match="line 4: .*a.npy is on line 2 already; remove one"):
        read_list(path, audio=False)


def test_blank_lines_keep_the_numbering(tmp_path):
    path = write(tmp_path, "path,audio_path,label\n\na.npy,b.npy,A\n\nc.npy,d.npy,A\n")
    assert [row.line for row in read_list(path)] == [3, 5]


def test_sound_is_optional_where_it_is_not_wanted(tmp_path):
    without = write(tmp_path, "path,label\na.npy,A\n", "without.csv")
    some = write(tmp_path, "path,audio_path,label\na.npy,,A\nc.npy,d.npy,A\n", "some.csv")
    assert read_list(without, audio=False)[0].audio is None
    assert [row.audio for row in read_list(some, audio=False)] == [None, tmp_path / "d.npy"]
    with pytest.raises(DataError, match="audio_path"):
        read_list(without)
    with pytest.raises(DataError, match="line 2: audio_path empty"):
        read_list(some)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["no such list"]),
        (b"\xff\xfe\x00binary\x80", ["UTF-8"]),
        ("", ["the file is empty"]),
        ("path,audio_path,label\n", ["empty"]),
        ("file,sound,label\na,b,A\n", ["no column path, audio_path", "found file,sound,label"]),
        ("a.npy,b.npy,A\n", ["no column", "found a.npy"]),
        ("path;audio_path;label\na;b;A\n", ["found path;audio_path;label; columns", "by commas, not by semicolons"]),
        ("path\taudio_path\tlabel\na\tb\tA\n", ["columns are separated by commas, not by tabs"]),
        ("path,audio_path,label\na.npy,b.npy\n", ["line 2", "label empty"]),
        ("path,audio_path,label\na.npy,b.npy,A\n ,b.npy,A\n", ["line 3", "path empty"]),
        ("path,audio_path,label\na.npy,b.npy,A,,\nc.npy,d.npy,B1,B2\n", ["line 3: B2 is beyond the 3 columns", "by -"]),
        ("path,audio_path,label\na.npy,b.npy,A\nc.npy,b.npy,A\na.npy,d.npy,A\n", ["line 4", "line 2", "a.npy"]),
        ('path,audio_path,label\n"a.npy"x,b.npy,A\n', ["line 2: not a CSV"]),
        ("path,label\na.npy,A\n", ["no column audio_path", "found path,label; without sound, train --student"]),
        ("path,audio_path,label\na.npy,b.npy,A\nc\0.npy,d.npy,A\n", ["line 3", "NUL"]),
        ("path,audio_path,label\na.npy,b\0.npy,A\n", ["line 2", "NUL"]),
        ("path,audio_path,label\n.,b.npy,A\n", ["line 2: . is a folder"]),
        ("path,audio_path,label\ns/..npy,b.npy,A\n", ["line 2: s/..npy has no name before its suffix; rename"]),
        ("path,audio_path,label\n...npy,b.npy,A\n", ["line 2: ...npy has no name"]),
        (f"path,audio_path,label\na/{'b' * 256}/c.npy,d.npy,A\n", ["line 2: a name of 256 characters", "of paths?"]),
    ],
)
def test_read_refuses(tmp_path, text, words):
    path = tmp_path / "list.csv" if text is None else write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_list(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_a_file_that_is_no_list_is_not_printed(tmp_path):
    """As of the values of a video, of which a line holds thousands."""
    path = write(tmp_path, "path,label\na.npy," + "0.5-" * 10_000 + "\nb.npy,A" + ",0.5" * 10_000)
    for problem in data.check_list(path, CODES, audio=False):
        assert problem.startswith(f"{path}, line ") and len(problem) < 2000
    path.write_text(",".join(["0.5"] * 10_000))
    with pytest.raises(DataError, match="list.csv: no column path, label: ") as told:
        read_list(path, audio=False)
    assert len(str(told.value)) < 2000


def rows_of(names):
    return [Row(data.lists.Path(name), None, "A", i + 2) for i, name in enumerate(names)]


def test_crops_of_a_video_are_one_video():
    names = ["f/x__0.npy", "f/y__0.npy", "f/x__1.npy", "g/x__0.npy", "f/x.npy", "f/x__v.npy", "f/x__12.npy"]
    groups = [[str(row.visual) for row in group] for group in data.videos(rows_of(names))]
    # a file without a crop number is a video of its own unless the number is all that sets it apart
    assert groups == [
        ["f/x__0.npy", "f/x__1.npy", "f/x.npy"],
        ["f/y__0.npy"],
        ["g/x__0.npy"],
        ["f/x__v.npy"],
        ["f/x__12.npy"],
    ]


def crops(videos, anomalous):
    rows = []
    for i in range(videos):
        label = "B1-0-0" if i < anomalous else "A"
        rows += [Row(data.lists.Path(f"v{i}__{c}.npy"), None, label, 2 + len(rows)) for c in range(10)]
    return rows


def test_split_never_parts_the_crops_of_a_video():
    rows = crops(40, 10)
    train, held = split(rows, 0.2, 3, CODES)
    assert sorted(train + held, key=rows.index) == rows and not set(train) & set(held)
    assert train == sorted(train, key=rows.index) and held == sorted(held, key=rows.index)
    names = [{str(row.visual).split("__")[0] for row in part} for part in (train, held)]
    assert not names[0] & names[1]
    assert len(held) == 80 and sum(row.label != "A" for row in held) == 20


@pytest.mark.parametrize("normal", ["N", "N-0-0"])
def test_split_goes_by_what_a_label_means(normal):
    rows = [Row(data.lists.Path(f"v{i}.npy"), None, normal if i < 36 else "F", 2 + i) for i in range(40)]
    for seed in range(20):
        _, held = split(rows, 0.2, seed, {"N": "normal", "F": "fighting"})
        assert [row.label for row in held].count("F") == 1 and len(held) == 8


def test_split_depends_on_the_seed_alone():
    rows = crops(40, 20)
    assert split(rows, 0.2, 1, CODES) == split(rows, 0.2, 1, CODES)
    assert split(rows, 0.2, 1, CODES) != split(rows, 0.2, 2, CODES)
    assert split(rows, 0.2, -1, CODES) == split(rows, 0.2, -1, CODES)
    assert split(rows, 0.2, np.int64(1), CODES) == split(rows, 0.2, 1, CODES)


def test_split_at_the_edges():
    rows = crops(3, 1)
    assert split(rows, 0, 0, CODES) == (rows, [])
    train, held = split(rows, 0.01, 0, CODES)  # one of the two normal videos, and the only anomalous one stays
    assert len(held) == 10 and {row.label for row in held} == {"A"}
    train, held = split(rows, 0.99, 0, CODES)
    assert {row.label for row in train} == {"A", "B1-0-0"}
    with pytest.raises(ValueError, match="fraction"):
        split(rows, 1, 0, CODES)


def test_quotes_may_follow_a_blank(tmp_path):
    rows = read_list(write(tmp_path, 'path, audio_path, label\n "a, b.npy", "c.npy", "A"\n'))
    assert rows == [Row(tmp_path / "a, b.npy", tmp_path / "c.npy", "A", 2)]


def test_write_and_read_again(tmp_path):
    rows = [
        Row(tmp_path / "v/a, b.npy", tmp_path / "elsewhere" / "a.npy", "A", 2),
        Row(tmp_path / "v/ü.npy", tmp_path / "s/c.npy", "B1-0-0", 3),
    ]
    write_list(tmp_path / "l.csv", rows)
    assert read_list(tmp_path / "l.csv") == rows
    assert str(tmp_path) not in (tmp_path / "l.csv").read_text()
    (tmp_path / "v").mkdir()
    write_list(tmp_path / "v" / ".." / "l.csv", rows)
    assert str(tmp_path) not in (tmp_path / "l.csv").read_text()
    silent = [Row(row.visual, None, row.label, row.line) for row in rows]
    write_list(tmp_path / "l.csv", silent)
    assert (tmp_path / "l.csv").read_text().startswith("path,label\n")
    assert read_list(tmp_path / "l.csv", audio=False) == silent


def test_a_name_with_the_end_of_a_line_is_no_row_of_its_own(tmp_path):
    """Else a name could add rows of its own to the list that it stands in."""
    rows = [Row(tmp_path / f"a{end}b.npy", None, "A", 1) for end in ("\r", "\n", "\r\n")]
    write_list(tmp_path / "l.csv", rows)
    assert [row.visual for row in read_list(tmp_path / "l.csv", audio=False)] == [row.visual for row in rows]
    assert (tmp_path / "l.csv").read_bytes().endswith(b",A\n")


@pytest.fixture
def listed(tmp_path):
    """Four videos of 3, 8, 9 and 40 snippets, width 6."""
    rng = np.random.default_rng(0)
    lines = ["path,audio_path,label"]
    for i, (n, label) in enumerate([(3, "A"), (8, "B1-0-0"), (9, "B1-G-0"), (40, "A")]):
        for stream in "va":
            np.save(tmp_path / f"{i}{stream}.npy", rng.standard_normal((n, 6)).astype(np.float16))
        lines.append(f"{i}v.npy,{i}a.npy,{label}")
    return read_list(write(tmp_path, "\n".join(lines)))


def test_feature_set(listed):
    shown = []
    features = FeatureSet.load(listed, CODES, 8, width=6, progress=lambda items: (shown.append(i) or i for i in items))
    assert len(features) == features.videos() == len(shown) == 4 and features.visual.dtype == torch.float32
    assert features.lengths.tolist() == [3, 8, 8, 8]
    with torch.device("meta"):  # features lie in host memory, whatever the default device
        assert FeatureSet.load(listed, CODES, 8, width=6).fingerprint() == features.fingerprint()
    batch = features.batch(torch.tensor([3, 0]))
    assert batch.visual.dtype == batch.audio.dtype == batch.labels.dtype == torch.float32
    for b, row in enumerate((listed[3], listed[0])):
        for got, path in ((batch.visual[b], row.visual), (batch.audio[b], row.audio)):
            expected = torch.from_numpy(data.pool(data.load_features(path), 8)[0])
            assert torch.equal(got, expected)
        assert torch.equal(batch.labels[b], torch.from_numpy(data.encode(row.label, CODES)))
    assert batch.lengths.tolist() == [8, 3]
    again = features.to("cpu").batch(torch.tensor([1])).to("cpu")
    assert torch.equal(again.visual[0], features.visual[1])


def test_crops_in_a_feature_set_are_one_video(tmp_path):
    for name in ("a__0", "a__1", "b__0", "b__1", "c"):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 6), np.float32))
    rows = [Row(tmp_path / f"{name}.npy", None, "A", 2) for name in ("a__0", "a__1", "c", "b__0", "b__1")]
    features = FeatureSet.load(rows, CODES, 8, width=6, audio=False)
    data.pack(tmp_path / "p.safetensors", rows, 8, width=6, audio=False)
    packed, _ = FeatureSet.open(tmp_path / "p.safetensors", CODES, 8, width=6, audio=False)
    for found in (features, packed, features.to("cpu")):
        assert len(found) == 5 and found.videos() == 3
        assert found.subset(torch.tensor([0, 1, 3])).videos() == 2


def test_crops_of_a_video_have_one_label(tmp_path):
    labels = {"a__0": "B1-0-0", "a__5": "B1", "b__0": "A", "b__1": "B2-G-0", "b__2": "G-B2"}
    for name in labels:
        np.save(tmp_path / f"{name}.npy", np.ones((3, 6), np.float32))
    rows = [Row(tmp_path / f"{name}.npy", None, label, i + 2) for i, (name, label) in enumerate(labels.items())]
    assert len(FeatureSet.load(rows[:2] + rows[3:], CODES, 8, width=6, audio=False)) == 4
    wrong = "labelled B2-G-0, but A on line 4, as another crop of the same video"
    for read in (
        lambda: FeatureSet.load(rows, CODES, 8, width=6, audio=False),
        lambda: data.pack(tmp_path / "p", rows, 8),
    ):
        with pytest.raises(LabelError, match=rf"b__1.npy \(list line 5\): {wrong}"):
            read()
    write_list(tmp_path / "list.csv", rows)
    problems = data.check_list(tmp_path / "list.csv", CODES, audio=False, width=6)
    assert len(problems) == 2 and f"list.csv, line 5: {wrong}" in problems[0] and "line 6: " in problems[1]


def test_feature_set_without_sound(listed):
    silent = [Row(row.visual, None, row.label, row.line) for row in listed]
    features = FeatureSet.load(silent, CODES, 8, width=6, audio=False)
    assert features.audio is None and features.batch(torch.tensor([0])).audio is None
    assert features.to("cpu").audio is None
    with pytest.raises(DataError, match="line 2.*no sound"):
        FeatureSet.load(silent, CODES, 8, width=6)


def test_streams_of_unequal_length(listed):
    # both would be pooled to 8 rows, so only a look at the files finds it
    np.save(listed[3].audio, np.ones((39, 6), np.float32))
    for read in (
        lambda: FeatureSet.load(listed, CODES, 8, width=6),
        lambda: list(data.test_videos(listed, 8, width=6)),
    ):
        with pytest.raises(DataError) as caught:
            read()
        for word in (str(listed[3].visual), str(listed[3].audio), "40", "39", "line 5"):
            assert word in str(caught.value)


def test_feature_set_looks_at_the_labels_first(listed):
    bad = [*listed[:2], Row(listed[2].visual, listed[2].audio, "B9", 4)]
    listed[0].visual.unlink()
    with pytest.raises(LabelError, match="2v.npy.*line 4.*B9"):
        FeatureSet.load(bad, CODES, 8, width=6)
    with pytest.raises(DataError, match="0v.npy: no such file"):
        FeatureSet.load(listed, CODES, 8, width=6)
    with pytest.raises(DataError, match="width 6, expected 512"):
        FeatureSet.load(listed[1:], CODES, 8)
    with pytest.raises(DataError, match="empty"):
        FeatureSet.load([], CODES, 8)


def test_test_videos(listed):
    seen = list(data.test_videos(listed, 8, width=6))
    assert [(v.name, v.snippets, v.lengths.tolist()) for v in seen] == [
        ("0v", 3, [3]),
        ("1v", 8, [8]),
        ("2v", 9, [8, 1]),
        ("3v", 40, [8] * 5),
    ]
    assert seen[2].visual.shape == seen[2].audio.shape == (2, 8, 6)
    np.testing.assert_array_equal(seen[3].audio.reshape(40, 6), data.load_features(listed[3].audio))
    assert next(data.test_videos(listed, 8, width=6, audio=False)).audio is None
    listed[1].visual.unlink()
    assert next(data.test_videos(listed, 8, width=6)).name == "0v"  # read when asked for


@pytest.mark.parametrize("path", ["train.csv", Path("train.csv")])
def test_a_path_is_not_rows(path):
    calls = [
        lambda: FeatureSet.load(path, CODES, 8),
        lambda: data.pack("packed.safetensors", path, 8),
        lambda: next(data.test_videos(path, 8)),
        lambda: data.split(path, 0.5, 0, CODES),
        lambda: score_rows(None, path),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"^train.csv: .* not its path; give read_list\('train.csv'\)"):
            call()


def test_epoch_order():
    order = epoch_order(100, 234, 3)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, 234, 3))
    for other in ((100, 234, 4), (100, 235, 3), (100, 235, 2), (100, -234, 3)):
        assert not torch.equal(order, epoch_order(*other))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - neither global generator has a say
    assert torch.equal(order, epoch_order(100, 234, 3))


def test_a_real_list(shared):
    rows = read_list(shared / "data/fightsurv/train.csv")
    assert len(rows) == len(data.videos(rows)) == 240
    features = FeatureSet.load(rows[:4], data.CCTV_FIGHTS, 64)
    assert features.visual.shape == (4, 64, 512) and features.visual.isfinite().all()
    assert features.labels.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
