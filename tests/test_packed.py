"""Packed files: what comes back, what a kill leaves, and what is said of a bad one."""

import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import QUICK, call, mistake

from avadclip_fast import data
from avadclip_fast.data import DataError, FeatureSet, packed
from avadclip_fast.data.packed import Field, check_packed, open_packed, write_packed

FIELDS = {"x": Field("float32", (3, 2)), "n": Field("int64", ())}
ROWS = 50
CODES = {code: data.XD_VIOLENCE[code] for code in ("A", "B1", "B2", "G")}


def block(start: int, stop: int) -> dict[str, np.ndarray]:
    n = np.arange(start, stop)
    return {"x": np.sin(n[:, None, None] + np.arange(6).reshape(3, 2)), "n": n}


def write(path, fill=block, info=None, **settings):
    write_packed(path, FIELDS, ROWS, fill, info or {"of": "sines"}, block=8, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    data.make_synthetic(folder, videos=12, test_videos=1, min_snippets=16, max_snippets=30)
    return folder


def test_what_is_written_comes_back(tmp_path):
    write(tmp_path / "a.safetensors")
    tensors, info = open_packed(tmp_path / "a.safetensors")
    assert info == {"of": "sines"} and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    expected = block(0, ROWS)
    np.testing.assert_array_equal(tensors["x"].numpy(), expected["x"].astype(np.float32))
    np.testing.assert_array_equal(tensors["n"].numpy(), expected["n"])
    check_packed(tmp_path / "a.safetensors")


def test_macos_has_fewer_calls(tmp_path, monkeypatch):
    """A file is begun, and gone on with."""
    for name in ("posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)

    def interrupted(start: int, stop: int) -> dict[str, np.ndarray]:
        if start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return block(start, stop)

    with pytest.raises(DataError, match="another call resumes from the rows written"):
        write(tmp_path / "a.safetensors", interrupted)
    assert (tmp_path / "a.safetensors.part").stat().st_size > ROWS * 32
    begun: list[int] = []
    write(tmp_path / "a.safetensors", lambda start, stop: begun.append(start) or block(start, stop))
    assert begun[0] == 8
    check_packed(tmp_path / "a.safetensors")


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) - 700):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="a.safetensors.*not those that were written"):
            check_packed(path)
    path.write_bytes(whole.replace(b"sines", b"lines"))
    with pytest.raises(DataError, match="a.safetensors.*not those that were written"):
        open_packed(path)  # as of labels, which training would take as they are
    path.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="a.safetensors: cannot be read"):
        open_packed(path)
    path.write_bytes(b"PK" * 300)
    with pytest.raises(DataError, match="a.safetensors: cannot be read"):
        open_packed(path)


def cut_short(path):
    """Begins to write a file, is interrupted at its row 24, and returns the rows at which blocks began."""
    asked = []

    def failing(start, stop):
        asked.append(start)
        if start == 24:
            raise KeyboardInterrupt
        return block(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write(path, failing)
    return asked


def test_it_goes_on_where_it_was(tmp_path):
    write(tmp_path / "whole.safetensors")
    asked = cut_short(tmp_path / "cut.safetensors")
    assert not (tmp_path / "cut.safetensors").exists()

    def rest(start, stop):
        asked.append(start)
        return block(start, stop)

    write(tmp_path / "cut.safetensors", rest)
    assert asked == [0, 8, 16, 24, 24, 32, 40, 48]
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_rows_are_not_there_because_the_journal_says_so(tmp_path):
    """Someone has removed the large file, and left the small one beside it."""
    write(tmp_path / "whole.safetensors")
    cut_short(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors.part").unlink()
    write(tmp_path / "cut.safetensors")
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("rows", ["8", -8, 10**30, None])
def test_a_journal_that_counts_no_rows(tmp_path, rows):
    cut_short(tmp_path / "cut.safetensors")
    journal = tmp_path / "cut.safetensors.part.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"rows": rows}))
    write(tmp_path / "cut.safetensors")
    write(tmp_path / "whole.safetensors")
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_kill_at_the_very_end(tmp_path, monkeypatch):
    """After the file has its name nothing is left to do, and nothing that could undo it."""
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if not str(source).endswith(".tmp"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    monkeypatch.undo()
    write(tmp_path / "a.safetensors")
    check_packed(tmp_path / "a.safetensors")


def test_what_was_begun_otherwise_is_begun_anew(tmp_path):
    def once(start, stop):
        if start == 16:
            raise KeyboardInterrupt
        return {"x": np.full((stop - start, 3, 2), 7.0), "n": np.arange(start, stop)}

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.safetensors", once, {"of": "sevens"})
    write(tmp_path / "a.safetensors")
    np.testing.assert_allclose(open_packed(tmp_path / "a.safetensors")[0]["x"][0, 0, 0], np.sin(0))


def test_sigkill_anywhere(tmp_path):
    """Killed from outside again and again, wherever it happens to be, a writer ends with an unbroken one's bytes."""
    script = (
        "import sys, time, numpy as np; from avadclip_fast.data.packed import Field, write_packed\n"
        "def slow(start, stop):\n"
        "    time.sleep(0.03)\n"
        "    n = np.arange(start, stop)\n"
        "    return {'x': np.sin(n[:, None, None] + np.arange(6).reshape(3, 2)), 'n': n}\n"
        f"fields = {{'x': Field('float32', (3, 2)), 'n': Field('int64', ())}}\n"
        f"write_packed(sys.argv[1], fields, {ROWS}, slow, {{'of': 'sines'}}, block=8)"
    )
    path, rng = tmp_path / "cut.safetensors", np.random.default_rng(0)
    for _ in range(3):
        process, seen = subprocess.Popen([sys.executable, "-c", script, str(path)]), journal(path)
        while journal(path) == seen:  # a block further each time
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.03 * rng.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the writer ended before it could be killed"
    write(path)
    write(tmp_path / "whole.safetensors")
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def journal(path) -> int:
    """The rows that are in a file which is being written."""
    try:
        return json.loads(path.with_name(path.name + ".part.json").read_text())["rows"]
    except FileNotFoundError:
        return 0


def test_a_full_disk_is_told_at_once(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    asked = []
    with pytest.raises(DataError, match="a.safetensors: cannot be written: No space left on device$"):
        write(tmp_path / "a.safetensors", lambda start, stop: asked.append(start))
    assert asked == []


def test_paths_that_no_header_holds_are_told_at_once(tmp_path, monkeypatch):
    """After hours of packing, "header too large" was told by what was to read the file."""
    path = tmp_path / "a.safetensors"
    for size, told in ((packed._HEADER_MOST, "incomplete|invalid"), (packed._HEADER_MOST + 1, "header too large")):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        with pytest.raises(DataError, match=f"cannot be read as packed features: .*({told})"):
            open_packed(path)
    path.unlink()
    monkeypatch.setattr(packed, "_HEADER_MOST", 2_000_000)
    with pytest.raises(DataError, match="labels of 50 rows take 3 MB, and a safetensors header has 2 MB at most: pack"):
        write(path, info={"rows": ["name" * 10_000] * 75})
    assert not list(tmp_path.iterdir())
    write(path, info={"rows": ["name" * 10_000] * 49})
    check_packed(path)


def test_a_disk_that_fills_up_leaves_rows_to_go_on_from(tmp_path):
    def filling(start, stop):
        if start == 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return block(start, stop)

    with pytest.raises(DataError, match="No space left on device; another call resumes from the rows written"):
        write(tmp_path / "a.safetensors", filling)


def test_a_write_that_stops_short_goes_on(tmp_path, monkeypatch):
    """As Linux stops at 2 GB, or at the end of a disk; the rows, and the header with the checksum."""
    write(tmp_path / "whole.safetensors")
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, x, at: plain(file, x[:100], at))
    write_packed(tmp_path / "short.safetensors", FIELDS, ROWS, block, {"of": "sines"})
    assert (tmp_path / "short.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_rows_are_on_the_disk_before_they_count(tmp_path, monkeypatch):
    """Before the journal tells of them, and before the file has its name: else a crash could leave zeros in them."""
    unsynced, named = set(), []

    def noted(name, note):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given: note(given[0]) or plain(*given))

    noted("pwrite", unsynced.add)
    noted("fsync", unsynced.discard)
    noted("fdatasync", unsynced.discard)
    noted("replace", lambda _: named.append(not unsynced))
    write(tmp_path / "a.safetensors")
    assert named == [True] * 8  # of seven blocks, and of the whole


def test_a_smaller_file_is_begun_where_a_larger_one_was_left(tmp_path):
    def cut(start, stop):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(tmp_path / "a.safetensors", FIELDS, 100 * ROWS, cut, {})
    write(tmp_path / "a.safetensors")
    check_packed(tmp_path / "a.safetensors")


def test_tensors_are_aligned(tmp_path):
    for n in range(8):
        write(tmp_path / "a.safetensors", info={"of": "x" * n})
        assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0  # the header's length


def test_two_writers_of_one_file(tmp_path):
    def twice(start, stop):
        with pytest.raises(DataError, match="another process is writing"):
            write(tmp_path / "a.safetensors")
        return block(start, stop)

    write(tmp_path / "a.safetensors", twice)


def test_a_link_under_the_name_of_the_partial_file_is_not_followed(tmp_path):
    """In a folder such as /tmp, it could be another user's, to a file that is then replaced."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "a.safetensors.part").symlink_to("kept")
    with pytest.raises(DataError, match="a.safetensors: cannot be written: .*symbolic links"):
        write(tmp_path / "a.safetensors")
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_file_system_that_locks_nothing_is_written_to(tmp_path, monkeypatch):
    def refuses(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuses)
    write(tmp_path / "a.safetensors")
    check_packed(tmp_path / "a.safetensors")


@pytest.mark.parametrize("other", ["completes it", "removes it"])
def test_a_file_that_another_process_takes_away_before_it_is_locked(tmp_path, monkeypatch, other):
    """The finished file of the other process is not written over, nor is what was written lost."""
    path = tmp_path / "a.safetensors"
    part, lock, seen = tmp_path / "a.safetensors.part", fcntl.flock, []

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)  # the other process's, and every later one
        if other == "completes it":
            write(path)
        else:
            part.unlink()
        lock(file, how)

    def fill(start, stop):
        seen.append(part.exists())
        if other == "completes it":
            check_packed(path)
        return block(start, stop)

    part.touch()
    monkeypatch.setattr(fcntl, "flock", late)
    write(path, fill)
    check_packed(path)
    assert all(seen) and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_is_not_there_is_made(made, tmp_path, capsys):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    assert call("pack", made / "train.csv", "-o", path, "--length", 16, "-q") == 0
    check_packed(path)
    (tmp_path / "file").touch()
    for below in ("a.safetensors", "new/a.safetensors"):  # nothing is written that could be resumed
        said = mistake(capsys, "pack", made / "train.csv", "-o", tmp_path / "file" / below, "--length", 16, "-q")
        assert said.endswith("a.safetensors: cannot be written: Not a directory\n")


@pytest.mark.parametrize("audio", [True, False])
def test_a_packed_list_is_the_list(made, tmp_path, audio):
    rows = data.read_list(made / "train.csv")
    plain = FeatureSet.load(rows, CODES, 16, audio=audio)
    data.pack(tmp_path / "a.safetensors", rows, 16, audio=audio, dtype="float32")
    packed, listed = FeatureSet.open(tmp_path / "a.safetensors", CODES, 16, audio=audio)
    assert [(row.visual, row.label, row.line) for row in listed] == [(row.visual, row.label, row.line) for row in rows]
    order = torch.tensor([5, 0, 11, 3])
    part = plain.subset(order)
    for one, two in ((plain, packed), (part, packed.subset(order)), (part, packed.subset(order).to("cpu"))):
        assert len(one) == len(two) and torch.equal(one.valid(), two.valid())
        for a, b in zip(one.batch(torch.tensor([2, 1])), two.batch(torch.tensor([2, 1])), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(
        plain.subset(order).subset(torch.tensor([1, 2])).batch(torch.tensor([1])).visual, plain.visual[11:12]
    )
    for chosen in ([2, 1], np.array([2, 1])):
        assert torch.equal(plain.subset([5, 0, 11, 3]).batch(chosen).visual, part.batch(torch.tensor([2, 1])).visual)
        assert torch.equal(plain.subset(order).subset(chosen).valid(), plain.valid()[[11, 0]])
    assert len(plain.subset([])) == len(plain.batch([]).labels) == 0
    with pytest.raises(ValueError, match="as many lengths as visual rows, 12; got 11"):
        replace(plain, lengths=plain.lengths[:-1])
    with pytest.raises(ValueError, match="by their numbers, not by a mask"):
        plain.subset(plain.labels[:, 0] == 0)
    assert torch.equal(plain.batch(np.arange(len(plain), dtype=np.uint8)).lengths, plain.valid()), "not a mask"
    for wrong in ([0.5], 3, [[0, 1]]):
        with pytest.raises(ValueError, match="a vector of whole numbers"):
            plain.batch(wrong)
    for one in (plain, packed):
        assert one.fingerprint() != one.subset(order).fingerprint() == one.subset(order).fingerprint()
        assert one.subset(order).fingerprint() == one.subset(order).to("cpu").fingerprint()
    data.pack(tmp_path / "half.safetensors", rows, 16, audio=audio)
    half, _ = FeatureSet.open(tmp_path / "half.safetensors", CODES, 16, audio=audio)
    torch.testing.assert_close(half.visual.float(), plain.visual, rtol=2**-11, atol=1e-7)  # float16's half ulp


def test_columns_are_those_of_the_classes_asked_for(made, tmp_path):
    """Whatever their order, and that of the call that packed the file."""
    rows = data.read_list(made / "train.csv")
    data.pack(tmp_path / "a.safetensors", rows, 16)
    prints = set()
    for order in ("A", "G", "B2", "B1"), ("A", "B1", "B2", "G", "B4"):
        codes = {code: data.XD_VIOLENCE[code] for code in order}
        packed, _ = FeatureSet.open(tmp_path / "a.safetensors", codes, 16)
        assert torch.equal(packed.labels, FeatureSet.load(rows, codes, 16).labels)
        prints.add(packed.fingerprint())
    assert len(prints) == 2  # a run is not gone on with under other classes


@pytest.mark.parametrize("stream", ["visual", "audio"])
@pytest.mark.parametrize("value", [1e5, -1e5])
def test_what_float16_cannot_hold(made, tmp_path, stream, value):
    rows = data.read_list(made / "train.csv")
    large = data.load_features(getattr(rows[3], stream)).copy()
    large[5, 7] = value
    data.write_features(tmp_path / "large.npy", large)
    rows[3] = replace(rows[3], **{stream: tmp_path / "large.npy"})
    with pytest.raises(DataError, match="large.npy holds 100000, and float16 nothing beyond 65504; .*--float32"):
        data.pack(tmp_path / "a.safetensors", rows, 16)
    data.pack(tmp_path / "a.safetensors", rows, 16, dtype="float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_packs_no_other_dtype(made, tmp_path, dtype):
    with pytest.raises(DataError, match=f"packed features are float16 or float32; got dtype='{dtype}'"):
        data.pack(tmp_path / "a.safetensors", data.read_list(made / "train.csv"), 16, dtype=dtype)


def test_a_packed_file_that_does_not_fit(made, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    data.pack(path, data.read_list(made / "train.csv"), 16, audio=False)
    with pytest.raises(DataError, match="unknown code G"):
        FeatureSet.open(path, {code: CODES[code] for code in ("A", "B1", "B2")}, 16, audio=False)
    with pytest.raises(DataError, match="packed as 16 x 512, 32 x 512 is wanted"):
        FeatureSet.open(path, CODES, 32, audio=False)
    with pytest.raises(DataError, match="width 512, expected 768; were they made by another encoder"):
        FeatureSet.open(path, CODES, 16, width=768, audio=False)  # and not: train with --length 16
    with pytest.raises(DataError, match="packed without sound"):
        FeatureSet.open(path, CODES, 16)
    streams, _ = open_packed(path)
    rows = json.dumps({"rows": [["a.npy", "", "A"]] * 2})
    for changed, info in (
        (streams, json.dumps({"rows": 5})),
        (streams, "[" * 100_000),
        (streams | {"lengths": streams["lengths"].double()}, rows),  # more rows than names too
        ({name: x[:2, :1].flatten(1) for name, x in streams.items() if x.ndim > 1} | {"lengths": torch.ones(2)}, rows),
    ):
        save_file({name: x.contiguous() for name, x in changed.items()}, tmp_path / "b.safetensors", {"info": info})
        with pytest.raises(DataError, match="b.safetensors: (not a packed list|a safetensors file, but not)"):
            FeatureSet.open(tmp_path / "b.safetensors", CODES, 16, audio=False)
    two = {"visual": streams["visual"][:2].clone(), "lengths": torch.tensor([3, 17])}
    save_file(two, tmp_path / "b.safetensors", {"info": rows})
    with pytest.raises(DataError, match="b.safetensors: damaged, for a video has not 1 to 16 snippets"):
        FeatureSet.open(tmp_path / "b.safetensors", CODES, 16, audio=False)
    save_file({"model.a": torch.ones(3)}, path, metadata={"info": json.dumps({"epoch": 1})})  # as the state of a run
    with pytest.raises(DataError, match="a.safetensors: not a packed list; make one"):
        FeatureSet.open(path, CODES, 16)
    assert call("check", path) == 1
    assert "not a packed list" in capsys.readouterr().out


def test_a_list_packed_with_motion(made, tmp_path):
    rows = data.read_list(made / "train.csv")
    plain = FeatureSet.load(rows, CODES, 16, motion=True)
    assert plain.visual.shape == (len(rows), 16, 1024) and plain.audio.shape == (len(rows), 16, 512)
    for b, row in enumerate(rows):
        expected, n = data.pool(data.with_motion(data.load_features(row.visual)), 16)
        assert n == plain.lengths[b] and torch.equal(plain.visual[b], torch.from_numpy(expected))
    path = tmp_path / "a.safetensors"
    data.pack(path, rows, 16, motion=True, dtype="float32")
    packed, _ = FeatureSet.open(path, CODES, 16, motion=True)
    assert torch.equal(packed.visual, plain.visual)
    with pytest.raises(DataError, match="packed with motion; pack it again without --motion"):
        FeatureSet.open(path, CODES, 16)
    without = tmp_path / "b.safetensors"
    data.pack(without, rows, 16)
    for length in (16, 32):
        with pytest.raises(DataError, match="packed without motion; pack it again with --motion"):
            FeatureSet.open(without, CODES, length, motion=True)


def test_training_from_a_packed_file(made, tmp_path, capsys):
    """Same weights as from the list, held-out videos included."""
    assert call("pack", made / "train.csv", "-o", tmp_path / "p.safetensors", "--length", 16, "--float32", "-q") == 0
    assert call("check", tmp_path / "p.safetensors") == 0
    weights = []
    for name, source in (("list", made / "train.csv"), ("packed", tmp_path / "p.safetensors")):
        run = tmp_path / name
        assert call("train", source, "-o", run, "--epochs", 1, "--standardize", "audio", *QUICK) == 0
        weights.append(load_file(run / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "ends in .safetensors" in mistake(capsys, "pack", made / "train.csv", "-o", tmp_path / "p.bin")
    path = tmp_path / "p.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert call("check", path) == 1
    assert "not those that were written" in capsys.readouterr().out
    assert call("pack", made / "train.csv", "-o", path, "--length", 16, "--no-audio", "-q") == 0
    assert call("check", path, "--no-audio") == 0 and call("check", path) == 1  # as of a list
    assert "p.safetensors: packed without sound" in capsys.readouterr().out
