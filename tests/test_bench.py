"""The benchmarks' own machinery: nothing wrong is timed, ratios are of one round, a stage that fails does not hide."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_models
import torch
from torch import Tensor

from avadclip_fast import ops
from avadclip_fast.data import FeatureSet
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.ops import _dispatch
from bench import bench_spans, bench_step, bench_training, compare, gpu, harness, operations, plots
from bench.harness import Bench, Work

FOREVER = "import time; time.sleep(60)"


def bench(**alternatives) -> Bench:
    def make() -> tuple:
        return (torch.randn(3, 4, requires_grad=True),)

    return Bench("[3, 4]", make, {"reference": lambda x: x.exp(), **alternatives}, Work(96), Work(144, 12))


def timed(*cases: Bench, rounds: int = 2) -> list[dict]:
    return [row for rows in harness.run(lambda dtype: cases, torch.float32, "cpu", rounds) for row in rows]


def test_a_row_an_alternative_and_ours_is_the_last():
    rows = timed(bench(ours=lambda x: torch.exp(x)), rounds=3)
    assert [row["alternative"] for row in rows] == ["reference", "ours"]
    assert rows[1]["over_ours"] == 1 and rows[0]["case"] == "f+b [3, 4]"
    assert rows[0]["bytes"] == 144 and rows[0]["flops"] == 12
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows)


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x.exp() * 1.001, lambda x: x.exp() + (x - x.detach()), lambda x: x.exp() * float("nan")],
    ids=["result", "gradient", "nan"],
)
def test_what_is_wrong_is_not_timed(wrong):
    with pytest.raises(AssertionError, match=r"\[3, 4\], ours: (result|gradient 1)"):
        timed(bench(ours=wrong))


class Wrong(torch.autograd.Function):
    """x·|x|, with something done to the result, or to its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, spoil, backward: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spoil = spoil if backward else None
        return x * x.abs() if backward else spoil(x * x.abs())

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        grad = 2 * x.abs() * grad
        return (grad if ctx.spoil is None else ctx.spoil(grad)), None, None


def zeroed(at: tuple):
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[at] = 0
        return x

    return spoil


@pytest.mark.parametrize("backward", [False, True], ids=["result", "gradient"])
@pytest.mark.parametrize(
    "spoil",
    [lambda x: x * 1.05, zeroed((..., 100)), zeroed((slice(None), 100))],
    ids=["5 %", "a channel of 512", "a row of 256"],
)
def test_what_is_wrong_in_bfloat16_is_not_timed(spoil, backward):
    def bench(ours) -> Bench:
        def make() -> tuple:
            return (torch.randn(2, 256, 512, dtype=torch.bfloat16, requires_grad=True),)

        return Bench("x", make, {"reference": lambda x: x * x.abs(), "ours": ours}, Work(0), Work(0))

    torch.manual_seed(0)
    right = bench(lambda x: Wrong.apply(x, lambda x: x, backward))
    harness.check(right, right.make())
    wrong = bench(lambda x: Wrong.apply(x, spoil, backward))
    with pytest.raises(AssertionError, match="x, ours: gradient 1" if backward else "x, ours: result"):
        harness.check(wrong, wrong.make())


@pytest.mark.parametrize("op", [op for op in compare.ops() if op not in ("folds", "linear_act", "gated_fusion")])
def test_what_is_right_in_bfloat16_is_timed(op, monkeypatch):
    """The ops' own kernels for a processor, and the authors' code, which is held to it in float32."""
    module = import_module(f"bench.bench_{op}")
    for name in {"BATCH", "SHAPES"} & vars(module).keys():
        monkeypatch.setattr(module, name, {"BATCH": 2, "SHAPES": ((2, 256), (1, 512))}[name])
    torch.manual_seed(0)
    for case in module.cases(torch.bfloat16):
        harness.check(case.only(name for name in case.alternatives if name != "numpy"), case.make())


def test_the_json_is_there_after_every_case(tmp_path, monkeypatch):
    def rows_of(options):
        yield from harness.run(lambda dtype: [bench(ours=torch.exp)], torch.float32, "cpu", options.rounds)
        found.append(json.loads(path.read_text()))
        yield harness.compare("second", {"ours": [1.0]}, "ours")

    found, path = [], tmp_path / "bench_two.json"
    monkeypatch.setattr(sys, "argv", ["bench_two", "--rounds", "2", "--json", str(tmp_path)])
    harness.command("bench_two", rows_of)
    (first,), whole = found, json.loads(path.read_text())
    assert first == whole | {"cut": True, "rows": whole["rows"][:2]} and "cut" not in whole
    assert whole["rows"][2] == {
        "case": "second", "alternative": "ours", "median_ms": 1e3, "p20_ms": 1e3, "p80_ms": 1e3, "over_ours": 1.0,
        "rounds": 1,
    }  # fmt: skip
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((gpu.ROOT / "bench/schema.json").read_text())
    on_gpu = {"clock": "host", "call_ms": 1.0, "in_cache": True}
    for record in (first, whole, whole | {"rows": [row | on_gpu for row in whole["rows"]]}):
        jsonschema.validate(record, schema)


@pytest.mark.parametrize("device, folder", [("cpu", "."), ("cuda", "gpu")])
def test_a_gpus_json_does_not_replace_that_of_a_processor(tmp_path, monkeypatch, device, folder):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "setting", lambda name, options: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["bench_two", "--device", device, "--json"])
    harness.command("bench_two", lambda options: [harness.compare("x", {"ours": [1.0]}, "ours")])
    assert [path.parent for path in tmp_path.rglob("*.json")] == [tmp_path / folder]


def test_what_waits_is_compared_by_the_hosts_clock(monkeypatch):
    """Both clocks count calls here: a graph's says 1, and the host's 10, or for the authors' loops 40."""
    monkeypatch.setattr(harness, "graph_timer", lambda calls: lambda: 1.0)
    monkeypatch.setattr(harness, "host_timer", lambda call: lambda: call())
    case = bench(loops=None, ours=None)
    calls = {"reference": [lambda: 10.0], "loops": [lambda: 40.0], "ours": [lambda: 10.0]}
    rows = harness.on_both_clocks("x", calls, case, rounds=2)
    told = [(row["alternative"], row["median_ms"], row["over_ours"], row["clock"], row["call_ms"]) for row in rows]
    assert told == [
        ("reference", 1e3, 1.0, "graph", 10e3), ("loops", 40e3, 4.0, "host", 40e3), ("ours", 1e3, 1.0, "graph", 10e3)
    ]  # fmt: skip
    roofs = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1e9}
    floors = harness.with_floor(rows, Work(0.5), roofs, in_cache=False)
    assert [row.get("of_floor") for row in floors] == [0.5, None, 0.5]
    assert not any("of_floor" in row for row in harness.with_floor(rows, Work(0.5), roofs, in_cache=True))


def test_inputs_are_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(harness, "cache_size", lambda: 1000)
    case = bench()  # of 48 bytes
    assert 2 * 1000 < harness.size_of(harness.input_sets(case)) <= 2 * 1000 + 48
    monkeypatch.setattr(harness, "MOST_SETS", 5)
    assert len(harness.input_sets(case)) == 5
    monkeypatch.setattr(harness, "cache_size", lambda: 10)
    assert len(harness.input_sets(case)) == 1


def test_ours_is_the_backend_that_users_get(monkeypatch):
    """Not one that could serve the call, and leaves it to another."""
    op, x = "topk_mean", (torch.randn(2, 5, 3), torch.tensor([5, 2]))
    alone = {name: _dispatch.TABLE[op][name] for name in ("cpp", "reference")}
    monkeypatch.setitem(_dispatch.TABLE, op, alone)
    assert list(harness.served(op, ops.topk_mean, x)) == ["reference", "cpp"]
    alone["cpp"] = dataclasses.replace(alone["cpp"], declines=lambda *_, **__: "the reference is faster")
    assert list(harness.served(op, ops.topk_mean, x)) == ["cpp", "reference"]


def test_ranges_are_timed_on_off_and_left_out(monkeypatch):
    monkeypatch.setattr(bench_spans, "CALLS", 2)
    found = list(bench_spans.run(SimpleNamespace(device="cpu", rounds=2)))
    assert len(found) > 1 and all([row["alternative"] for row in rows] == list(bench_spans.WAYS) for rows in found)


def test_ratios_are_taken_within_a_round():
    slow = iter([9, 1.0, 10.0, 100.0])  # the first does not count
    fast = iter([9, 0.5, 5.0, 50.0])
    times = harness.measure({"a": lambda: next(slow), "b": lambda: next(fast)}, rounds=3)
    rows = harness.compare("case", times, "b")
    assert [row["over_ours"] for row in rows] == [2.0, 1.0] and rows[0]["median_ms"] == 10e3


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    """Benches make the cases of a GPU, small ones, on the processor; of torch.compile there is the tracing alone."""
    compile_, backends = torch.compile, {mode: lambda graph, _: graph.forward for mode in harness.MODES.values()}
    monkeypatch.setattr(harness, "on_gpu", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile_(f, backend=backends[mode], **options))
    for op in compare.ops():
        module = import_module(f"bench.bench_{op}")
        small = {"BATCH": 3, "ROWS": 64, "T": 16, "D": 32, "SHAPES": ((3, 32), (2, 48))}
        if op in ("linear_act", "gated_fusion"):
            small |= {"ROWS": 4, "DIM": 32}
        for name in small.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, small[name])


NOT_COMPILED = ("folds", "pack_rows")  # one compares calls of ops; how many rows the other's mask picks is not known


@pytest.mark.parametrize("op", compare.ops())
def test_torch_compile_by_default_and_tuned_is_beside_every_op(as_on_gpu, op):
    found = []
    for case, (inputs,) in harness.prepared(import_module(f"bench.bench_{op}").cases, torch.float32, "cpu"):
        assert case.ours in (*_dispatch.ORDER, "folded")
        for function in case.alternatives.values():
            harness.forward(function, inputs, ())()  # in training and without, every case is compiled anew
        found.append([name for name in case.alternatives if name in harness.MODES])
    if op in NOT_COMPILED:
        assert not any(found)
    else:
        assert all("torch.compile" in names for names in found) and list(harness.MODES) in found


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--threads", "0"], "--threads: 1 at least"),
        (["--dtype", "float16"], "--dtype: bench_two takes float32 or"),
        (["--device", "cuda"], "--device cuda: no GPU here that torch can use"),
    ],
)
def test_what_a_bench_does_not_take_is_refused(monkeypatch, capsys, options, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_two", *options])
    with pytest.raises(SystemExit, match="^2$"):
        harness.command("bench_two", lambda options: pytest.fail("it ran"), dtypes=("float32", "bfloat16"))
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooling_is_timed_in_every_dtype(dtype):
    cases = harness.prepared(import_module("bench.bench_uniform_pool").cases, dtype, "cpu")
    assert ("numpy" in next(cases)[0].alternatives) == (dtype != torch.bfloat16)


def test_both_passes_of_a_graph_read_and_write_all_of_it_once(as_on_gpu):
    """Of full videos: inputs, result, its gradient, inputs once more, their gradients."""
    *_, full = import_module("bench.bench_similarity_graph").cases(torch.float32)
    inputs = full.make()
    given = sum(x.nbytes for x in harness.leaves(inputs))
    result = harness.first(full.alternatives["reference"](*inputs))
    assert full.both.bytes == 3 * given + 2 * result.nbytes


def test_no_case_is_compiled_when_the_time_is_up(as_on_gpu, monkeypatch, capsys):
    monkeypatch.setattr(harness, "COMPILING", -1)
    (rows,) = harness.run(import_module("bench.bench_attention_pool").cases, torch.float32, "cpu", rounds=2)
    assert [row["alternative"] for row in rows] == ["official", "reference"]
    assert "without torch.compile" in capsys.readouterr().out
    assert not list(harness.drawn(import_module("bench.bench_attention_pool").cases, torch.float32, "cpu", "only"))


@pytest.mark.parametrize("compile", ["with", "only", "ahead"])
def test_what_cannot_be_compiled_is_left_out_and_told(capsys, compile):
    def fails(x):
        raise RuntimeError("out of resources: shared memory\nat length")

    def cases(dtype):
        same = {"reference": lambda x: x * 2, "FlexAttention": fails, "torch.compile": lambda x: 2 * x}
        same["ours"] = lambda x: x + x
        yield harness.Bench("twice", lambda: (torch.rand(8, dtype=dtype),), same, harness.Work(64))

    rows = [row for rows in harness.run(cases, torch.float32, "cpu", 2, compile) for row in rows]
    told = capsys.readouterr().out
    assert "twice, FlexAttention: left out, RuntimeError: out of resources: shared memory\n" in told
    assert "twice, torch.compile: compiled in" in told
    assert [row["alternative"] for row in rows] == (
        [] if compile == "ahead" else ["reference", "torch.compile", "ours"]
    )


def test_torch_compile_is_left_out(as_on_gpu):
    ((case, _),) = harness.drawn(import_module("bench.bench_attention_pool").cases, torch.float32, "cpu", "without")
    assert not harness.MODES.keys() & case.alternatives.keys()


def test_a_case_that_fails_does_not_cost_the_others(capsys):
    cases, found = [bench(ours=lambda x: x), bench(ours=torch.exp)], []
    with pytest.raises(AssertionError, match="ours: result"):
        found.extend(harness.run(lambda dtype: cases, torch.float32, "cpu", 2))
    assert "Traceback" in capsys.readouterr().err and len(found) == 1


def test_stages_end_and_are_told(tmp_path):
    python = sys.executable
    (tmp_path / "work").mkdir()
    (tmp_path / "work/earlier.log").touch()
    record = gpu.run(
        [
            gpu.Stage("good", [python, "-c", "print('hello')"], 30),
            gpu.Stage("bad", [python, "-c", "raise SystemExit(3)"], 30),
            gpu.Stage("endless", [python, "-c", FOREVER], 0.5),
            gpu.Stage("absent", None, 30, "no such tool"),
            gpu.Stage("after", [python, "-c", ""], 30),
        ],
        tmp_path / "out",
        work=tmp_path / "work",
    )
    assert [outcome["result"].split(",")[0] for outcome in record.values()] == [
        "ok",
        "failed (3)",
        "stopped after 0 s",
        "left out: no such tool",
        "ok",
    ]
    assert json.loads((tmp_path / "out/gpu.json").read_text()) == record
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.tar.gz"]
    with tarfile.open(tmp_path / "out/gpu.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["after.log", "bad.log", "endless.log", "good.log", "gpu.json"]
        assert tar.extractfile("good.log").read() == b"hello\n"
        assert json.load(tar.extractfile("gpu.json")) == record


def test_what_was_tuned_is_brought_as_well(tmp_path):
    gpu.run([gpu.Stage("tune", [sys.executable, "-c", ""], 30)], tmp_path / "out", work=tmp_path / "work")
    with tarfile.open(tmp_path / "out/gpu.tar.gz") as tar:
        assert "configs/linear_act.json" in tar.getnames()


@pytest.fixture
def seems_a_gpu(monkeypatch) -> None:
    """What bench.gpu asks before it runs its stages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")


@pytest.mark.parametrize("tune", [False, True])
def test_benchmarks_alone_are_tuned_first_if_asked(tmp_path, monkeypatch, seems_a_gpu, tune):
    asked: list[str] = []
    monkeypatch.setattr(gpu, "run", lambda stages, _, total: asked.extend([*(s.name for s in stages), total]) or {})
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--bench", *["--tune"] * tune])
    with pytest.raises(SystemExit, match="^0$"):
        gpu.main()
    assert asked[: 3 + tune] == ["env", "kernels", *["tune"] * tune, "bench_step"]
    assert asked[-1] == gpu.TOTAL + 300 * tune


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *((["--seconds", seconds], "--seconds: above 0") for seconds in ("0", "-3", "nan")),
        (["--out", str(gpu.WORK / "out")], "is emptied, choose another folder"),
        (["--stages", "bnech_*"], "--stages: none of build, env,"),
    ],
)
def test_no_time_no_stage_and_no_lasting_folder_are_refused(tmp_path, monkeypatch, seems_a_gpu, capsys, given, told):
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit, match="^2$"):
        gpu.main()
    assert told in capsys.readouterr().err


def test_no_gpu_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main()


def test_what_did_not_end_well_is_told_by_the_exit_status(tmp_path, monkeypatch, seems_a_gpu):
    results = {"a": "ok", "b": "left out: none", "c": "stopped after 3 s, see c.log", "d": "no time left"}
    results |= {"ahead_0": "stopped after 3 s", "a_compiled": "no time left", "b_compiled": "failed (1)"}
    monkeypatch.setattr(gpu, "run", lambda *_: {name: {"result": result} for name, result in results.items()})
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^not well: c, d, b_compiled$"):
        gpu.main()


def test_nothing_starts_when_the_time_is_up(tmp_path):
    late = gpu.Stage("late", [sys.executable, "-c", ""], 30)
    record = gpu.run([late], tmp_path / "out", total=0, work=tmp_path / "work")
    assert record["late"]["result"] == "no time left"


def running(process: int) -> bool:
    """Not so of one that has ended, and whom nobody has asked for its status yet."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes run")
@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit()"], ids=["stopped", "ended"])
def test_a_stage_ends_with_all_that_it_has_started(tmp_path, end):
    start = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {FOREVER!r}]).pid); {end}"
    with gpu.started(gpu.Stage("parent", [sys.executable, "-c", start], 4), 4, tmp_path / "log") as outcome:
        told = outcome()["result"]
    assert told == ("ok" if end == "sys.exit()" else "stopped after 4 s, see log")
    child = int((tmp_path / "log").read_text().split()[0])
    for _ in range(100):
        if not running(child):
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("what the stage had started runs on")


def test_stages_that_are_not_timed_run_side_by_side(tmp_path):
    """Each ends only once the other is there."""

    def meeting(own: str, other: str) -> list[str]:
        come = f"import time, pathlib as p; p.Path({own!r}).touch()"
        wait = f"while not p.Path({other!r}).exists(): time.sleep(0.01)"
        return [sys.executable, "-c", f"{come}\n{wait}"]

    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    stages = [gpu.Stage("first", meeting(a, b), 30, group="x"), gpu.Stage("second", meeting(b, a), 30, group="x")]
    record = gpu.run(stages, tmp_path / "out", work=tmp_path / "work")
    assert [outcome["result"] for outcome in record.values()] == ["ok", "ok"]
    alone = [stage for stage in gpu.stages(tmp_path, tune=True) if stage.name in ("build", "tests", "bench_step")]
    assert [len(group) for group in gpu.together(alone)] == [1, 1, 1]


def test_a_stage_side_by_side_has_its_own_time_and_limit(tmp_path):
    slow, quick, long = ([sys.executable, "-c", f"import time; time.sleep({seconds})"] for seconds in (5, 0, 60))
    stages = [gpu.Stage("slow", slow, 60, group="x"), gpu.Stage("quick", quick, 60, group="x")]
    stages.append(gpu.Stage("long", long, 2, group="x"))
    record = gpu.run(stages, tmp_path / "out", work=tmp_path / "work")
    assert record["quick"]["seconds"] < 4 < record["slow"]["seconds"] and record["quick"]["result"] == "ok"
    assert record["long"] == {"result": "stopped after 2 s, see long.log", "seconds": record["long"]["seconds"]}
    assert record["long"]["seconds"] < 4


def test_stages_end_with_the_run(tmp_path):
    """Which a signal ends while it waits for them, as in main."""

    def stop(*_) -> None:
        raise SystemExit("stopped")

    stages = [gpu.Stage(name, [sys.executable, "-c", FOREVER], 60, group="x") for name in ("a", "b")]
    before = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(SystemExit, match="stopped"):
            gpu.run(stages, tmp_path / "out", work=tmp_path / "work")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 20


def test_operations_share_a_process(monkeypatch, capsys):
    """One that fails stops none; what follows -- is theirs."""
    ran = []

    def module(name, run_name):
        ran.append((name, run_name, sys.argv))
        if name == "bench.bench_two":
            raise ValueError("no such case")

    monkeypatch.setattr(operations.runpy, "run_module", module)
    monkeypatch.setattr(sys, "argv", ["operations", "one", "two", "three", "--", "--rounds", "3"])
    with pytest.raises(SystemExit, match="not well: two"):
        operations.main()
    expected = [
        (f"bench.bench_{name}", "__main__", [f"bench_{name}", "--rounds", "3"]) for name in ("one", "two", "three")
    ]
    assert ran == expected and "no such case" in capsys.readouterr().err


def test_nothing_is_measured_of_what_is_not_built(tmp_path):
    broken = gpu.Stage("build", [sys.executable, "-c", "raise SystemExit(1)"], 30)
    later = gpu.Stage("bench_step", [sys.executable, "-c", ""], 30)
    record = gpu.run([broken, later], tmp_path / "out", work=tmp_path / "work")
    assert record["bench_step"]["result"] == "left out: the build failed"


def test_every_stage_is_there(tmp_path):
    stages = gpu.stages(tmp_path, tune=True)
    for stage in stages:
        name = stage.name.removesuffix(gpu.COMPILED)
        if name.startswith("bench_") and name != "bench_operations":
            assert (gpu.ROOT / f"bench/{name}.py").exists()
    commands = {stage.name: stage.command for stage in stages}
    assert commands["env"][-2:] == ["avadclip_fast", "env"]  # what the records are of
    for name in ("step", "inference"):  # long ones
        assert "--rounds 3" in " ".join(commands[f"bench_{name}"])
    names = {stage.name for stage in stages} | {f"bench_{name}" for name in gpu.OPERATIONS}
    assert {path.stem for path in (gpu.ROOT / "bench").glob("bench_*.py")} <= names
    assert commands["bench_operations"][3:].index("--") == len(gpu.OPERATIONS)
    ahead = [commands[f"ahead_{part}"][3:] for part in range(gpu.AHEAD)]
    compiled = {name for command in ahead for name in command[: command.index("--")]}
    assert compiled == {*gpu.OPERATIONS} - {*gpu.NOT_COMPILED}


@pytest.mark.parametrize("records", [True, False])
def test_a_gpus_steps_in_bfloat16(monkeypatch, capsys, records):
    """Which stand beside which; of a small model on the processor, where nothing is recorded or compiled."""
    fails = iter([False, not records, False])

    class Graph:
        def __init__(self, function, changed):
            self.function, self.changed = function, changed

        def record(self) -> None:
            if next(fails):
                raise RuntimeError("operation not permitted\nwhen stream is capturing")

        def __call__(self) -> Tensor:
            return self.function()

    monkeypatch.setattr(bench_step, "StepGraph", Graph)
    monkeypatch.setattr(bench_step, "launches", lambda step: {"kernels": 1})
    monkeypatch.setattr(bench_step, "peak_memory", lambda step: 1)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    model = small_models.teacher(padding="official")
    visual, audio, labels, lengths = small_models.batch([24, 7], 24)
    sample = (visual, audio), labels, lengths
    plain = bench_step.in_bfloat16(2, "teacher", model, sample, None)
    assert [row["alternative"] for row in plain] == ["reference, no graph", "ours, no graph", "ours"]
    beside = bench_step.beside_compiled(2, "teacher", model, sample, None)
    assert [row["alternative"] for row in beside] == ["torch.compile" + ", no graph" * (not records), "ours"]
    assert all(row["over_ours"] == 1 for row in (plain[-1], beside[-1]))
    assert plain[0]["case"] != beside[0]["case"] and {"kernels", "memory_bytes"} <= beside[0].keys()
    told = "without a graph: operation not permitted\n"
    assert capsys.readouterr().out.endswith(told) != records


def test_ranges_are_no_kernels(monkeypatch):
    kinds = torch.autograd.DeviceType
    events = [
        SimpleNamespace(name="kernel", device_type=kinds.CUDA, is_user_annotation=False),
        SimpleNamespace(name="Optimizer.step#AdamW.step", device_type=kinds.CUDA, is_user_annotation=True),
        SimpleNamespace(name="cudaDeviceSynchronize", device_type=kinds.CPU, is_user_annotation=False),
    ]
    profile = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench_step.launches(lambda: None) == {"kernels": 1, "waits": 1}


def test_epochs_are_timed_until_the_time_is_up(monkeypatch, capsys):
    model, recipe = small_models.teacher(length=16), Recipe(epochs=3, batch_size=4, select="test")
    visual, audio, labels, lengths = small_models.batch([16, 7, 3, 5], 16)
    features, device = FeatureSet(visual, audio, lengths, labels, checksum="x"), torch.device("cpu")
    assert len(bench_training.epochs(model, features, recipe, None, device)) == 3
    monkeypatch.setattr(bench_training, "SECONDS", -1)
    assert len(bench_training.epochs(model, features, recipe, None, device)) == 1
    assert "1 of 3 epochs were timed" in capsys.readouterr().out


def test_slower_is_what_exceeds_the_limit_and_the_spread():
    steady = [1.0, 1.01, 0.99, 1.0, 1.0]
    assert not compare.verdict("same", steady, steady)["slower"]
    assert compare.verdict("slower", steady, [1.1 * x for x in steady])["slower"]
    assert not compare.verdict("a little", steady, [1.04 * x for x in steady])["slower"]
    assert not compare.verdict("faster", [1.1 * x for x in steady], steady)["slower"]
    noisy = [0.6, 1.5, 1.1, 0.9, 1.4]
    assert not compare.verdict("noise", noisy, [1.1 * x for x in noisy])["slower"]
    spread = {"median_ms": 1000.0, "p20_ms": 998.0, "p80_ms": 1002.0}
    assert compare.verdict("same", steady, steady)["head"] == pytest.approx(spread)
    assert compare.verdict("an outlier", [1.0] * 5, [1.0, 1.0, 9.0, 1.0, 1.0])["ratio"] == 1


def test_the_versions_take_turns_at_going_first(monkeypatch):
    asked = []

    class Worker(contextlib.nullcontext):
        cases = ["x"]

        def __init__(self, op, folder, device, side):
            super().__init__(self)
            self.folder = folder

        def measure(self, case: int) -> float:
            asked.append(self.folder)
            return 1.0

    monkeypatch.setattr(compare, "Worker", Worker)
    compare.compare("x", "base", "head", "cpu", 4)
    assert asked == ["head", "base", "base", "head"] * 2
    monkeypatch.setattr(Worker, "cases", property(lambda worker: [worker.folder]))
    with pytest.raises(SystemExit, match="x: the versions serve different cases: .*base.* and .*head"):
        compare.compare("x", "base", "head", "cpu", 4)


def test_a_comparison_is_written_where_it_is_asked_for(monkeypatch, tmp_path):
    rows = [compare.verdict("x: case", [1.0] * 3, [1.0] * 3)]
    monkeypatch.setattr(compare, "compare", lambda *_: rows)
    asked = ["compare", str(gpu.ROOT), str(gpu.ROOT), "--op", "uniform_pool", "--json"]
    monkeypatch.setattr(sys, "argv", [*asked, str(tmp_path / "new/compare.json")])
    compare.main()
    assert json.loads((tmp_path / "new/compare.json").read_text())["rows"] == rows
    monkeypatch.setattr(compare, "compare", lambda op, *_: sys.exit("it died") if op == "mil_loss" else rows)
    monkeypatch.setattr(sys, "argv", [*asked, str(tmp_path / "cut.json"), "--op", "mil_loss"])
    with pytest.raises(SystemExit, match="it died"):
        compare.main()
    assert json.loads((tmp_path / "cut.json").read_text())["rows"] == rows, "what was measured before is kept"
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(sys, "argv", [*asked, str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        compare.main()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--device", "cuda"], "--device cuda: no GPU here that torch can use"),
        (["--rounds", "2"], "--rounds: a spread wants 3 at least"),
    ],
)
def test_a_comparison_on_a_gpu_wants_one_and_a_spread_some_rounds(monkeypatch, capsys, given, told):
    """Before versions are built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compare, "built", lambda _: pytest.fail("it was built"))
    monkeypatch.setattr(sys, "argv", ["compare", "main", *given])
    with pytest.raises(SystemExit, match="^2$"):
        compare.main()
    assert told in capsys.readouterr().err


def test_a_new_op_has_nothing_to_be_compared_with(monkeypatch, tmp_path, capsys):
    """Nor does it keep others from being compared."""
    (tmp_path / "avadclip_fast/ops").mkdir(parents=True)
    for name in ("__init__.py", "ops/topk_mean.py"):
        (tmp_path / "avadclip_fast" / name).touch()
    asked: list[str] = []
    monkeypatch.setattr(compare, "compare", lambda op, *_: asked.append(op) or [])
    ops = ["--op", "uniform_pool", "--op", "topk_mean", "--op", "folds"]
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), *ops])
    compare.main()
    assert asked == ["topk_mean", "folds"]
    assert f"uniform_pool is new: {tmp_path} has none to compare with\n" in capsys.readouterr().out


def test_a_folder_that_is_no_version_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="a folder without avadclip_fast"), compare.built(str(tmp_path)):
        pass


def test_a_revision_that_cannot_be_built_is_told_and_leaves_no_worktree(monkeypatch):
    ran = []

    def run(command):
        ran.append(next(word for word in ("add", "pip", "remove") if word in command))
        return SimpleNamespace(returncode=int(ran[-1] == "pip"))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="v1 cannot be built"), compare.built("v1"):
        pass
    assert ran == ["add", "pip", "remove"]


def test_a_version_that_says_nothing_is_told(monkeypatch, tmp_path):
    (tmp_path / "avadclip_fast").mkdir()
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: popen([sys.executable, "-S", "-c", ""], **how))
    worker = compare.Worker("uniform_pool", tmp_path, "cpu", "head")
    with pytest.raises(SystemExit, match="^uniform_pool: the head could not be measured"):
        worker.__enter__()
    worker.__exit__()


@pytest.mark.parametrize("kernels", ["kernels", "avadclip_fast/kernels"])  # of a checkout, and where it is installed
def test_a_version_brings_its_own_kernels(monkeypatch, tmp_path, kernels):
    (tmp_path / "avadclip_fast").mkdir()
    (tmp_path / kernels).mkdir()
    for package, name in (("avadclip_fast", "library"), (kernels, "kernels")):
        (tmp_path / package / "__init__.py").write_text(f"name = {name!r}")
    told = "import avadclip_fast, avadclip_fast.kernels; print(avadclip_fast.name, avadclip_fast.kernels.name)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: popen([sys.executable, "-c", told], **how))
    worker = compare.Worker("uniform_pool", tmp_path, "cpu", "head")
    assert worker.process.communicate()[0] == "library kernels\n"
    worker.__exit__()


def test_two_versions_take_turns(monkeypatch, capsys, tmp_path):
    """A copy of this tree whose uniform_pool does its work forty times over is told from it."""
    slow = tmp_path / "slow"
    shutil.copytree(compare.ROOT / "avadclip_fast", slow / "avadclip_fast", ignore=shutil.ignore_patterns("*.pyc"))
    ops = slow / "avadclip_fast/ops/uniform_pool.py"
    text = ops.read_text()
    begins = "def uniform_pool("
    assert begins in text
    ops.write_text(
        text.replace(begins, "def _once(")
        + "\n\ndef uniform_pool(*args, **kwargs):\n    return [_once(*args, **kwargs) for _ in range(40)][0]\n"
    )
    monkeypatch.setattr(sys, "argv", ["compare", str(compare.ROOT), str(slow), "--op", "uniform_pool", "--rounds", "5"])
    with pytest.raises(SystemExit, match="of 3 cases are slower"):
        compare.main()
    assert "uniform_pool: 300 -> 256" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare", "no-such-revision", "--op", "uniform_pool"])
    with pytest.raises(SystemExit, match="neither a folder nor a revision"):
        compare.main()


def test_plots_of_timings(tmp_path):
    rows = timed(bench(ours=lambda x: torch.exp(x)), rounds=3)
    plots.ratios(tmp_path / "ratios.png", rows)
    with pytest.raises(ValueError, match="measured on a GPU"):
        plots.roofline(tmp_path / "roofline.png", [{"bench": "bench_exp", "rows": rows}])
    roofs = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
    timed_there = [row | {"roofs": roofs} for row in rows]
    uncounted = [row | {"bytes": 0} for row in timed_there]  # as those of bench_folds
    records = [{"bench": "bench_exp", "rows": timed_there}, {"bench": "bench_folds", "rows": uncounted}]
    plots.roofline(tmp_path / "roofline.png", records)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("ratios", "roofline"))
