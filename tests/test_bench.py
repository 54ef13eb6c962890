"""The benchmarks' own machinery: nothing wrong is timed, ratios are of one round, a stage that fails does not hide."""

import json
import shutil
import sys
from importlib import import_module

import pytest
import torch

from avadclip_fast.ops import _dispatch
from bench import compare, gpu, harness, plots
from bench.harness import Bench, Work


def bench(**alternatives) -> Bench:
    def make() -> tuple:
        return (torch.randn(3, 4, requires_grad=True),)

    return Bench("[3, 4]", make, {"reference": lambda x: x.exp(), **alternatives}, Work(96), Work(144, 12))


def test_a_row_an_alternative_and_ours_is_the_last():
    cases = bench(ours=lambda x: torch.exp(x))
    rows = harness.run(lambda dtype: [cases], torch.float32, "cpu", rounds=3)
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
    cases = bench(ours=wrong)
    with pytest.raises(AssertionError, match=r"\[3, 4\], ours: (result|gradient 1)"):
        harness.run(lambda dtype: [cases], torch.float32, "cpu", rounds=2)


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


def test_no_case_is_compiled_when_the_time_is_up(as_on_gpu, monkeypatch, capsys):
    monkeypatch.setattr(harness, "COMPILING", -1)
    rows = harness.run(import_module("bench.bench_attention_pool").cases, torch.float32, "cpu", rounds=2)
    assert [row["alternative"] for row in rows] == ["official", "reference"]
    assert "without torch.compile" in capsys.readouterr().out


def test_stages_end_and_are_told(tmp_path):
    python = sys.executable
    record = gpu.run(
        [
            gpu.Stage("good", [python, "-c", "print('hello')"], 30),
            gpu.Stage("bad", [python, "-c", "raise SystemExit(3)"], 30),
            gpu.Stage("endless", [python, "-c", "import time; time.sleep(60)"], 0.5),
            gpu.Stage("absent", None, 30, "no such tool"),
            gpu.Stage("after", [python, "-c", ""], 30),
        ],
        tmp_path,
    )
    assert [outcome["result"].split(",")[0] for outcome in record.values()] == [
        "ok",
        "failed (3)",
        "stopped after 0 s",
        "left out: no such tool",
        "ok",
    ]
    assert json.loads((tmp_path / "gpu.json").read_text()) == record
    assert (tmp_path / "good.log").read_text() == "hello\n"


def test_nothing_starts_when_the_time_is_up(tmp_path):
    record = gpu.run([gpu.Stage("late", [sys.executable, "-c", ""], 30)], tmp_path, total=0)
    assert record["late"]["result"] == "no time left"


def test_every_stage_is_there(tmp_path):
    stages = gpu.stages(tmp_path, tune=True)
    for stage in stages:
        if stage.name.startswith("bench_"):
            assert (gpu.ROOT / f"bench/{stage.name}.py").exists()
    names = {stage.name for stage in stages}
    assert {path.stem for path in (gpu.ROOT / "bench").glob("bench_*.py")} <= names


def test_slower_is_what_exceeds_the_limit_and_the_spread():
    steady = [1.0, 1.01, 0.99, 1.0, 1.0]
    assert not compare.verdict("same", steady, steady)["slower"]
    assert compare.verdict("slower", steady, [1.1 * x for x in steady])["slower"]
    assert not compare.verdict("a little", steady, [1.04 * x for x in steady])["slower"]
    assert not compare.verdict("faster", [1.1 * x for x in steady], steady)["slower"]
    noisy = [0.6, 1.5, 1.1, 0.9, 1.4]
    assert not compare.verdict("noise", noisy, [1.1 * x for x in noisy])["slower"]


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
    rows = harness.run(lambda dtype: [bench(ours=lambda x: torch.exp(x))], torch.float32, "cpu", rounds=3)
    plots.ratios(tmp_path / "ratios.png", rows)
    with pytest.raises(ValueError, match="measured on a GPU"):
        plots.roofline(tmp_path / "roofline.png", [{"bench": "bench_exp", "rows": rows}])
    roofs = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
    plots.roofline(
        tmp_path / "roofline.png", [{"bench": "bench_exp", "rows": [row | {"roofs": roofs} for row in rows]}]
    )
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("ratios", "roofline"))
