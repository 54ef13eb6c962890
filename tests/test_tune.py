"""Tuning: the fastest tiles go into the table, and noise does not."""

import json
import threading
from unittest import mock

import pytest
import torch
from test_cli import mistake

pytest.importorskip("triton")

from avadclip_fast.kernels import gated_fusion, linear_act  # noqa: E402

from avadclip_fast.engine import tune  # noqa: E402
from bench.aot_triton import recorded  # noqa: E402

DEFAULT = {"rows": 128, "cols": 128, "depth": 64, "warps": 8, "stages": 3, "persistent": False, "tma": True}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of another chip's, and one launch to tune."""
    path = tmp_path / "linear_act.json"
    path.write_text(json.dumps({"sm_80": {"x": DEFAULT}}))
    monkeypatch.setattr(linear_act, "CONFIGS", path)
    monkeypatch.setattr(linear_act, "_chip", lambda device: ("sm_90", 132))
    monkeypatch.setattr(tune, "launches", lambda dtype, only: {"gemm bf16": ("gemm", DEFAULT, lambda: None)})
    return path


def test_the_fastest_is_kept(table, monkeypatch):
    def time(launch, config):
        if config["stages"] == 4:
            return None  # does not fit
        return 10.0 if (config["rows"], config["cols"]) == (64, 256) else 20.0

    monkeypatch.setattr(tune, "microseconds", time)
    found = tune.tune(say=lambda line: None)["gemm bf16"]
    assert (found["rows"], found["cols"], found["stages"], found["us"]) == (64, 256, 3, 10.0)
    written = json.loads(table.read_text())
    assert written["sm_80"] == {"x": DEFAULT} and written["sm_90"] == {"gemm bf16": found}


def test_noise_changes_nothing(table, monkeypatch):
    monkeypatch.setattr(tune, "microseconds", lambda launch, config: 20.0 if config == DEFAULT else 19.9)
    found = tune.tune(say=lambda line: None)["gemm bf16"]
    assert {key: found[key] for key in DEFAULT} == DEFAULT


def test_candidates_are_compiled_side_by_side(monkeypatch):
    """A launch under each configuration asks for its kernel once, and launches nothing."""
    together, seen = threading.Barrier(2, timeout=60), []

    class Kernel:
        def warmup(self, *args, grid, **named):
            together.wait()
            seen.append((grid, named["ROWS"], named["num_warps"]))

    monkeypatch.setattr(tune.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(linear_act, "gemm_kernel", Kernel())
    x, w = torch.ones(1, 256, 64), torch.ones(1, 128, 64)
    configs = [{**DEFAULT, "rows": rows, "warps": rows // 16, "tma": False} for rows in (64, 128)]
    tune.compile_ahead(lambda: linear_act.gemm(x, w), configs)
    assert sorted(seen) == [((2,), 128, 8), ((4,), 64, 4)]


def test_what_is_tuned_is_what_a_step_asks_for():
    found: dict[str, list] = {}

    def note(kind, x, rows, outputs, width):
        asked.append(linear_act.bucket(kind, x.dtype, rows, outputs, width))
        return DEFAULT

    patches = [mock.patch.object(module, "config", note) for module in (linear_act, gated_fusion)]
    with recorded("sm_90"), patches[0], patches[1]:
        for name, run in tune.gemms(torch.bfloat16, "meta"):
            asked = found[name] = []
            run()
    assert found["mlp"] == ["gemm bfloat16 32768x2048x512"]  # its backward pass is cuBLAS's
    assert "weight_grad bfloat16 32768x512x2560" in found["graph convolution"]
    assert "gemm bfloat16 32768x512x512" in found["projection"] and "gates bfloat16" in str(found["fusion"])


def test_the_command_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "needs a GPU and Triton" in mistake(capsys, "tune")


def test_the_command_refuses_a_name_that_no_call_has_and_a_gpu_that_triton_has_not(capsys, monkeypatch):
    from avadclip_fast.cli import kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.torch, "empty", lambda *_, **__: torch.ones(0))
    monkeypatch.setattr(kernels, "triton_reason", lambda x: None)
    monkeypatch.setattr(tune, "tune", lambda *_: pytest.fail("it was tuned"))
    told = mistake(capsys, "tune", "--only", "mpl")
    assert "no call has 'mpl' in its name; there are qkv, queries, projection, mlp" in " ".join(told.split())
    monkeypatch.setattr(kernels, "triton_reason", lambda x: "it needs compute capability 8.0, and cuda has 7.5")
    assert "needs compute capability 8.0" in mistake(capsys, "tune")
