"""Several processes: gradients, runs and scores of one, and what is left when one dies or is asked to end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_tests import ON_GPU
from safetensors.torch import load_file, save_file
from test_graph import let_a_processor_record
from test_train import CLASSES, SMALL, features, same, teacher, weights

from avadclip_fast import AVadCLIP, AVadCLIPStudent, data
from avadclip_fast.device import current, device_of
from avadclip_fast.engine import distributed, loop, step, teacher_cache, train
from avadclip_fast.engine.calibrate import CALIBRATION
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.engine.state import StateError, load_state
from avadclip_fast.engine.step import train_step, trim
from avadclip_fast.engine.stop import Stopped
from avadclip_fast.engine.teacher_cache import TEACHER_FEATURES
from avadclip_fast.engine.train import HISTORY, MODEL, STATE, fit

CODES = "A=normal,B1=fighting,B2=shooting,G=explosion"
RECIPE = Recipe(epochs=2, batch_size=5, lr=1e-5, noise=0.5, select="val", distill_weight=1e-2, milestones=())
COUNT = 11  # batches of 5, 5 and 1: the last has fewer samples than there are processes


def torchrun(*command) -> subprocess.Popen:
    """Two processes of one run, one thread each."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*program, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finished(process: subprocess.Popen) -> str:
    """What a run that succeeds prints."""
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return printed


# What one process does, and what each of two does: the same functions.


def gradients(folder: Path) -> None:
    """Of one step of every kind of model, on batches that do not come out even, in files of their own. In float64: what
    two processes add up in another order differs by little, and a wrong weight by much."""
    source = features(COUNT)
    guide = teacher().double().eval().requires_grad_(False)
    for padding in ("masked", "official"):
        for count in (5, 1):
            for kind in ("teacher", "student", "distilled"):
                torch.manual_seed(1)
                model = AVadCLIPStudent.beside(guide, padding=padding)
                if kind == "teacher":
                    model = AVadCLIP(CLASSES, **SMALL, dropout=0.0, padding=padding)
                optimizer = torch.optim.SGD([p for p in model.double().parameters() if p.requires_grad], lr=0.0)
                lengths = source.lengths[:count]
                part = distributed.part(lengths)
                batch = trim(source.batch(torch.arange(count)[part.where]), model, longest=int(lengths.max()))
                batch = batch._replace(visual=batch.visual.double(), audio=batch.audio.double())
                known = teacher_cache.teacher_features(guide, batch) if kind == "distilled" else None
                losses, asked = train_step(
                    model.train(), optimizer, batch, known, RECIPE, part, distributed.rank() == 1
                )
                assert asked is None or asked.item() == 1
                found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                found |= {f"loss {n}": x.detach().clone() for n, x in losses.items()}
                if distributed.is_main():
                    save_file(found, folder / f"{padding} {count} {kind}.safetensors")


def runs(folder: Path) -> None:
    """A teacher, and a student that is distilled by features in memory and by features on disk."""
    source, held_out = features(COUNT), features(7, seed=1)
    torch.manual_seed(distributed.rank())  # rank 0's weights are everyone's
    guide = AVadCLIP(CLASSES, **SMALL, dropout=0.0)
    fit(guide, source, RECIPE, folder / "teacher", held_out=held_out, progress=False)
    for name, limit, block in (("memory", 1 << 30, 64), ("disk", 0, 4)):
        torch.manual_seed(1)
        teacher_cache.CACHE_LIMIT, teacher_cache.CACHE_BLOCK = limit, block
        student = AVadCLIPStudent.beside(guide)
        fit(student, source, RECIPE, folder / name, held_out=held_out, teacher=guide, progress=False)


def interrupted(folder: Path) -> None:
    """A run that is not broken, and one of which the last process gets SIGTERM, and which then goes on; dropout on."""
    recipe = replace(RECIPE, checkpoint_every=100, select="last")
    fit(teacher(), features(COUNT), recipe, folder / "unbroken", progress=False)
    plain, calls, seeds = step.objective, 0, []

    def asked(*arguments):
        nonlocal calls
        calls += 1
        seeds.append(torch.initial_seed())
        if calls == 4 and distributed.rank() == distributed.world() - 1:  # of three steps an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    step.objective = asked
    with pytest.raises(Stopped, match="SIGTERM"):
        fit(teacher(), features(COUNT), recipe, folder / "broken", progress=False)
    step.objective = plain
    assert calls == 5
    (folder / f"seeds{distributed.rank()}.json").write_text(json.dumps(seeds))
    fit(teacher(seed=9), features(COUNT), recipe, folder / "broken", resume=True, progress=False)


def plain_and_recorded(folder: Path, device: str = "cpu") -> None:
    """Runs whose steps are plain, and ones whose steps are two graphs and an all-reduce; dropout on."""
    source, guide = features(COUNT), teacher()
    recipe = replace(RECIPE, checkpoint_every=1, select="last", lr=1e-3, milestones=(1,))
    for kind, model in (("teacher", teacher), ("distilled", lambda: AVadCLIPStudent.beside(guide))):
        for graph in (False, True):
            torch.manual_seed(1)
            known = guide if kind == "distilled" else None
            fit(
                model(), source, recipe, folder / f"{kind} {graph}", teacher=known, device=device, graph=graph,
                progress=False,
            )  # fmt: skip


def recorded(folder: Path) -> None:
    """On a processor, with a stand-in for a graph; as if features were on the GPU, and as if they were sent."""
    for resident in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            recordings = let_a_processor_record(patch)
            patch.setattr(loop.Loop, "__post_init__", lambda x: vars(x).update(resident=resident, longest=16))  # noqa: B023
            plain_and_recorded(folder / f"resident {resident}")
            assert recordings == 2 * [None, (0, 1), None]  # of each kind two sizes of a batch, and the update


def recorded_on_gpu(folder: Path) -> None:
    """On one GPU, which both processes share (by gloo: NCCL wants a GPU for each)."""
    torch.backends.cudnn.deterministic = True  # it makes the convolutions of float32, as in conftest.py
    plain_and_recorded(folder, "cuda:0")


def long_run(folder: Path) -> None:
    """One that is meant to be killed."""
    (folder / f"pid{distributed.rank()}").write_text(str(os.getpid()))
    fit(teacher(), features(40), replace(RECIPE, epochs=10000, checkpoint_every=3, select="last"), folder / "run",
        progress=False)  # fmt: skip


if __name__ == "__main__":
    with distributed.joined(torch.device("cpu")):
        for name in sys.argv[2:]:
            globals()[name](Path(sys.argv[1]))
    # A thread that is still there may meet the interpreter's end, and abort.
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in threads if "gloo" in name]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What one process and what two have left."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    process = torchrun(__file__, two, "gradients", "runs", "interrupted", "recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "CACHE_LIMIT", 0)  # put back what `runs` sets
        patch.setattr(teacher_cache, "CACHE_BLOCK", 4)
        gradients(one)
        runs(one)
    finished(process)
    return one, two


def test_gradients_of_uneven_parts_are_those_of_the_batch(both):
    one, two = both
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) == 12 and files == sorted(path.name for path in two.glob("*.safetensors"))
    for name in files:
        expected, found = load_file(one / name), load_file(two / name)
        assert expected.keys() == found.keys(), name
        for key, x in expected.items():
            # sums of a few thousand products in another order; processes exchange losses in float32
            loss = key.startswith("loss")
            near = 1e-6 if loss else 1e-10
            atol = near * x.abs().max().item() + 1e-16
            torch.testing.assert_close(found[key], x, rtol=near, atol=atol, check_dtype=not loss, msg=f"{name}: {key}")


@pytest.mark.parametrize("run", ["teacher", "memory", "disk"])
def test_two_processes_leave_what_one_does(both, run):
    one, two = (folder / run for folder in both)
    first, second = (json.loads((folder / HISTORY).read_text()) for folder in (one, two))
    for expected, found in zip(first["epochs"], second["epochs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for history in (first, second):
        history["run"].pop("teacher")  # which the two have trained too: its bits differ
    assert first["run"] == second["run"] and first["selected_epoch"] == second["selected_epoch"]
    # AdamW divides a gradient by its own size: where that is rounding alone, as a key's bias has, a step of lr may go
    # either way. Others agree: on average to a thousandth of one step, of which there were six.
    sides = [{name: x for name, x in weights(run).items() if not name.startswith("text.")} for run in (one, two)]
    moved = torch.cat([(sides[1][name] - x).abs().flatten() for name, x in sides[0].items()])
    assert moved.max() < 2 * 6 * RECIPE.lr and moved.mean() < 1e-3 * RECIPE.lr
    assert len(list((two / "tensorboard").iterdir())) == 1
    calibrations = [json.loads((folder / MODEL / CALIBRATION).read_text()) for folder in (one, two)]
    assert calibrations[0]["videos"] == calibrations[1]["videos"] == 7
    if run == "disk":
        caches = [load_file(folder / TEACHER_FEATURES)["features"] for folder in (one, two)]
        torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-4)


def test_one_process_is_asked_to_end_and_all_save_and_go_on(both):
    assert same(weights(both[1] / "unbroken"), weights(both[1] / "broken"))


def assert_recorded_as_plain(folder: Path, kind: str) -> None:
    plain, recorded = (folder / f"{kind} {graph}" for graph in (False, True))
    assert same(weights(plain), weights(recorded))
    assert (plain / HISTORY).read_text() == (recorded / HISTORY).read_text()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", ["teacher", "distilled"])
def test_recorded_steps_of_two_processes_give_the_same_numbers(both, kind, resident):
    assert_recorded_as_plain(both[1] / f"resident {resident}", kind)


@ON_GPU[0]
@ON_GPU[1]
def test_recorded_steps_of_two_processes_give_the_same_numbers_on_a_gpu(tmp_path):
    finished(torchrun(__file__, tmp_path, "recorded_on_gpu"))
    for kind in ("teacher", "distilled"):
        assert_recorded_as_plain(tmp_path, kind)


def test_processes_that_see_different_states_are_told(tmp_path, monkeypatch):
    """As where the folder lies on a disk of each machine: training would go on from two states at once."""
    monkeypatch.setattr(distributed, "agreed", lambda own: own + 1)  # what rank 0 has is something else
    with pytest.raises(StateError, match="see different states there, this one that of epoch 0, step 0"):
        fit(teacher(), features(4), RECIPE, tmp_path, held_out=features(4), progress=False)
    assert not (tmp_path / MODEL).exists()


def test_each_process_drops_out_on_its_own(both):
    first, second = (json.loads((both[1] / f"seeds{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 5 and not set(first) & set(second)


@pytest.mark.parametrize(("rank", "order"), [(0, ["block", "met"]), (1, ["met", "block"])])
def test_the_main_process_goes_first(monkeypatch, rank, order):
    done = []
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "agreed", lambda value: done.append("met"))
    with distributed.main_first():
        done.append("block")
    assert done == order


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # there may be no GPU here to ask
    for name in ("auto", "cuda", "cuda:0", "cpu"):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        alone = device_of(name)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert (str(alone), str(device_of(name))) == {
            "auto": ("cuda", "cuda:1"), "cuda": ("cuda", "cuda:1"), "cuda:0": ("cuda:0",) * 2, "cpu": ("cpu",) * 2,
        }[name]  # fmt: skip


def test_a_device_that_is_none_or_is_not_here_is_told(monkeypatch):
    for name in ("meta", "gpu", "cuda:", "cpu:a"):
        with pytest.raises(data.DataError, match=f"device '{name}': it must be auto, cpu, cuda, or"):
            device_of(name)
    for error in (RuntimeError, AssertionError):  # the latter of a torch without CUDA

        def missing(*_, error=error, **__):
            raise error("no such device\nand where to look")

        monkeypatch.setattr(torch, "empty", missing)
        with pytest.raises(data.DataError, match=r"^device 'cuda:10' is not available: no such device$"):
            device_of("cuda:10")


def test_training_makes_its_gpu_the_current_one(monkeypatch, tmp_path):
    """Streams and CUDA graphs are of the current GPU: a graph recorded on another one holds nothing."""
    assert isinstance(current(torch.device("cuda:1")), torch.cuda.device)
    inside = []

    @contextlib.contextmanager
    def noted(device):
        inside.append(str(device))
        yield
        inside.append("left")

    monkeypatch.setattr(train, "current", noted)
    monkeypatch.setattr(loop.Loop, "epoch", lambda *_: inside.append("epoch") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.fit(teacher(), features(6), replace(RECIPE, select="last"), tmp_path, progress=False)
    assert inside == ["cpu", "epoch"]


def test_training_through_the_command_line(tmp_path):
    from test_cli import call  # a second of imports, which the processes that run this file need not spend

    data.make_synthetic(tmp_path, videos=8, test_videos=1, min_snippets=16, max_snippets=20)
    size = "--text-weights", "random", "--text-layers", 1, "--length", 8, "--classes", CODES
    few = "train", tmp_path / "train.csv", "--student", "--epochs", 1, "--batch-size", 5, "--select", "last", *size
    process = torchrun("-m", "avadclip_fast", *few, "-o", tmp_path / "two")
    assert call(*few, "-o", tmp_path / "one", "-q") == 0
    printed = finished(process)
    assert printed.count("model: ") == printed.count("epoch 1: ") == printed.count("features: ") == 1
    first, second = (json.loads((tmp_path / run / HISTORY).read_text())["epochs"][0] for run in ("one", "two"))
    assert second == pytest.approx(first, rel=1e-5)


def test_evaluation_is_shared_and_the_same_to_the_bit(both, tmp_path, capsys):
    from test_cli import call

    made = {"videos": 8, "test_videos": 12, "min_snippets": 16, "max_snippets": 80, "width": 32}
    data.make_synthetic(tmp_path, **made)  # of up to five chunks
    names = ",".join(f"{code}={name}" for code, name in zip(("A", "B1", "G"), CLASSES, strict=True))
    ask = "eval", tmp_path / "test.csv", "--model", both[0] / "teacher", "--gt", tmp_path / "gt.npy", "-q"
    ask = *ask, "--classes", names, "--json"
    process = torchrun("-m", "avadclip_fast", *ask, tmp_path / "two.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has
    capsys.readouterr()
    try:
        assert call(*ask, tmp_path / "one.json") == 0
    finally:
        torch.set_num_threads(threads)
    assert finished(process) == capsys.readouterr().out
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_a_process_that_is_killed_ends_the_run(tmp_path):
    process, state = torchrun(__file__, tmp_path, "long_run"), tmp_path / "run" / STATE
    while not state.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 10
    assert "PeerLost" in said or "SIGTERM" in said, said
    assert load_state(state, teacher())["epoch"] >= 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid0").read_text()), 0)
