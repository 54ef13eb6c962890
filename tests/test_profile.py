"""Ranges: there when on, free of cost and effect when off; `profile` runs every case; traces are whole or absent."""

import json
import logging
import runpy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small_models import SIZES
from typer.testing import CliRunner

import avadclip_fast.cli.profile  # noqa: F401  adds its command
from avadclip_fast import AVadCLIP, AVadCLIPStudent, ops, profiling
from avadclip_fast.cli.commands import app
from avadclip_fast.data import DataError
from avadclip_fast.engine import profile
from avadclip_fast.engine.profile import BATCH, CLASSES, STEPS, Setting, T, make, names, run
from avadclip_fast.engine.recipe import RecipeError
from avadclip_fast.ops import _dispatch

CPU = torch.device("cpu")


def ranges(path) -> list[str]:
    """The names of the ranges in a Chrome trace, as they began."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [e for e in events if e.get("cat") == "user_annotation" and not e["name"].startswith("ProfilerStep")]
    return [e["name"] for e in sorted(found, key=lambda e: e["ts"])]


def recorded(function) -> list[str]:
    """The names of what torch's profiler sees of a call."""
    with torch.profiler.profile(activities=profiling.activities(), acc_events=True) as profile:
        function()
    return [event.name for event in profile.events()]


def pooled() -> torch.Tensor:
    scores = torch.randn(2, 20, 3, requires_grad=True)
    out = ops.topk_mean(scores, torch.tensor([20, 7]), backend="cpp")
    out.sum().backward()
    return scores.grad


cpp = pytest.mark.skipif(_dispatch.why_not("topk_mean", "cpp", torch.ones(1, 1, 1), None, 16) is not None, reason="C++")


@cpp
def test_an_op_and_its_backward_pass_have_ranges_when_on():
    with profiling.profiling():
        on = recorded(pooled)
    off = recorded(pooled)
    assert [name for name in on if ":" in name and "autograd" not in name and "::" not in name] == [
        "topk_mean:cpp",
        "topk_mean:cpp:backward",
    ]
    assert not any(name.startswith("topk_mean:") for name in off) and len(off) > 3


def test_a_plain_backward_pass_has_no_range():
    """Its last node is not the whole."""
    x = torch.randn(2, 20, 3, requires_grad=True)

    def call():
        ops.topk_mean(x, torch.tensor([20, 7]), backend="reference").sum().backward()

    with profiling.profiling():
        assert [name for name in recorded(call) if name.startswith("topk_mean:")] == ["topk_mean:reference"]


@cpp
def test_ranges_change_no_result():
    torch.manual_seed(0)
    off = pooled()
    torch.manual_seed(0)
    with profiling.profiling():
        assert torch.equal(pooled(), off)


def test_spans_nest_and_close():
    def call():
        with profiling.span("outer"), pytest.raises(ZeroDivisionError):
            with profiling.span("inner"):
                raise ZeroDivisionError

    with profiling.profiling():
        assert [name for name in recorded(call) if name in ("outer", "inner")] == ["outer", "inner"]
        with profiling.profiling(False):
            assert profiling.span("x") is profiling.span("y")  # nothing is made
        assert profiling.enabled
    assert not profiling.enabled


@pytest.mark.parametrize("on", [False, True])
def test_compiled_and_exported_code_has_no_ranges(on):
    class Module(torch.nn.Module):
        def forward(self, x):
            with profiling.span("part"):
                return ops.topk_mean(x, torch.tensor([20, 7]))

    x, module = torch.randn(2, 20, 3, requires_grad=True), Module()
    torch._dynamo.reset()
    with profiling.profiling(on):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))
        graph = torch.export.export(module, (x,)).graph
    assert not any("record_function" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_environment_turns_ranges_on(monkeypatch, value, on):
    monkeypatch.setenv("AVADCLIP_FAST_NVTX", value)
    assert runpy.run_path(profiling.__file__)["enabled"] is on


@cpp
def test_nvtx_ranges_are_pushed_and_popped(monkeypatch):
    calls = []
    monkeypatch.setattr(profiling, "_nvtx", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with profiling.profiling(), profiling.span("step"):
        pooled()
    assert calls == ["step", "topk_mean:cpp", "pop", "topk_mean:cpp:backward", "pop", "pop"]


# Traces of training


def test_a_trace_has_the_steps_asked_for(tmp_path):
    seen = []
    with profiling.trace(tmp_path / "new", steps=2, skip=3) as done:
        for i in range(8):
            with profiling.span(f"step {i}"):
                torch.ones(3).sum()
            done()
            seen.append((tmp_path / "new/trace.json").exists())
    assert seen == [False] * 4 + [True] * 4
    assert ranges(tmp_path / "new/trace.json") == ["step 3", "step 4"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace.json"]


def test_a_short_run_leaves_what_there_was(tmp_path, caplog):
    def run(steps):
        with profiling.trace(tmp_path, steps=5, skip=2) as done:
            for i in range(steps):
                with profiling.span(f"step {i}"):
                    torch.ones(3).sum()
                done()

    with caplog.at_level(logging.WARNING, "avadclip_fast"):
        run(1)
    assert "was not written" in caplog.text and not list(tmp_path.iterdir())
    run(3)
    assert ranges(tmp_path / "trace.json") == ["step 2"]
    assert caplog.text.count("was not written") == 1


def test_a_trace_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "trace.json").write_text("old")

    def fail(self, path):
        open(path, "w").close()
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    with pytest.raises(OSError, match="No space"), profiling.trace(tmp_path, steps=1, skip=1) as done:
        for _ in range(3):
            done()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trace.json", "old")]


def test_a_trace_wants_counts():
    for bad in ({"steps": 0}, {"skip": 0}):
        with pytest.raises(ValueError, match="above zero"), profiling.trace("nowhere", **bad):
            pass


# The command


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("op", _dispatch.TABLE)
def test_every_op_is_a_case(op, precision):
    """A call of it, with a gradient for every argument that learns."""
    with profiling.profiling():
        seen = recorded(make(op, Setting(CPU, precision, 1)))
    assert any(name.startswith(f"{op}:") for name in seen)
    learned = [x for x in profile._arguments(op, Setting(CPU, precision, 1)).values() if getattr(x, "requires_grad", 0)]
    assert {x.dtype for x in learned} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def test_cases_are_steps_and_ops():
    assert names() == [*STEPS, *_dispatch.TABLE] and set(STEPS) == {"train-teacher", "train-student", "distil", "infer"}
    assert BATCH["cuda"] == 96


def test_a_batch_of_any_size_has_every_length_and_class():
    setting = Setting(CPU, "fp32", 5000)
    lengths, labels = profile._lengths(setting), profile._labels(setting)
    assert (lengths.min(), lengths.max()) == (T // 4, T)
    assert labels.shape == (5000, len(CLASSES)) and (labels.sum(1) == 1).all() and labels.any(0).all()


def test_a_report_gives_the_mean_time_of_an_iteration(monkeypatch):
    """In milliseconds, without the warm-up, and of the same inputs in every call."""
    inputs, done, clock = [], [], iter([10.0, 16.0] * 2)

    def step(setting):
        inputs.append(float(torch.rand(())))
        return lambda: done.append(profiling.enabled)

    monkeypatch.setitem(STEPS, "infer", step)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for _ in range(2):
        report = run("infer", CPU, batch=2, warmup=2, iterations=3)
        assert report == "infer, batch 2, fp32 on cpu: 2000.000 ms an iteration"
    assert done == [False, False, True, True, True] * 2 and inputs[0] == inputs[1]


@pytest.fixture
def small(monkeypatch):
    """The cases of whole steps, in models that are made at once."""
    for model in (AVadCLIP, AVadCLIPStudent):
        monkeypatch.setattr(profile, model.__name__, partial(model, **SIZES))
    profile.AVadCLIPStudent.beside = AVadCLIPStudent.beside
    monkeypatch.setattr(profile, "D", SIZES["width"])
    monkeypatch.setattr(profile, "T", SIZES["length"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "kind"), [("train-teacher", AVadCLIP), ("train-student", AVadCLIPStudent), ("distil", AVadCLIPStudent)]
)
def test_a_step_of_training_is_that_of_the_command(case, kind, precision, small, monkeypatch):
    taken = []
    monkeypatch.setattr(profile, "train_step", lambda *given: taken.append(given))
    make(case, Setting(CPU, precision, 3))()
    ((model, _, batch, known, recipe),) = taken
    assert type(model) is kind and model.training and recipe.precision == precision
    assert (known is not None) == (case == "distil")
    padding = torch.arange(SIZES["length"]) >= batch.lengths[:, None]
    assert padding.any() and not batch.visual[padding].any() and not batch.audio[padding].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_is_that_of_an_evaluation(precision, small, monkeypatch):
    found = []

    def infer(model, *_, **__):
        found.append((model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    monkeypatch.setattr(AVadCLIPStudent, "infer", infer)
    make("infer", Setting(CPU, precision, 1))()
    assert found == [(False, False, precision == "bf16")]


def test_a_precision_that_a_processor_lacks_is_told(monkeypatch):
    monkeypatch.setattr("avadclip_fast.engine.step.HAS_AMX", False)
    with pytest.raises(RecipeError, match="tf32 needs a GPU"):
        run("topk_mean", CPU, "tf32")


def test_a_step_has_its_phases(tmp_path):
    path = tmp_path / "trace.json"
    command = ["profile", "distil", "--trace", str(path), "--batch", "1", "--iterations", "2", "--warmup", "0"]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--precision", "bf16"])
    assert result.exit_code == 0, result.output
    assert "distil, batch 1, bf16 on cpu" in result.output and "Self CPU" in result.output
    found = ranges(path)
    phases = [name for name in found if ":" not in name and "#" not in name]  # torch names its optimizers' calls
    assert phases == ["iteration", "forward", "losses", "backward", "optimizer"] * 2
    assert {"window_attention:reference", "linear_act:reference"} <= set(found)


def test_inference_runs_without_a_trace():
    result = CliRunner().invoke(app, "profile infer --batch 1 --iterations 1 --warmup 0 --device cpu".split())
    assert result.exit_code == 0 and "ms an iteration" in result.output and "Self CPU" not in result.output


def test_an_unknown_case_is_told_in_a_line():
    with pytest.raises(DataError, match="no case 'teacher'; there are train-teacher, .*window_attention") as raised:
        make("teacher", Setting(CPU, "fp32", 1))
    assert "\n" not in str(raised.value)


def test_a_step_has_the_memory_of_a_run(monkeypatch):
    """What `train` keeps between steps: else the trace is of pages that it does not clear."""
    kept = []
    monkeypatch.setattr("avadclip_fast.cli.commands.keep_memory", lambda: kept.append(True))
    call = ["profile", "topk_mean", "--device", "cpu", "--iterations", "1", "--warmup", "0"]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert kept == [True]


def test_a_trace_has_a_place_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    run("topk_mean", CPU, batch=1, warmup=0, iterations=1, trace=tmp_path / "new/trace.json")
    assert ranges(tmp_path / "new/trace.json")[0] == "iteration"
    monkeypatch.setattr("avadclip_fast.engine.profile._traced", lambda *_: pytest.fail("it ran"))
    with pytest.raises(DataError, match="new is a folder; give the name of a file"):
        run("topk_mean", CPU, batch=1, warmup=0, trace=tmp_path / "new")
    with pytest.raises(DataError, match="file: cannot be made"):
        run("topk_mean", CPU, batch=1, warmup=0, trace=tmp_path / "file/trace.json")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_lies_between_start_and_stop(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    push = torch.cuda.nvtx.range_push
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: (calls.append(name), push(name))[1])
    result = CliRunner().invoke(app, "profile infer --batch 2 --iterations 2 --warmup 1".split())
    assert result.exit_code == 0, result.output
    assert calls[0] == "start" and calls[-1] == "stop" and calls.count("forward") == calls.count("iteration") == 2
