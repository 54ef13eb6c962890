"""Training: exact resume after SIGKILL, selection, distillation, and what is left on disk."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.summary.writer import event_file_writer

from avadclip_fast import data
from avadclip_fast.data import FeatureSet, tensors
from avadclip_fast.engine import loop, residency, state, step, teacher_cache, train
from avadclip_fast.engine.calibrate import Calibration, calibrate
from avadclip_fast.engine.recipe import ROBUST, Recipe, RecipeError
from avadclip_fast.engine.state import Saver, StateError, frozen_digest
from avadclip_fast.engine.step import add_noise, feature_std, float32_products, trim
from avadclip_fast.engine.stop import Stopped, listening
from avadclip_fast.engine.teacher_cache import teacher_features
from avadclip_fast.engine.train import (
    BEST,
    HISTORY,
    MODEL,
    STATE,
    fit,
    validation_loss,
)
from avadclip_fast.models import AVadCLIP, AVadCLIPStudent, objective
from avadclip_fast.ops import _autocast
from avadclip_fast.ops._padding import zero_padding

CLASSES = ["normal", "fighting", "explosion"]
SMALL = {"length": 16, "width": 32, "text_width": 64, "text_layers": 1, "text_weights": "random"}


def features(count=12, seed=0) -> FeatureSet:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 17, count)
    x = rng.standard_normal((2, count, 16, 32), dtype=np.float32)
    x *= (np.arange(16) < lengths[:, None])[None, :, :, None]
    labels = np.eye(3, dtype=np.float32)[rng.integers(0, 3, count)]
    return FeatureSet(*(torch.from_numpy(a) for a in (x[0], x[1], lengths, labels)))


def teacher(seed=0) -> AVadCLIP:
    torch.manual_seed(seed)
    return AVadCLIP(CLASSES, **SMALL)


def weights(folder) -> dict:
    return load_file(folder / MODEL / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


RECIPE = Recipe(epochs=3, batch_size=5, lr=1e-3, milestones=(2,), checkpoint_every=1)


def test_training_lowers_the_loss_and_leaves_a_loadable_model(tmp_path):
    model = teacher()
    history = fit(model, features(), Recipe(epochs=12, batch_size=6, lr=1e-3, milestones=()), tmp_path, progress=False)
    assert history[-1]["total"] < 0.7 * history[0]["total"] and not model.training
    loaded = AVadCLIP.from_pretrained(tmp_path / MODEL)
    assert same(loaded.state_dict(), model.state_dict())
    written = json.loads((tmp_path / HISTORY).read_text())
    assert [e["epoch"] for e in written["epochs"]] == list(range(1, 13))
    assert any((tmp_path / "tensorboard").iterdir())


def test_the_recipe_is_the_papers_by_default():
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.milestones) == (10, 96, 1e-5, (3, 6))
    assert (recipe.text_weight, recipe.distill_weight, recipe.weight_decay) == (1e-4, 1e-8, 0.01)


def test_lr_follows_the_milestones():
    recipe = Recipe(lr=1.0, milestones=(3, 6))
    assert [recipe.lr_at(e) for e in range(8)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_frozen_text_weights_stay(tmp_path):
    model = teacher()
    before, prompt = frozen_digest(model), model.text.prompt.weight.clone()
    fit(model, features(), RECIPE, tmp_path, progress=False)
    assert frozen_digest(model) == before
    assert not torch.equal(model.text.prompt.weight, prompt)


class Killed(Exception):
    pass


@contextlib.contextmanager
def killed(after):
    """A run inside the block is killed after the save for which after(number, *arguments) holds."""
    plain, numbers = Saver.save, itertools.count(1)

    def save(saver, *args):
        plain(saver, *args)
        saver.wait()
        if after(next(numbers), *args):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Saver, "save", save)
        yield


def test_training_goes_on_while_states_are_written(tmp_path, monkeypatch):
    """What is written is what there was at the time of the call."""
    going, plain = threading.Event(), state.atomic_write

    @contextlib.contextmanager
    def slowly(path):
        assert going.wait(60)
        with plain(path) as file:
            yield file

    monkeypatch.setattr(state, "atomic_write", slowly)
    model = teacher()
    optimizer = step.adamw(model, RECIPE, torch.device("cpu"))
    before, info = {name: x.clone() for name, x in state.trained(model).items()}, {"step": [1]}
    with Saver() as saver:
        saver.save(tmp_path / "best", model, None, info)
        saver.save(tmp_path / "state", model, optimizer, info)
        info["step"].append(2)
        with torch.no_grad():
            for p in model.parameters():
                p += 1
        assert not list(tmp_path.iterdir())
        going.set()
    other = teacher(seed=3)
    for name in ("best", "state"):
        assert state.load_state(tmp_path / name, other) == {"step": [1]}
        assert same(state.trained(other), before)


def test_no_state_is_written_after_one_that_could_not_be(tmp_path):
    """A state refers to the best weights that are written before it."""
    model = teacher()
    with pytest.raises(StateError, match="missing/best: cannot be written"), Saver() as saver:
        saver.save(tmp_path / "missing/best", model, None, {})
        saver.save(tmp_path / "state", model, None, {})
    assert not list(tmp_path.iterdir())
    saver = Saver()
    saver.save(tmp_path / "missing/best", model, None, {})
    with pytest.raises(StateError, match="missing/best: cannot be written"):
        saver.wait()
    with pytest.raises(StateError, match="missing/best: cannot be written"):
        saver.save(tmp_path / "state", model, None, {})
    with pytest.raises(KeyboardInterrupt), Saver() as saver:  # what ends a run is not hidden
        saver.save(tmp_path / "missing/best", model, None, {})
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing stops, by what its recipe has other than RECIPE; each is run once."""

    @functools.cache
    def run(**settings):
        folder = tmp_path_factory.mktemp("unbroken")
        fit(teacher(), features(), dataclasses.replace(RECIPE, **settings), folder, progress=False)
        return folder

    return run


@pytest.mark.parametrize("after", [1, 3, 4, 7, 11])  # four an epoch: two of its steps, the best, the state
@pytest.mark.parametrize("settings", [{}, {"noise": 0.5, "temporal_lr": 0.1}], ids=["official", "robust"])
def test_resume_is_exact_in_the_middle_of_an_epoch(unbroken, tmp_path, after, settings):
    recipe, whole = dataclasses.replace(RECIPE, **settings), unbroken(**settings)
    with killed(lambda number, *_: number == after):
        fit(teacher(), features(), recipe, tmp_path, progress=False)
    fit(teacher(seed=9), features(), recipe, tmp_path, resume=True, progress=False)
    assert same(weights(whole), weights(tmp_path))
    histories = [json.loads((run / HISTORY).read_text()) for run in (whole, tmp_path)]
    assert histories[0] == histories[1]


def test_a_resumed_run_has_the_statistics_of_its_inputs(tmp_path):
    """Also where the model is another object that nobody has fitted."""
    model, data = AVadCLIP(CLASSES, standardize=["audio"], **SMALL), features()
    model.fit_inputs(data.batches())
    fit(model, data, dataclasses.replace(RECIPE, epochs=1), tmp_path, progress=False)
    again = AVadCLIP(CLASSES, standardize=["audio"], **SMALL)
    fit(again, data, RECIPE, tmp_path, resume=True, progress=False)
    known = model.standardize.state_dict()
    assert same(again.standardize.state_dict(), known) and not torch.equal(known["audio.std"], torch.ones(32))


def test_a_model_that_standardises_needs_statistics(tmp_path):
    """Those it is built with change nothing, and would be saved as the set's; of a silent set they are the same."""
    model, silent = AVadCLIP(CLASSES, standardize=["audio"], **SMALL), features()
    with pytest.raises(RecipeError, match=r"AVadCLIP standardises audio and has no statistics.*fit_inputs\("):
        fit(model, features(), RECIPE, tmp_path, progress=False)
    silent.audio.zero_()
    model.fit_inputs(silent.batches())
    fit(model, silent, dataclasses.replace(RECIPE, epochs=1), tmp_path, progress=False)


def read(folder) -> tuple[dict, dict]:
    """The tensors and the progress in the state of a run."""
    with safe_open(folder / STATE, framework="pt") as file:
        return load_file(folder / STATE), json.loads(file.metadata()["info"])


def curve(folder, name="epoch/val") -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows it."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("select", ["last", "val", "test"])
@pytest.mark.parametrize("after", [None, 5])  # a finished run, and one killed in the middle of its second epoch
def test_more_epochs_are_those_of_the_longer_run(tmp_path, select, after):
    """To the bit, past a milestone, whatever epoch was the best so far: model, history, state and TensorBoard."""
    recipe = dataclasses.replace(RECIPE, epochs=5, milestones=(2, 4), select=select, noise=0.5, checkpoint_every=2)
    held_out = features(6, seed=1)

    def run(name, seed=0, **settings):
        # the best epoch is the second, before the longer run goes on, or the fifth
        aps = iter([0.1, 0.8, 0.2, 0.3, 0.9][len(read(tmp_path / name)[1]["history"]) if "resume" in settings else 0 :])
        changed = dataclasses.replace(recipe, **{k: v for k, v in settings.items() if k != "resume"})
        resume = settings.get("resume", False)
        return fit(
            teacher(seed), features(), changed, tmp_path / name, resume=resume, progress=False, held_out=held_out,
            test_ap=lambda model: next(aps),
        )  # fmt: skip

    run("whole")
    if after is None:
        run("short", epochs=3)
    else:
        with killed(lambda number, *_: number == after):
            run("short", epochs=3)
    assert len(run("short", seed=9, resume=True)) == 5
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "short"))
    assert (tmp_path / "whole" / HISTORY).read_text() == (tmp_path / "short" / HISTORY).read_text()
    (tensors, info), (expected, of) = (read(tmp_path / name) for name in ("short", "whole"))
    assert same(tensors, expected) and info == of
    assert same(load_file(tmp_path / "whole" / BEST), load_file(tmp_path / "short" / BEST))
    assert curve(tmp_path / "whole") == curve(tmp_path / "short") and len(curve(tmp_path / "whole")) == 5


def test_tensorboard_goes_on_where_the_run_does(tmp_path):
    """Each step once, and each epoch's held-out loss at its last step, also after a kill in the middle of an epoch."""
    recipe = dataclasses.replace(RECIPE, epochs=2, batch_size=1, checkpoint_every=12)
    how = {"held_out": features(4, 1), "progress": False}
    fit(teacher(), features(22), recipe, tmp_path / "whole", **how)
    with killed(lambda number, *_: number == 1):  # after 12 of 22 steps
        fit(teacher(), features(22), recipe, tmp_path / "cut", **how)
    fit(teacher(), features(22), recipe, tmp_path / "cut", resume=True, **how)
    whole, cut = (curve(tmp_path / run, "train/total") for run in ("whole", "cut"))
    assert cut == whole and [step for step, _ in cut] == [10, 20, 22, 32, 42, 44]
    assert [step for step, _ in curve(tmp_path / "cut")] == [22, 44]


def test_tensorboard_reads_runs_of_one_second_in_their_order(tmp_path, monkeypatch):
    """Not by the names that TensorBoard would give their files: a process's tenth comes before its ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for done in range(3):
        board = loop.Board(tmp_path, done)
        board.add_scalar("epoch/val", done / 2, done + 1)
        board.close()
    assert curve(tmp_path) == [(1, 0.0), (2, 0.5), (3, 1.0)]


def test_fewer_epochs_than_a_run_has(tmp_path):
    """Refused, also where a kill has left the best weights of an epoch that the state does not know of."""
    fit(teacher(), features(), RECIPE, tmp_path, progress=False)
    fewer, more = (dataclasses.replace(RECIPE, epochs=epochs) for epochs in (2, 4))
    with pytest.raises(StateError, match=r"run of 3 epochs, 3 of them done, and cannot end after 2; .* --epochs 3 or"):
        fit(teacher(), features(), fewer, tmp_path, resume=True, progress=False)
    before = (tmp_path / STATE).read_bytes()
    with killed(lambda number, path, *_: path.name == BEST):
        fit(teacher(), features(), dataclasses.replace(more, checkpoint_every=9), tmp_path, resume=True, progress=False)
    assert (tmp_path / STATE).read_bytes() == before
    with pytest.raises(StateError, match=r"beyond 3 epochs: best\.safetensors is of a later one; resume it with more"):
        fit(teacher(), features(), RECIPE, tmp_path, resume=True, progress=False)
    fit(teacher(), features(), more, tmp_path, resume=True, progress=False)
    fit(teacher(), features(), more, tmp_path / "whole", progress=False)
    assert same(weights(tmp_path), weights(tmp_path / "whole"))


def test_how_often_a_state_is_saved_may_change(tmp_path):
    fit(teacher(), features(), RECIPE, tmp_path, progress=False)
    other = dataclasses.replace(RECIPE, checkpoint_every=7)
    fit(teacher(), features(), other, tmp_path, resume=True, progress=False)
    assert json.loads((tmp_path / HISTORY).read_text())["run"]["recipe"]["checkpoint_every"] == 7


def test_sigkill_and_resume(tmp_path):
    """A run killed from outside, wherever it happens to be, ends with the weights of an unbroken one."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_train; test_train.run_to_kill(sys.argv[2])"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run_to_kill(tmp_path / "whole")
    command = [sys.executable, "-c", script, os.path.dirname(__file__), str(tmp_path / "cut")]
    process = subprocess.Popen(command, env=environment)
    while not (tmp_path / "cut" / STATE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "cut" / MODEL).exists()
    run_to_kill(tmp_path / "cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def run_to_kill(folder) -> None:
    """Eighty steps, begun or gone on with."""
    recipe = Recipe(epochs=4, batch_size=2, lr=1e-3, checkpoint_every=3)
    fit(teacher(), features(40), recipe, folder, resume=True, progress=False)


def test_sigterm_saves_and_ends(tmp_path, monkeypatch):
    """Asked to end in the middle of an epoch, a run saves after the step at hand, wherever its next state was due."""
    recipe = dataclasses.replace(RECIPE, checkpoint_every=100)
    fit(teacher(), features(), recipe, tmp_path / "whole", progress=False)
    plain, calls = step.objective, 0

    def asked(*args):
        nonlocal calls
        calls += 1
        if calls == 4:  # of three steps an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(step, "objective", asked)
    with pytest.raises(Stopped, match="SIGTERM"):
        fit(teacher(), features(), recipe, tmp_path / "cut", progress=False)
    assert calls == 4 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    fit(teacher(seed=9), features(), recipe, tmp_path / "cut", resume=True, progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize(("at", "stops"), [(1, True), (2, True), (3, False)])
def test_sigterm_in_epochs_of_one_step(tmp_path, monkeypatch, at, stops):
    """It is seen between epochs; after the last one only the model is left to write."""
    plain, calls = step.objective, 0

    def asked(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(step, "objective", asked)
    with pytest.raises(Stopped) if stops else contextlib.nullcontext():
        fit(teacher(), features(), dataclasses.replace(RECIPE, batch_size=12), tmp_path, progress=False)
    assert calls == at and (tmp_path / MODEL).exists() == (not stops)


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_again(interruptible):
    """A second SIGTERM comes from torchrun, which got the first one too; a second Ctrl-C is meant."""
    with listening() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupt_while_a_state_is_read_is_no_damage(interruptible, tmp_path, monkeypatch):
    """torch, below `get_tensor`, takes a KeyboardInterrupt for an object that has no shape."""

    class Deaf:
        def __init__(self, *given, **named):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def keys(self):
            return ["model.x"]

        def get_tensor(self, name):
            try:
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.01)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None

        def metadata(self):
            return {"info": "{}"}

    monkeypatch.setattr(tensors, "safe_open", Deaf)
    with pytest.raises(KeyboardInterrupt):
        state.load_state(tmp_path / STATE, teacher())


def test_sigterm_through_the_command_line(tmp_path):
    data.make_synthetic(tmp_path, videos=12, test_videos=1, min_snippets=16, max_snippets=20)
    command = "train", tmp_path / "train.csv", "-o", tmp_path / "run", "--epochs", "1000", "--select", "last"
    text = "--classes", "A=normal,B1=fighting,B2=shooting,G=explosion", "--text-weights", "random", "--text-layers", "1"
    program = [sys.executable, "-m", "avadclip_fast", *map(str, command), *text, "--length", "16", "-q"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / STATE).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in said and "--resume" in said and "Traceback" not in said


def test_bfloat16_follows_float32(tmp_path):
    """Sixty steps at the paper's rate: weights and moments stay float32, losses within 1 % of float32's.

    Products keep 8 bits, 0.4 % each. Over many steps at higher rates, or of a dozen samples seen again and again, the
    two part like two runs of other seeds: by 2.2 % with twelve samples of one seed, by 0.2 % with these.
    """
    recipe = Recipe(epochs=10, batch_size=6, lr=1e-5, milestones=())
    model = functools.partial(AVadCLIP, CLASSES, **SMALL, dropout=0.0)
    curves = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        run = tmp_path / precision
        curves[precision] = fit(
            model(), features(36), dataclasses.replace(recipe, precision=precision), run, progress=False
        )
        assert all(x.dtype == torch.float32 for x in load_file(run / STATE).values())
    for full, half in zip(*curves.values(), strict=True):
        assert half["total"] == pytest.approx(full["total"], rel=0.01) and half["total"] != full["total"]


def test_noise_is_of_the_training_rows_spread_and_spares_sound_and_padding():
    data = features(40)
    scale = feature_std(data)
    valid = torch.arange(16) < data.lengths[:, None]
    torch.testing.assert_close(scale, data.visual[valid].std(0, unbiased=False), rtol=1e-5, atol=1e-6)
    batch = data.batch(torch.arange(40))
    torch.manual_seed(0)
    drawn = add_noise(batch, scale)
    moved = (drawn.visual - batch.visual) / scale
    assert torch.equal(drawn.visual[~valid], batch.visual[~valid]) and drawn.audio is batch.audio
    assert abs(moved[valid].mean()) < 0.05 and abs(moved[valid].std() - 1) < 0.05  # of some 10,000 numbers


def test_noise_is_as_loud_as_the_recipe_says(tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(loop, "add_noise", lambda batch, scale, *_: scales.append(scale) or batch)
    fit(teacher(), features(), dataclasses.replace(RECIPE, epochs=1, noise=0.25), tmp_path, progress=False)
    torch.testing.assert_close(scales[0], 0.25 * feature_std(features()))


def test_the_temporal_encoder_has_a_rate_of_its_own(tmp_path):
    model = teacher()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fit(model, features(), dataclasses.replace(RECIPE, epochs=1, temporal_lr=0.0), tmp_path, progress=False)
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert not any(name.startswith("temporal.") for name in changed)
    assert any(name.startswith("audio.") for name in changed) and "classifier.weight" in changed


def test_a_precision_that_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("avadclip_fast.engine.step.HAS_AMX", False)
    with pytest.raises(RecipeError, match="fp32, tf32, bf16; got 'fp8'"):
        Recipe(precision="fp8")
    with pytest.raises(RecipeError, match="tf32 needs a GPU, or a processor with tile units"):
        fit(teacher(), features(), dataclasses.replace(RECIPE, precision="tf32"), tmp_path, progress=False)


def test_a_gpu_saves_less_often():
    """There a step takes milliseconds, and a checkpoint a second."""
    assert [Recipe().steps_between_checkpoints(device) for device in ("cpu", "cuda")] == [100, 500]
    assert [Recipe(checkpoint_every=7).steps_between_checkpoints(device) for device in ("cpu", "cuda")] == [7, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        {"select": "best"}, {"epochs": 0}, {"batch_size": 0}, {"checkpoint_every": 0}, {"precision": "fp8"},
        {"milestones": (3, -1)}, {"epochs": 2.5}, {"batch_size": "8"}, {"lr": "1e-3"}, {"lr": -1}, {"lr": math.nan},
        {"lr": math.inf}, {"temporal_lr": -0.5}, {"noise": -1.0}, {"distill_weight": -1e-8}, {"text_weight": -1},
        {"weight_decay": np.float64(-0.01)},
        {"milestones": 3}, {"milestones": "no"}, {"milestones": "36"}, {"milestones": (1.5,)}, {"seed": None},
        {"seed": 0.5},
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_followed(wrong):
    (name,) = wrong
    with pytest.raises(RecipeError, match=f"^{name} must be .*; got"):
        Recipe(**wrong)


def test_a_recipe_of_numpys_numbers(tmp_path):
    """As of a sweep over np.arange: a run's state is JSON, which does not hold them."""
    plain = dataclasses.replace(RECIPE, epochs=1, seed=3)
    given = dataclasses.replace(
        RECIPE, epochs=np.int64(1), batch_size=np.int64(5), lr=np.float64(1e-3), milestones=np.array([2]),
        seed=np.arange(4)[3],
    )  # fmt: skip
    assert repr(given) == repr(plain)
    assert fit(teacher(), features(), given, tmp_path, progress=False)[0]["epoch"] == 1
    assert torch.equal(data.epoch_order(9, np.int64(3), 1), data.epoch_order(9, 3, 1))


@pytest.mark.parametrize("make", [AVadCLIP, functools.partial(AVadCLIPStudent, modality="audio")])
def test_a_model_that_hears_needs_sound(make, tmp_path):
    """A teacher takes no sound for silence, and would be trained on it."""
    deaf = dataclasses.replace(features(), audio=None)
    with pytest.raises(RecipeError, match="takes sound, and the set has none"):
        fit(make(CLASSES, **SMALL), deaf, RECIPE, tmp_path, progress=False)
    with pytest.raises(RecipeError, match="takes sound, and the set has none"):
        fit(make(CLASSES, **SMALL), features(), RECIPE, tmp_path, held_out=deaf, progress=False)
    with pytest.raises(ValueError, match="'audio'"):
        make(CLASSES, standardize=["audio"], **SMALL).fit_inputs(deaf.batches())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 8}, r"the set has \d+ rows a video; the AVadCLIPStudent takes 8: load it with length=8"),
        ({"width": 16}, "sound has 32 numbers a row; the model takes 16"),
        ({"classes": [*CLASSES, "robbery"]}, f"labels are of {len(CLASSES)} classes; the model has {len(CLASSES) + 1}"),
    ],
)
def test_a_set_of_another_model(settings, words, tmp_path):
    model = AVadCLIPStudent(**{"classes": CLASSES, "modality": "audio", **SMALL, **settings})
    with pytest.raises(RecipeError, match=words):
        fit(model, features(), RECIPE, tmp_path, progress=False)


def test_a_set_without_videos(tmp_path):
    """As a part of a small set may be."""
    none = features().subset(torch.tensor([], dtype=torch.int64))
    for name, videos, held_out in (("data", none, None), ("held_out", features(), none)):
        with pytest.raises(RecipeError, match=f"^{name} has no videos"):
            fit(teacher(), videos, RECIPE, tmp_path, held_out=held_out, progress=False)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [({"data": "train.csv"}, "FeatureSet"), ({"held_out": []}, "FeatureSet"), ({"recipe": ROBUST}, "Recipe")],
)
def test_fit_takes_a_set_and_a_recipe(wrong, kind, tmp_path):
    """Not a list, its rows or a dict of settings."""
    (name,) = wrong
    with pytest.raises(RecipeError, match=f"^{name} must be a {kind}; got"):
        fit(**{"model": teacher(), "data": features(), "recipe": RECIPE, "folder": tmp_path, **wrong}, progress=False)


def test_only_students_are_distilled(tmp_path):
    with pytest.raises(RecipeError, match="a teacher distils a student"):
        fit(teacher(), features(), RECIPE, tmp_path, teacher=teacher(1), progress=False)
    student = AVadCLIPStudent.beside(teacher(), window=4)
    for wrong, kind in ((student, "AVadCLIPStudent"), ("runs/teacher", "str")):
        with pytest.raises(RecipeError, match=rf"teacher must be an AVadCLIP; got {kind}: load one with"):
            fit(student, features(), RECIPE, tmp_path, teacher=wrong, progress=False)


def test_a_teacher_that_was_distilled_from_is_frozen(tmp_path):
    known = teacher()
    fit(AVadCLIPStudent.beside(known, window=4), features(), RECIPE, tmp_path / "a", teacher=known, progress=False)
    with pytest.raises(RecipeError, match="the model is frozen"):
        fit(known, features(), RECIPE, tmp_path / "b", progress=False)


def test_a_set_is_known_by_every_bit():
    one = features()
    for name in ("visual", "audio", "labels"):
        other = dataclasses.replace(one, **{name: getattr(one, name).flip(-1)})  # of the same sums
        assert other.fingerprint() != one.fingerprint() == features().fingerprint()


def test_float32_is_float32_also_to_cudnn():
    """Whichever way its convolutions' precision was set before, it is the same afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            cudnn.conv.fp32_precision = setting
            with float32_products("fp32", torch.device("cpu")):
                assert not cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
            with float32_products("tf32", torch.device("cuda")):
                assert cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
            assert (cudnn.conv.fp32_precision == "tf32") == (setting == "tf32")
    finally:
        cudnn.allow_tf32 = before == "tf32"


def test_precision_is_as_before_after_a_run():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, other in (("high", "fp32"), ("highest", "tf32")):
            torch.set_float32_matmul_precision(setting)
            with float32_products(other, torch.device("cuda")):
                assert torch.get_float32_matmul_precision() != setting
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("part", [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul], ids=["gpu", "cpu"])
def test_precision_may_be_set_by_either_api_of_torch(part):
    """Once fp32_precision has been set, the older one's getters raise."""
    before, part.fp32_precision = part.fp32_precision, "tf32"
    try:
        with float32_products("fp32", torch.device("cpu")):
            assert part.fp32_precision == "ieee" and torch.get_float32_matmul_precision() == "highest"
        assert part.fp32_precision == "tf32"
    finally:
        part.fp32_precision = before


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    fit(teacher(), features(), RECIPE, tmp_path, progress=False)
    with pytest.raises(StateError, match="--resume"):
        fit(teacher(), features(), RECIPE, tmp_path, progress=False)
    with pytest.raises(StateError, match="lr"):
        fit(teacher(), features(), Recipe(**{**vars(RECIPE), "lr": 1e-4}), tmp_path, resume=True, progress=False)
    other = teacher()
    other.text.randomize(seed=5)
    with pytest.raises(StateError, match="frozen"):
        fit(other, features(), RECIPE, tmp_path, resume=True, progress=False)
    student = AVadCLIPStudent(CLASSES, **SMALL)
    with pytest.raises(StateError, match=r"other settings \(.*window.*modality.*\)"):
        fit(student, features(), RECIPE, tmp_path, resume=True, progress=False)
    with pytest.raises(StateError, match="belongs to a model of other settings"):
        state.load_state(tmp_path / STATE, student)
    changes = {"padding": "official", "window": 8, "length": 20, "fusion": "concat", "standardize": ["audio"]}
    for change, settings in ((name, {**SMALL, name: value}) for name, value in changes.items()):
        torch.manual_seed(0)
        with pytest.raises(StateError, match=rf"other settings \({change}\)"):
            fit(AVadCLIP(CLASSES, **settings), features(), RECIPE, tmp_path, resume=True, progress=False)
    relabelled = features()
    relabelled.labels[:] = relabelled.labels.roll(1, 0)
    for videos in (features(seed=1), relabelled):
        with pytest.raises(StateError, match=r"other settings \(training videos\)"):
            fit(teacher(), videos, RECIPE, tmp_path, resume=True, progress=False)
    with pytest.raises(StateError, match=r"other settings \(held-out videos\)"):
        fit(teacher(), features(), RECIPE, tmp_path, held_out=features(5), resume=True, progress=False)
    for content, said in ((b"not a state", "cannot be read"), ((tmp_path / BEST).read_bytes(), "not hold the state")):
        (tmp_path / STATE).write_bytes(content)
        with pytest.raises(StateError, match=said):
            fit(teacher(), features(), RECIPE, tmp_path, resume=True, progress=False)


def test_a_run_in_a_path_that_is_not_utf_8_is_refused(tmp_path):
    """Where TensorBoard could not write, nor safetensors read the state."""
    with pytest.raises(StateError, match="a path that is not UTF-8"):
        fit(teacher(), features(), RECIPE, tmp_path / "b\udcff" / "run", progress=False)


def test_selection(tmp_path):
    values = iter([0.2, 0.9, 0.9])  # of equals the first
    recipe = Recipe(**{**vars(RECIPE), "select": "test"})
    model = teacher()
    fit(model, features(), recipe, tmp_path / "test", test_ap=lambda model: next(values), progress=False)
    assert json.loads((tmp_path / "test" / HISTORY).read_text())["selected_epoch"] == 2
    stored = {k.removeprefix("model."): v for k, v in load_file(tmp_path / "test" / BEST).items()}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in stored.items())

    recipe = Recipe(**{**vars(RECIPE), "select": "val"})
    history = fit(teacher(), features(), recipe, tmp_path / "val", held_out=features(4, seed=1), progress=False)
    chosen = json.loads((tmp_path / "val" / HISTORY).read_text())["selected_epoch"]
    assert chosen == min(history, key=lambda e: e["val"])["epoch"]
    with pytest.raises(ValueError, match="held_out"):
        fit(teacher(), features(), recipe, tmp_path / "none", progress=False)


def test_the_best_epoch_so_far_is_known_after_a_resume(tmp_path):
    recipe = Recipe(**{**vars(RECIPE), "select": "test", "checkpoint_every": 100})
    # by the state after the first epoch, which has an optimizer
    with killed(lambda _, path, model, optimizer, info: optimizer is not None and info.get("epoch") == 1):
        fit(teacher(), features(), recipe, tmp_path, test_ap=lambda model: 0.9, progress=False)
    first = {k.removeprefix("model."): v for k, v in load_file(tmp_path / STATE).items() if k.startswith("model.")}
    fit(teacher(9), features(), recipe, tmp_path, test_ap=lambda model: 0.5, resume=True, progress=False)
    assert json.loads((tmp_path / HISTORY).read_text())["selected_epoch"] == 1
    found = weights(tmp_path)
    assert all(torch.equal(found[name], x) for name, x in first.items())


def test_steps_have_their_epochs_rate_and_order_and_train(tmp_path, monkeypatch):
    """Also after a held-out loss, for which the model leaves training."""
    plain, rates, orders = step.train_step, [], []

    def noted(model, optimizer, batch, *rest):
        assert model.training and {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
        rates.append([group["lr"] for group in optimizer.param_groups])
        orders.append(batch.visual[:, 0, 0].tolist())
        return plain(model, optimizer, batch, *rest)

    monkeypatch.setattr(loop, "train_step", noted)
    recipe = dataclasses.replace(RECIPE, epochs=2, milestones=(1,), temporal_lr=0.5, weight_decay=0.3)
    history = fit(teacher(), features(), recipe, tmp_path, held_out=features(4, seed=1), progress=False)
    assert [epoch["lr"] for epoch in history] == pytest.approx([1e-3, 1e-4])
    assert np.array(rates) == pytest.approx(np.array([[1e-3, 5e-4]] * 3 + [[1e-4, 5e-5]] * 3))
    first, second = (sum(orders[epoch : epoch + 3], []) for epoch in (0, 3))
    assert first != second and sorted(first) == sorted(second) == sorted(features().visual[:, 0, 0].tolist())


def test_every_step_of_every_seed_draws_numbers_of_its_own(tmp_path, monkeypatch):
    """Of dropout and of the order of videos."""
    plain, seeds, orders = step.train_step, [], []

    def noted(model, optimizer, batch, *rest):
        seeds.append(torch.initial_seed())
        orders.append(batch.visual[:, 0, 0].tolist())
        return plain(model, optimizer, batch, *rest)

    monkeypatch.setattr(loop, "train_step", noted)
    for seed in (1, 2):
        recipe = dataclasses.replace(RECIPE, epochs=2, seed=seed)
        fit(teacher(), features(), recipe, tmp_path / str(seed), progress=False)
    assert len(set(seeds)) == len(seeds) == 12 and orders[:6] != orders[6:]


def test_losses_that_are_told_are_means_over_videos(tmp_path):
    """Of weights that stay as they are; the last batch is smaller than the others, and nothing is dropped out."""
    torch.manual_seed(0)
    model, held_out = AVadCLIP(CLASSES, **SMALL, dropout=0.0), features(7, seed=1)
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=0.0, text_weight=0.5)
    (record,) = fit(model, features(), recipe, tmp_path, held_out=held_out, progress=False)

    def mean(data: FeatureSet, name: str) -> float:
        alone = [data.batch(torch.tensor([i])) for i in range(len(data))]
        return float(np.mean([objective(model, model(*b[:3]), b.labels, b.lengths)[name].item() for b in alone]))

    for name in ("mil", "align"):
        assert record[name] == pytest.approx(mean(features(), name), rel=1e-4)
    assert record["val"] == pytest.approx(mean(held_out, "mil") + mean(held_out, "align"), rel=1e-4)
    assert record["total"] == pytest.approx(record["mil"] + record["align"] + 0.5 * record["text"], rel=1e-5)


def test_the_losses_of_a_student_have_their_weights(tmp_path):
    torch.manual_seed(0)
    guide = teacher()
    recipe = dataclasses.replace(RECIPE, epochs=1, distill_weight=0.5, text_weight=0.25)
    (r,) = fit(AVadCLIPStudent.beside(guide), features(), recipe, tmp_path, teacher=guide, progress=False)
    assert r["total"] == pytest.approx(r["mil"] + r["align"] + 0.25 * r["text"] + 0.5 * r["distill"], rel=1e-4)


def test_a_student_has_a_calibration_of_its_own(tmp_path):
    """Neither its teacher's, nor one of the videos that it was trained on."""
    guide, held_out = teacher(), features(7, seed=1)
    student, recipe = AVadCLIPStudent.beside(guide), dataclasses.replace(RECIPE, epochs=1)
    fit(student, features(), recipe, tmp_path, teacher=guide, held_out=held_out, progress=False)
    assert Calibration.load(tmp_path) == calibrate(student, held_out, 5, "cpu")


def test_a_kill_while_a_run_is_calibrated_leaves_no_model_without_calibration(tmp_path, monkeypatch):
    """Whose alarms would begin at another threshold."""
    recipe, held_out = dataclasses.replace(RECIPE, epochs=1), features(7, seed=1)

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "calibrate", kill)
    with pytest.raises(KeyboardInterrupt):
        fit(teacher(), features(), recipe, tmp_path, held_out=held_out, progress=False)
    assert (tmp_path / STATE).exists() and not (tmp_path / MODEL).exists()


def test_a_held_out_loss_drops_nothing_out():
    model = AVadCLIP(CLASSES, **SMALL, dropout=0.5)
    first, again = (validation_loss(model.train(), features(4), 5, "cpu") for _ in range(2))
    assert first == again


def test_teacher_features_are_made_block_by_block_and_without_noise(tmp_path, monkeypatch):
    """By a teacher that comes as training left it."""
    recipe = dataclasses.replace(RECIPE, noise=0.5)

    def run(folder):
        guide = teacher()
        student = AVadCLIPStudent.beside(guide)
        history = fit(student, features(), recipe, folder, teacher=guide.train(), progress=False)
        assert not guide.training and not any(p.requires_grad for p in guide.parameters())
        return [epoch["distill"] for epoch in history]

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(teacher_cache, "CACHE_BLOCK", 5)
    assert run(tmp_path / "blocks") == pytest.approx(whole, rel=1e-4)
    monkeypatch.setattr(teacher_cache, "CACHE_LIMIT", 0)
    assert run(tmp_path / "disk") == pytest.approx(whole, rel=1e-4)
    kept = load_file(tmp_path / "disk" / teacher_cache.TEACHER_FEATURES)["features"]
    expected = teacher_features(teacher().eval(), features().batch(torch.arange(12)))
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", [(), ("cpu",)], ids=["as on a CPU", "as on a GPU"])
def test_teacher_features_have_the_precision_of_the_run(tmp_path, monkeypatch, lowering):
    monkeypatch.setattr(_autocast, "LOWERING", lowering)
    for module in (loop, teacher_cache):
        monkeypatch.setattr(module, "LOWERING", lowering)
    guide, plain, caches = teacher().eval(), teacher_cache.kept_features, []
    whole = features().batch(torch.arange(12))
    exact, expected = (teacher_features(guide, whole, precision) for precision in ("fp32", "bf16"))

    def noted(*args):
        found = plain(*args)
        caches.append(found[0])
        return found

    monkeypatch.setattr(train, "kept_features", noted)

    def run(folder, precision):
        recipe = dataclasses.replace(RECIPE, epochs=1, precision=precision)
        return fit(AVadCLIPStudent.beside(guide), features(), recipe, folder, teacher=guide, progress=False)

    for limit in (teacher_cache.CACHE_LIMIT, 0):
        monkeypatch.setattr(teacher_cache, "CACHE_LIMIT", limit)
        run(tmp_path / f"{limit}", "bf16")
        cache = caches.pop()
        assert cache.dtype == (torch.bfloat16 if lowering and limit else torch.float32)
        assert (cache.float() - expected.float()).norm() < 0.3 * (exact - expected.float()).norm()
    (tmp_path / "0" / STATE).unlink()
    sizes, choice = [], residency.decide

    def in_memory(size, mapped, *rest):
        sizes.append(size)
        return residency.Place("memory", "it fits") if mapped else choice(size, mapped, *rest)

    with monkeypatch.context() as patch:  # read from its file, they take the memory that was decided on
        patch.setattr(residency, "decide", in_memory)
        run(tmp_path / "0", "bf16")
    cache = caches.pop()
    assert cache.nbytes == sizes[-1] and cache.dtype == (torch.bfloat16 if lowering else torch.float32)
    (tmp_path / "0" / STATE).unlink()
    monkeypatch.setattr(step, "HAS_AMX", True)  # what tf32 needs on a CPU
    for other in ("fp32", "tf32"):
        with pytest.raises(StateError, match="another teacher, precision or data; remove it"):
            run(tmp_path / "0", other)
    run(tmp_path / "1", "tf32")
    (tmp_path / "1" / STATE).unlink()
    with pytest.raises(StateError, match="another teacher, precision or data; remove it"):
        run(tmp_path / "1", "fp32")


@pytest.mark.parametrize("padding", ["masked", "official"])
def test_distillation_uses_the_frozen_teacher(tmp_path, monkeypatch, padding):
    guide = teacher().eval()
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    recipe = Recipe(**{**vars(RECIPE), "distill_weight": 1e-2})

    def run(folder, **settings):
        torch.manual_seed(1)
        student = AVadCLIPStudent.beside(guide, padding=padding)
        return fit(student, features(), recipe, folder, teacher=guide, progress=False, **settings)

    cached = run(tmp_path / "cached")
    assert "distill" in cached[0]
    assert same(before, guide.state_dict())
    monkeypatch.setattr(teacher_cache, "CACHE_LIMIT", 0)
    assert run(tmp_path / "on disk") == cached
    kept = tmp_path / "on disk" / teacher_cache.TEACHER_FEATURES
    assert kept.exists() and not (tmp_path / "cached" / teacher_cache.TEACHER_FEATURES).exists()

    def forbidden(*args):
        raise AssertionError("the teacher's features are there, and computed again")

    (tmp_path / "again").mkdir()
    shutil.copy(kept, tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "teacher_features", forbidden)
        assert run(tmp_path / "again") == cached
    with torch.no_grad():
        guide.fusion.gate_proj[0].bias[0] += 1e-6
    (tmp_path / "stale").mkdir()
    shutil.copy(kept, tmp_path / "stale")
    with pytest.raises(StateError, match="another teacher, precision or data; remove it"):
        run(tmp_path / "stale")


@pytest.mark.parametrize("settings", [{"padding": "official"}, {"window": 8}, {"prompt": "paper"}])
def test_a_teacher_is_known_by_its_settings_too(tmp_path, monkeypatch, settings):
    """Of the same weights: neither is a run resumed with another one, nor are its features taken for the other's."""
    monkeypatch.setattr(teacher_cache, "CACHE_LIMIT", 0)
    other = AVadCLIP(CLASSES, **SMALL, **settings)
    other.load_state_dict(teacher().state_dict())
    teacher().save_pretrained(tmp_path / "saved")
    recipe = dataclasses.replace(RECIPE, epochs=1)

    def run(guide, **how):
        fit(AVadCLIPStudent.beside(guide), features(), recipe, tmp_path, teacher=guide, progress=False, **how)

    run(teacher())
    run(AVadCLIP.from_pretrained(tmp_path / "saved"), resume=True)
    with pytest.raises(StateError, match=r"other settings \(teacher\)"):
        run(other, resume=True)
    (tmp_path / STATE).unlink()
    with pytest.raises(StateError, match="another teacher, precision or data; remove it"):
        run(other)


def test_teacher_features_of_other_videos_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "CACHE_LIMIT", 0)
    guide, recipe = teacher(), dataclasses.replace(RECIPE, epochs=1)

    def run(videos):
        fit(AVadCLIPStudent.beside(guide), videos, recipe, tmp_path, teacher=guide, progress=False)

    run(features())
    (tmp_path / STATE).unlink()
    with pytest.raises(StateError, match="another teacher, precision or data; remove it"):
        run(features(seed=1))


def test_a_student_learns_from_a_teacher_that_takes_motion(tmp_path):
    """Both from the same features, twice as wide; features without motion are refused before a step."""
    torch.manual_seed(0)
    guide = AVadCLIP(CLASSES, **SMALL, motion=True, standardize=["visual"])
    plain = features()
    both = dataclasses.replace(plain, visual=torch.cat([plain.visual, plain.visual.abs()], -1))
    for modality in ("visual", "audio"):
        student = AVadCLIPStudent.beside(guide, modality=modality)
        student.fit_inputs(both.batches())
        recipe = dataclasses.replace(RECIPE, noise=0.5)
        history = fit(student, both, recipe, tmp_path / modality, teacher=guide, progress=False)
        assert np.isfinite(history[-1]["distill"])
    with pytest.raises(RecipeError, match="sight has 32 numbers a row; the model takes 64, with motion"):
        fit(guide, plain, RECIPE, tmp_path / "teacher", progress=False)
    with pytest.raises(RecipeError, match="sight has 64 numbers a row; the model takes 32, without motion"):
        fit(teacher(), both, RECIPE, tmp_path / "teacher", progress=False)


def test_cached_teacher_features_are_those_of_the_whole_model():
    guide, data = teacher().eval(), features()
    batch = data.batch(torch.arange(4))
    whole = guide(batch.visual, batch.audio, batch.lengths).features
    assert torch.equal(teacher_features(guide, batch), zero_padding(whole, batch.lengths))


def test_what_a_masked_teacher_says_of_padding_is_nothing():
    """A student whose padding is "official" is held to it, whatever else is in the batch."""
    guide, data = teacher().eval(), features()
    padding = torch.arange(16) >= data.lengths[:, None]
    for index in (torch.arange(12), torch.tensor([3]), torch.tensor([7, 3])):
        found = teacher_features(guide, data.batch(index))
        assert padding[index].any() and (found[padding[index]] == 0).all()


def test_an_official_teacher_has_its_padding():
    """It has a part in what the teacher says: nothing of it is cut or emptied, whatever the student's is."""
    torch.manual_seed(0)
    guide, data = AVadCLIP(CLASSES, **SMALL, padding="official").eval(), features()
    batch = data.batch(torch.tensor([i for i in range(12) if data.lengths[i] < 12]))
    assert len(batch.lengths) > 1
    assert trim(batch, teacher(), guide).visual.shape == trim(batch, guide).visual.shape == batch.visual.shape
    assert torch.equal(teacher_features(guide, batch), guide.fuse(batch.visual, batch.audio, batch.lengths))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_nothing_is_trimmed_in_a_run_where_one_of_the_two_is_official(tmp_path, monkeypatch, who):
    plain, rows = step.train_step, set()

    def noted(model, optimizer, batch, known, *rest):
        rows.update((batch.visual.shape[1], known.shape[1]))
        return plain(model, optimizer, batch, known, *rest)

    monkeypatch.setattr(loop, "train_step", noted)
    guide = AVadCLIP(CLASSES, **SMALL, padding="official" if who == "teacher" else "masked")
    student = AVadCLIPStudent.beside(guide, padding="official" if who == "student" else "masked")
    short = features().subset(torch.nonzero(features().lengths < 12).flatten())
    fit(student, short, dataclasses.replace(RECIPE, epochs=1), tmp_path, teacher=guide, progress=False)
    assert rows == {16}


def test_trimming_changes_nothing_in_masked_mode():
    guide, data = teacher().eval(), features()
    batch = data.batch(torch.arange(6))
    short = trim(batch, guide)
    assert short.visual.shape[1] == batch.lengths.max() < 17
    whole = guide(batch.visual, batch.audio, batch.lengths)
    cut = guide(short.visual, short.audio, short.lengths)
    for b, n in enumerate(batch.lengths):
        torch.testing.assert_close(whole.class_logits[b, :n], cut.class_logits[b, :n], rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    data = features()
    data.visual[3, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="no longer finite.*epoch 1"):
        fit(teacher(), data, RECIPE, tmp_path, progress=False)
    assert not (tmp_path / MODEL).exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Else no epoch would be better than the first."""
    held_out = features(5, seed=1)
    held_out.audio[2, 0, 0] = float("inf")
    recipe = dataclasses.replace(RECIPE, select="val")
    with pytest.raises(FloatingPointError, match=r"no longer finite \(val\) at epoch 1"):
        fit(teacher(), features(), recipe, tmp_path, held_out=held_out, progress=False)
    assert not (tmp_path / MODEL).exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The step after the last saved one goes wrong: its loss was that of the weights before."""
    plain, steps = step.train_step, 0

    def spoilt(model, *rest):
        nonlocal steps
        steps += 1
        found = plain(model, *rest)
        if steps == 2:
            model.mlp2.c_fc.weight.data[0, 0] = float("nan")
        return found

    monkeypatch.setattr(loop, "train_step", spoilt)
    with pytest.raises(FloatingPointError, match=r"\(weights\) at epoch 1, step 2"):
        fit(teacher(), features(), RECIPE, tmp_path, progress=False)
    assert all(x.isfinite().all() for x in load_file(tmp_path / STATE).values())


def test_what_a_kill_left_in_the_middle_of_a_write_is_removed(tmp_path):
    (tmp_path / MODEL).mkdir()
    old, model, new = (tmp_path / name for name in (".0123456789abcdef.tmp", "model/.0123456789abcdef.tmp", ".a.tmp"))
    fresh = tmp_path / ".fedcba9876543210.tmp"
    for path in (old, model, new, fresh):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    os.utime(fresh)  # another process may be writing it
    fit(teacher(), features(), dataclasses.replace(RECIPE, epochs=1), tmp_path, progress=False)
    assert not old.exists() and not model.exists() and new.exists() and fresh.exists()


def test_an_audio_student_hears_and_does_not_see(tmp_path):
    torch.manual_seed(0)
    student = AVadCLIPStudent(CLASSES, modality="audio", **SMALL)
    data = features()
    blind = FeatureSet(torch.full_like(data.visual, 7.0), data.audio, data.lengths, data.labels)
    first = fit(student, data, RECIPE, tmp_path / "a", progress=False)
    torch.manual_seed(0)
    student = AVadCLIPStudent(CLASSES, modality="audio", **SMALL)
    assert first == fit(student, blind, RECIPE, tmp_path / "b", progress=False)


def test_a_fingerprint_does_not_depend_on_threads():
    model, before = teacher(), torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(frozen_digest(model))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad)[0] += 1
    assert frozen_digest(model) not in found
