import builtins
import csv
import io
import json
import os
import pickle
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from malice import Call

from avadclip_fast import data
from avadclip_fast.data import DataError, Span, ground_truth


def official(path, video_lists):
    """As the official scripts save: an array of lists, pickled."""
    array = np.empty(len(video_lists), object)
    array[:] = video_lists
    np.save(path, array, allow_pickle=True)
    return path


SEGMENTS = [[["157", "180"], ["582", "810"]], [[0, 5760]], [["1", "2"], ["3", "4"], ["5", "6"]]]
LABELS = [["B2", "G"], ["A"], ["B1", "B1", "B1"]]


def test_spans_in_both_forms(tmp_path):
    expected = [
        [Span(157, 180, "B2"), Span(582, 810, "G")],
        [Span(0, 5760, "A")],
        [Span(1, 2, "B1"), Span(3, 4, "B1"), Span(5, 6, "B1")],
    ]
    pair = official(tmp_path / "s.npy", SEGMENTS), official(tmp_path / "l.npy", LABELS)
    (tmp_path / "t.json").write_text(json.dumps({"segments": SEGMENTS, "labels": LABELS}))
    assert data.segments(*pair) == expected
    assert data.read_segments_json(tmp_path / "t.json") == expected
    assert data.read_spans(*pair) == data.read_spans(tmp_path / "t.json") == expected
    with pytest.raises(DataError, match="second file"):
        data.read_spans(pair[0])
    with pytest.raises(DataError, match="leave out .*l.npy"):
        data.read_spans(tmp_path / "t.json", pair[1])


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))  # numpy.save on Python 3 wrote 3, now 4
@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2)])
def test_object_arrays_of_any_protocol_and_shape(tmp_path, protocol, shape):
    array = np.empty(shape, object)
    for i in range(array.size):
        array.flat[i] = [f"B{i}", i]
    for j, stored in enumerate((array, np.asfortranarray(array))):
        path = tmp_path / f"{j}.npy"
        with open(path, "wb") as file:
            header = {"descr": "|O", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            pickle.dump(stored, file, protocol=protocol)
        assert data.read_object_array(path) == array.tolist()


def with_payload(path, payload):
    """A file whose header is that of an object array, and whose pickle is another."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    path.write_bytes(content.getvalue() + payload)
    return path


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "mkdir"),
        (os.system, "system"),
        (builtins.eval, "builtins.eval"),
        (builtins.getattr, "builtins.getattr"),
        (np.save, "save"),
        (np.load, "load"),
        (np.lib.format.open_memmap, "open_memmap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, function, name, inside):
    trace = tmp_path / "executed"
    argument = {
        os.system: f"mkdir {trace}",
        builtins.eval: f"__import__('os').mkdir({str(trace)!r})",
    }.get(function, str(trace))
    arguments = (argument, np.ones(1)) if function is np.save else (argument,)
    payload = Call(function, *arguments)
    if inside:  # as an element of what would be a good array
        path = official(tmp_path / "x.npy", [["B1"], [payload]])
    else:
        path = with_payload(tmp_path / "x.npy", pickle.dumps(payload))
    with pytest.raises(DataError) as caught:
        data.read_object_array(path)
    assert name in str(caught.value) and str(path) in str(caught.value)
    assert not list(tmp_path.glob("executed*"))


def test_the_malicious_pickle_is_one(tmp_path):
    """Otherwise the test above would prove nothing."""
    path = official(tmp_path / "x.npy", [["B1"], [Call(os.mkdir, str(tmp_path / "executed"))]])
    np.load(path, allow_pickle=True)
    assert (tmp_path / "executed").exists()


def test_a_pickle_imports_nothing(tmp_path):
    with pytest.raises(DataError, match="antigravity"):
        data.read_object_array(with_payload(tmp_path / "x.npy", b"cantigravity\nfly\n."))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no pickle",
        pickle.dumps([["B1"]]),
        pickle.dumps(np.array([["B1"], [1.5]], object)),
        pickle.dumps(np.array([["B1"], [None]], object)),
        pickle.dumps(np.array([["B1"]], object))[:-20],
        b"cnumpy\nndarray\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\nI2\ntb.",
    ],
)
def test_other_pickles_are_errors(tmp_path, payload):
    with pytest.raises(DataError, match="x.npy"):
        data.read_object_array(with_payload(tmp_path / "x.npy", payload))


def array_of(items: bytes, shape: bytes = b"(K\x01t") -> bytes:
    """The pickle of an object array, opcode by opcode."""
    return b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape + b"NN" + items + b"tb."


def doubled(times: int) -> bytes:
    """A list of a list twice, and so on."""
    return b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(times))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (array_of(b"](" + doubled(60) + b"e"), "more than"),
        (array_of(b"]q\0(h\0e"), "recursion"),  # a list that holds itself
        (array_of(b"]", b"(J\xff\xff\xff\x7fK\0t"), "shape"),  # two thousand million empty lists
        (array_of(b"]", b"(J\xff\xff\xff\x0fX\3\0\0\0abct"), "its shape is .268435455, 'abc'"),  # text so many times
        (b"\x80\x02]r\0\0\0\x08.", "numbers an object 134217728"),
        (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.", "expected 1099511627776 bytes"),
    ],
    ids=["doubled", "in itself", "empty", "repeated", "memo", "bytes"],
)
def test_a_pickle_takes_no_memory_beyond_its_bytes(tmp_path, payload, words, monkeypatch):
    monkeypatch.setattr(ground_truth, "MOST", 1 << 12)
    path = with_payload(tmp_path / "x.npy", payload)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=f"x.npy: .*{words}"):
            data.read_object_array(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_damaged_official_files_are_errors_of_ours(tmp_path):
    path = official(tmp_path / "x.npy", SEGMENTS)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(content) - 20, len(content) + 1)])
        try:
            data.read_object_array(path)
        except DataError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("segments", "labels", "words"),
    [
        ([[[1, 2]]], [["A"], ["A"]], "spans of 1 videos, labels of 2"),
        ([[[1, 2]]], [["A", "B1"]], "video 0"),
        ([[[1, 2]], [[1, 2, 3]]], [["A"], ["A"]], "video 1"),
        ([[["x", 2]]], [["A"]], "video 0"),
        ([[[5, 5]]], [["B1"]], r"\(5, 5\)"),
        ([[[-1, 5]]], [["B1"]], r"\(-1, 5\)"),
        ([[5]], [["B1"]], "video 0"),
        ([[[0, 12.7]]], [["B1"]], "12.7 is no frame number"),  # seconds, say
        ([[[0, float("inf")]]], [["B1"]], "inf is no frame number"),
        ([[[0, 10**24]]], [["B1"]], "0 is no frame number"),
        ([[[0, True]]], [["B1"]], "True is no frame number"),
    ],
)
def test_spans_refused(tmp_path, segments, labels, words):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"segments": segments, "labels": labels}))
    with pytest.raises(DataError, match=words):
        data.read_segments_json(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "[" * 100_000, '{"segments": []}', '{"segments": 1, "labels": 2}', None]
)
def test_json_refused(tmp_path, text):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match="t.json"):
        data.read_segments_json(path)


def test_a_file_that_is_not_json_is_not_printed(tmp_path):
    (path := tmp_path / "t.json").write_bytes(bytes(range(256)) * 1000)
    with pytest.raises(DataError, match="t.json: not JSON .*UnicodeDecodeError: ") as told:
        data.read_segments_json(path)
    assert len(str(told.value)) < 500


def test_frame_vector():
    annotations = {"b": [(1, 3), (2, 4)], "a": [(6, 100)]}
    vector = data.frame_vector(annotations, [("a", 8), ("n", 2), ("b", 5)])
    assert vector.dtype == np.float32
    assert vector.tolist() == [0, 0, 0, 0, 0, 0, 1, 1] + [0, 0] + [0, 1, 1, 1, 0]
    with pytest.raises(DataError, match="1 annotated videos.*b"):
        data.frame_vector(annotations, [("a", 8)])
    with pytest.raises(DataError, match="a is annotated, and in the list twice"):  # of two cameras, say
        data.frame_vector(annotations, [("a", 8), ("n", 2), ("b", 5), ("n", 2), ("a", 9)])


@pytest.mark.parametrize("span", [(-3, 2), (5, 2), (4, 4), (0.5, 2.5), (0, 5, "B1"), 0])
def test_frame_vector_takes_spans_of_whole_frames(span):
    with pytest.raises(DataError, match=r"a: span .* is not"):
        data.frame_vector({"a": [span]}, [("a", 8)])
    assert data.frame_vector({"a": np.array([[2, 4]])}, [("a", 5)]).tolist() == [0, 0, 1, 1, 0]


def test_read_annotations(tmp_path):
    path = tmp_path / "annotations.txt"
    path.write_text("v=x__#1_label_B4-0-0 0 1517 1970 3038\n\ny_label_G-0-0.mp4  5 7 \n")
    assert data.read_annotations(path) == {"v=x__#1_label_B4-0-0": [(0, 1517), (1970, 3038)], "y_label_G-0-0": [(5, 7)]}
    for text, words in [
        ("a 1 2\nb 1 2 3\n", "line 2.*pairs"),
        ("a 1 x\n", "line 1.*pairs"),
        ("a 2 1\n", "line 1.*start < end"),
        ("a 1 2\na.mp4 5 6\n", "line 2.*second time"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            data.read_annotations(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        data.read_annotations(path)
    with pytest.raises(DataError, match="absent.txt"):
        data.read_annotations(tmp_path / "absent.txt")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64, bool])
def test_read_frame_gt(tmp_path, dtype):
    truth = np.array([0, 1, 1, 0], dtype)
    np.save(tmp_path / "a.npy", truth)
    np.savez(tmp_path / "b.npz", other=truth)
    np.savez_compressed(tmp_path / "c.npz", gt=truth, note=np.ones(2))
    np.savez(tmp_path / "d.npz", note=np.ones(2), gt=truth)
    for name in ("a.npy", "b.npz", "c.npz", "d.npz"):
        vector = data.read_frame_gt(tmp_path / name)
        assert vector.dtype == np.float32 and vector.tolist() == [0, 1, 1, 0]


def test_read_frame_gt_refuses(tmp_path):
    path = tmp_path / "x.npy"
    for array, words in [
        (np.array([0, 1, 0.5]), "frame 2 is 0.5"),
        (np.array([np.nan, 1]), "frame 0 is nan"),
        (np.ones((2, 2)), "vector"),
        (np.ones(0), "vector"),
        (np.array(["a"]), "vector"),
        (np.array([[1]], object), "vector"),
    ]:
        np.save(path, array, allow_pickle=True)
        with pytest.raises(DataError, match=words):
            data.read_frame_gt(path)
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.ones(2))
    with pytest.raises(DataError, match="a, b"):
        data.read_frame_gt(tmp_path / "x.npz")
    for content in (b"", b"text", b"PK\x03\x04 no zip"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="x.npy"):
            data.read_frame_gt(path)
    with pytest.raises(DataError, match="no such file"):
        data.read_frame_gt(tmp_path / "absent.npy")


def test_frames_are_all_that_is_read_of_an_archive(tmp_path):
    """Gigabytes of zeros behind them would fit in a megabyte."""
    frames, path = io.BytesIO(), tmp_path / "x.npz"
    np.save(frames, np.ones(8, np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("gt.npy", frames.getvalue() + bytes(1 << 27))
    tracemalloc.start()
    assert data.read_frame_gt(path).tolist() == [1] * 8
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:  # whose damage has an error of its own
        file.writestr("gt.npy", frames.getvalue())
    with pytest.raises(DataError, match="x.npz: compressed as numpy.savez_compressed does not"):
        data.read_frame_gt(path)


@pytest.mark.parametrize("name", ["a.npy", "b.npz", "c.npz"])
def test_damaged_frame_gt_is_an_error_of_ours(tmp_path, name):
    """Every byte in turn, and files that are cut short."""
    truth, path = np.ones(64, np.uint8), tmp_path / name
    {"a": np.save, "b": np.savez, "c": np.savez_compressed}[name[0]](path, **{"arr" if name[0] == "a" else "gt": truth})
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:i] + b"(" + whole[i + 1 :] for i in range(len(whole))]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            data.read_frame_gt(path)
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(damaged) / 4


@pytest.mark.parametrize(
    ("stem", "videos", "spans"), [("xd_violence/gt_xd", 800, 1572), ("cctv_fights/gt_cctv", 157, 349)]
)
def test_official_spans(shared, stem, videos, spans):
    files = [shared / f"data/{stem}_{part}.npy" for part in ("segment", "label")]
    pairs, labels = (np.load(file, allow_pickle=True) for file in files)  # these two are known to be harmless
    assert [data.read_object_array(file) for file in files] == [pairs.tolist(), labels.tolist()]
    found = data.segments(*files)
    assert (len(found), sum(map(len, found))) == (videos, spans)
    assert found == [
        [Span(int(s), int(e), c) for (s, e), c in zip(p, own, strict=True)]
        for p, own in zip(pairs, labels, strict=True)
    ]


def test_official_xd_frames(shared):
    folder = shared / "data/xd_violence"
    with open(folder / "test_videos.csv", newline="", encoding="utf-8") as file:
        videos = [(row["video"], int(row["gt_frames"])) for row in csv.DictReader(file)]
    truth = data.read_frame_gt(folder / "gt_xd.npz")
    assert (len(truth), truth.sum()) == (2_331_296, 537_882)
    np.testing.assert_array_equal(data.frame_vector(data.read_annotations(folder / "annotations.txt"), videos), truth)


def test_official_cctv_frames(shared):
    truth = data.read_frame_gt(shared / "data/cctv_fights/gt_cctv.npy")
    assert (len(truth), truth.sum()) == (173_276, 78_796)


def test_the_real_run_agrees_with_itself(shared):
    folder = shared / "data/fightsurv"
    truth = data.read_frame_gt(folder / "gt.npy")
    rows, spans = data.read_list(folder / "test.csv"), data.read_spans(folder / "gt_segments.json")
    frames = [4 * data.snippet_count(row.visual) for row in rows]
    marked = [[span for span in video if span.code != "A"] for video in spans]
    named = {str(i): [span[:2] for span in video] for i, video in enumerate(marked)}
    np.testing.assert_array_equal(data.frame_vector(named, [(str(i), n) for i, n in enumerate(frames)]), truth)
    assert (
        data.check_list(folder / "test.csv", data.CCTV_FIGHTS, frame_gt=folder / "gt.npy", frames_per_snippet=4) == []
    )
