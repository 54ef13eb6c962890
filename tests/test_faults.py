"""Killed, out of room, or sent to a folder that cannot be written: nothing is lost, and one line says what to do."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_packed import journal
from test_train import RECIPE, features, same, teacher, weights

from avadclip_fast import AVadCLIPStudent, data
from avadclip_fast.data.atomic import append_csv, write_json
from avadclip_fast.data.packed import check_packed
from avadclip_fast.engine import export, step, teacher_cache
from avadclip_fast.engine.loop import Board
from avadclip_fast.engine.state import StateError
from avadclip_fast.engine.stop import Stopped
from avadclip_fast.engine.teacher_cache import TEACHER_FEATURES
from avadclip_fast.engine.train import MODEL, STATE, fit

DISTIL = replace(RECIPE, epochs=1, distill_weight=1e-2)


@contextlib.contextmanager
def file_limit(size: int):
    """Inside the block no file grows past `size` bytes: what a full disk is to who writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def distil(folder, pause: float = 0.0) -> None:
    """A student's run whose teacher features go to disk, two samples at a time."""
    plain = teacher_cache.teacher_features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "CACHE_LIMIT", 0)
        patch.setattr(teacher_cache, "CACHE_BLOCK", 2)
        patch.setattr(teacher_cache, "teacher_features", lambda *given: time.sleep(pause) or plain(*given))
        guide = teacher()
        torch.manual_seed(1)
        fit(AVadCLIPStudent.beside(guide), features(24), DISTIL, folder, teacher=guide, resume=True, progress=False)


if __name__ == "__main__":
    distil(sys.argv[1], pause=0.05)


def test_sigkill_while_teacher_features_are_cached(tmp_path):
    """Killed twice, wherever it happens to be: what was computed is kept, and the end is an unbroken run's."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kept, draw, reached = tmp_path / "cut" / TEACHER_FEATURES, random.Random(0), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, __file__, str(tmp_path / "cut")], env=environment)
        while journal(kept) <= reached:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.1 * draw.random())
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        assert journal(kept) > reached and not kept.exists()
        reached = journal(kept)
    distil(tmp_path / "cut")
    distil(tmp_path / "whole")
    check_packed(kept)
    assert same(load_file(kept), load_file(tmp_path / "whole" / TEACHER_FEATURES))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    """At a state, and at the model that is written last: the run goes on from there, bit for bit."""
    recipe = replace(RECIPE, epochs=2)
    fit(teacher(), features(), recipe, tmp_path / "whole", progress=False)
    plain, calls = step.objective, 0

    def asked(*given):
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(*given)

    monkeypatch.setattr(step, "objective", asked)
    run = tmp_path / "cut"
    with pytest.raises(Stopped):
        fit(teacher(), features(), recipe, run, progress=False)
    state = (run / STATE).read_bytes()
    with file_limit(len(state) // 2), pytest.raises(StateError, match="state.safetensors: cannot be written: File too"):
        fit(teacher(), features(), recipe, run, resume=True, progress=False)
    assert (run / STATE).read_bytes() == state and not list(run.glob(".*"))
    model = os.path.getsize(tmp_path / "whole" / MODEL / "model.safetensors")
    assert model > len(state) + 1000  # the frozen text weights are in it
    with file_limit(len(state) + 1000), pytest.raises(StateError, match="cut: cannot be written: File too large"):
        fit(teacher(), features(), recipe, run, resume=True, progress=False)
    assert not list(run.rglob(".*.tmp"))
    fit(teacher(), features(), recipe, run, resume=True, progress=False)
    assert same(weights(tmp_path / "whole"), weights(run))


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    """Else the model of one got the weights of the other."""
    from test_cli import QUICK, call, mistake

    data.make_synthetic(tmp_path, videos=12, test_videos=1, min_snippets=16, max_snippets=20)
    few = "train", tmp_path / "train.csv", "-o", tmp_path / "run", "--epochs", 1, "--select", "last", *QUICK
    code = "import sys, pathlib; from avadclip_fast.engine.state import alone\nwith alone(pathlib.Path(sys.argv[1])):"
    code += " print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdin=-1, stdout=-1)
    other.stdout.readline()
    assert "run: another process is training there; wait for that one" in mistake(capsys, *few)
    other.kill()
    other.communicate()
    assert call(*few) == 0


def test_it_is_told_in_one_line(tmp_path, capsys):
    from test_cli import QUICK, mistake  # a second of imports, which the process above need not spend

    data.make_synthetic(tmp_path, videos=12, test_videos=1, min_snippets=16, max_snippets=20)
    few = tmp_path / "train.csv", "--epochs", 1, "--select", "last", *QUICK
    with file_limit(100_000):
        message = mistake(capsys, "train", *few, "-o", tmp_path / "full")
        assert "best.safetensors: cannot be written: File too large" in message and "Make room" in message
    (tmp_path / "file").write_text("not a folder")
    message = mistake(capsys, "train", *few, "-o", tmp_path / "file" / "run")
    assert "file/run: cannot be written: Not a directory" in message
    pack = "pack", tmp_path / "train.csv", "--length", 16, "-q", "-o"
    packed = tmp_path / "p.safetensors"
    packed.write_bytes(b"an earlier one")
    with file_limit(100_000):
        assert "p.safetensors: cannot be written: File too large" in mistake(capsys, *pack, packed)
    assert packed.read_bytes() == b"an earlier one"
    assert "cannot be written: Not a directory" in mistake(capsys, *pack, tmp_path / "file" / "p.safetensors")


def test_an_interrupt_right_after_a_file_is_written_is_none_of_its_errors(tmp_path, monkeypatch):
    renamed = os.replace

    def interrupted(*paths):
        renamed(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_told_with_the_name_of_a_small_file(tmp_path):
    """Whose bytes closing tries to write once more: that error named no file, and detect blamed its temporary ones."""
    path = tmp_path / "events.csv"
    with file_limit(10), pytest.raises(OSError) as caught, data.atomic_write(path) as file:
        file.write(b"more than ten bytes")
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_part_of_rows_that_follow_others(tmp_path):
    path = tmp_path / "events.csv"
    append_csv(path, [["a", 1]])
    with file_limit(10), pytest.raises(OSError, match="File too large") as caught:
        append_csv(path, [["b", 2], ["c", 3]])
    assert caught.value.filename == str(path) and path.read_text() == "a,1\n"
    append_csv(path, [["b", 2], ["c", 3]])
    assert path.read_text() == "a,1\nb,2\nc,3\n"


def test_a_full_disk_is_told_with_the_name_of_features(tmp_path, capsys):
    """Of which NumPy told "24576 requested and 9936 written"; and the demo, which has no --resume, spoke of it."""
    from test_cli import mistake

    path = tmp_path / "a.npy"
    with file_limit(20_000):
        with pytest.raises(OSError, match="File too large") as caught:
            data.write_features(path, np.zeros((24, 512), np.float16))
        told = mistake(capsys, "demo", "-o", tmp_path / "demo", "--device", "cpu")
    assert caught.value.filename == str(path) and not path.exists()
    assert told.startswith(f"error: {tmp_path / 'demo' / 'data'}: cannot be written: File too large")
    assert told.endswith("train and distill go on from the last state with --resume\n")


def test_a_full_disk_is_told_where_a_trace_meets_it(tmp_path, capsys):
    """Of which torch tells its log alone: the error was of a temporary file that was not there, and another stayed."""
    from test_cli import mistake

    case = "profile", "topk_mean", "--batch", "1", "--iterations", "5", "--warmup", "0", "--device", "cpu"
    with file_limit(20_000):
        told = mistake(capsys, *case, "--trace", tmp_path / "t.json")
    assert told == f"error: {tmp_path / 't.json'}: torch could not write the trace; is the disk full?\n"
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_where_tensorboard_meets_it(tmp_path, monkeypatch, capsys):
    """In a thread of its own, whose stack trace was printed, and the error named no file."""
    from test_cli import call

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    assert call("--version") == 0  # which sets another
    board = Board(tmp_path, 0)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    with pytest.raises(StateError, match="tensorboard: cannot be written: No space left on device"):
        while True:
            board.add_scalar("epoch/val", 1.0, 1)
    board.close()
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_told_with_the_file_of_a_model(tmp_path, capsys, monkeypatch):
    from test_cli import call, mistake

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where export writes at first
    model, official, made = tmp_path / "model", tmp_path / "a.pth", tmp_path / "made"
    sizes = {"width": 64, "text_width": 64, "text_layers": 1, "length": 32}  # 12 MB, nearly all of it CLIP's vocabulary
    student = AVadCLIPStudent(["normal", "x"], **sizes, text_weights="random", padding="official")
    student.save_pretrained(model)
    program = export.trace(student.eval())  # once for both files
    monkeypatch.setattr(export, "trace", lambda *_: program)
    assert call("convert", model, official) == 0
    capsys.readouterr()
    classes = "--classes", "A=normal,B=x"
    with file_limit(100_000):
        for given, file in (
            (("convert", model, tmp_path / "b.pth"), "b.pth"),
            (("convert", official, made), "model.safetensors"),
            (("export", model, "-o", tmp_path / "b.pt2"), "b.pt2"),
            (("export", model, "-o", tmp_path / "b.onnx"), "b.onnx"),
        ):
            told = mistake(capsys, *given, *classes)
            assert told.startswith("error: [Errno 27] File too large: ") and told.endswith(f"{file}'\n")
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")}  # a cache of torch's
    assert left == {"model", "a.pth", "made"} and not list(made.iterdir())
