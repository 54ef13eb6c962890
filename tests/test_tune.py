"""Tuning: the fastest tiles go into the table, and noise does not."""

import json

import pytest
import torch
from test_cli import mistake

pytest.importorskip("triton")

from avadclip_fast.kernels import linear_act  # noqa: E402

from avadclip_fast.engine import tune  # noqa: E402

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


def test_the_command_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "needs a GPU and Triton" in mistake(capsys, "tune")
