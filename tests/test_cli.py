"""Every command, as a newcomer would type it; and every mistake, which must end in one clear line."""

import dataclasses
import functools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from typer.main import get_command

import avadclip_fast
from avadclip_fast import cli, data, use_backend
from avadclip_fast.cli import commands
from avadclip_fast.data import make_synthetic
from avadclip_fast.engine import demo
from avadclip_fast.engine.calibrate import Calibration, Head
from avadclip_fast.engine.recipe import ROBUST, ROBUST_HEARER
from avadclip_fast.engine.report import _examples
from avadclip_fast.engine.train import HISTORY
from avadclip_fast.models import AVadCLIP, AVadCLIPStudent

WIDTH = 64
WIDE = "--width", WIDTH
CLASSES = "A=normal,B1=fighting,B2=shooting,G=explosion"
QUICK = ["--classes", CLASSES, "--text-weights", "random", "--text-layers", "1", "--length", "16", "-q"]


class Narrow(type):
    """Stands in for a class of models in `commands`: at width 512 a run takes ten times as long, to write 450 MB."""

    def __call__(cls, *arguments, **settings):
        return cls.kind(*arguments, **settings, width=WIDTH, text_width=WIDTH)

    def __instancecheck__(cls, model):
        return isinstance(model, cls.kind)

    def __getattr__(cls, name):
        return getattr(cls.kind, name)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        for kind in (AVadCLIP, AVadCLIPStudent):
            patch.setattr(commands, kind.__name__, Narrow(kind.__name__, (), {"kind": kind}))
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    make_synthetic(folder, videos=12, test_videos=6, min_snippets=16, max_snippets=30, width=WIDTH)
    return folder


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory):
    """A teacher's run folder."""
    run = tmp_path_factory.mktemp("runs") / "teacher"
    assert call("train", videos / "train.csv", "-o", run, "--epochs", 1, *QUICK) == 0
    return run


def call(*arguments) -> int:
    """Runs the command line in this process; its exit code."""
    before = sys.argv
    sys.argv = ["avadclip-fast", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


def mistake(capsys, *arguments) -> str:
    """Runs a command that must fail with exit code 2 and one line on stderr, and returns the line."""
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


def test_names_in_a_checkpoint_steer_no_terminal(tmp_path, capsys):
    torch.save({"a\x1b[2Jb": torch.zeros(1)}, tmp_path / "a.pth")
    told = mistake(capsys, "convert", tmp_path / "a.pth", tmp_path / "out")
    assert told.endswith("unknown names:\n  a\\x1b[2Jb\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_standard_output_that_is_full_is_named(monkeypatch, capsys):
    """And given up: Python writes again what is left of it as it exits."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert mistake(capsys, "env") == "error: [Errno 28] No space left on device: standard output\n"
        print("more", file=full, flush=True)


@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stderr"]])
def test_what_is_told_to_a_closed_output_goes_nowhere(monkeypatch, closed):
    """As of a service that is started by `>&-`."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert call("env") == 0
    sys.stdout.flush()  # as `stream` does after each event


def test_train_distil_evaluate(videos, trained, tmp_path, capsys):
    run = tmp_path / "student"
    assert (
        call(
            "distill", videos / "train.csv", "--teacher", trained, "-o", run, "--epochs", 1, "--window", 8,
            "--classes", CLASSES, "-q",
        )
        == 0
    )  # fmt: skip
    assert json.loads((run / "model" / "config.json").read_text())["window"] == 8
    assert json.loads((run / HISTORY).read_text())["run"]["recipe"]["distill_weight"] == 1e-8
    out = {}
    flagged = ("silent", trained, "--silent"), ("plain", trained, "--uncalibrated")
    for name, model, *flags in (("teacher", trained), ("student", run), *flagged):
        truth = ["--gt", videos / "gt.npy", "--segments", videos / "gt_segments.json"]
        written = ["--json", tmp_path / f"{name}.json", "--plots", tmp_path / name]
        list_ = videos / "test.csv"
        assert call("eval", list_, "--model", model, *truth, *written, *flags, "--classes", CLASSES, "-q") == 0
        out[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(list((tmp_path / name).glob("*.png"))) == 6  # five videos, and the reliability of the scores
    assert {"ap", "auc", "abnormal_ap"} <= out["teacher"]["align"].keys()
    assert out["teacher"]["align"] != out["silent"]["align"]
    assert out["plain"]["threshold"]["align"]["threshold"] == 0.5 != out["teacher"]["threshold"]["align"]["threshold"]
    assert out["plain"]["threshold"]["align"]["ece"] != out["teacher"]["threshold"]["align"]["ece"]
    shown = capsys.readouterr().out
    assert shown.count("\nframe level, %") == 4 and shown.count("\nat threshold") == 3  # not of what is uncalibrated


def test_a_preset_settles_frames_and_the_weight_of_distillation(videos, trained, tmp_path, capsys):
    preset = "--preset", "cctv-fights", "--classes", CLASSES, "-q"
    check = "check", videos / "test.csv", "--gt", videos / "gt.npy", *preset, *WIDE
    assert call(*check) == 1 and "snippets x 4 = " in capsys.readouterr().out
    assert call(*check, "--frames-per-snippet", 16) == 0
    guided = "distill", videos / "train.csv", "--teacher", trained, "-o", tmp_path / "run", "--epochs", 1
    assert call(*guided, *preset, "--padding", "official") == 0
    recipe = json.loads((tmp_path / "run" / HISTORY).read_text())["run"]["recipe"]
    assert recipe["distill_weight"] == 1e-7
    assert json.loads((tmp_path / "run/model/config.json").read_text())["padding"] == "official"


def test_options_reach_the_recipe_and_the_model(videos, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    given = "--precision", "bf16", "--prompt", "paper", "--padding", "official", "--standardize", "audio", "--window", 2
    given = *given, "--deterministic", "--held-out", 0.3, "--epochs", 1, *QUICK
    assert call("train", videos / "train.csv", "-o", tmp_path / "run", *given) == 0
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert json.loads((tmp_path / "run" / HISTORY).read_text())["run"]["recipe"]["precision"] == "bf16"
    model = AVadCLIP.from_pretrained(tmp_path / "run" / "model")
    assert (model.prompt.prompt, model.padding, model.settings()["window"]) == ("paper", "official", 2)
    codes = dict(pair.split("=") for pair in CLASSES.split(","))
    # statistics are of the videos that are trained on, not of those held out
    kept, _ = data.split(data.read_list(videos / "train.csv"), 0.3, 234, codes)
    batch = data.FeatureSet.load(kept, codes, 16, WIDTH).batch(torch.arange(len(kept)))
    mean = batch.audio.double().sum((0, 1)) / batch.lengths.sum()
    torch.testing.assert_close(model.standardize["audio"].mean.double(), mean, rtol=1e-4, atol=1e-6)


def test_an_epoch_is_selected_by_what_eval_reports(videos, tmp_path, capsys):
    gt = "--gt", videos / "gt.npy"
    start = "train", videos / "train.csv", "-o", tmp_path / "run", *QUICK, "--select", "test"
    assert call(*start, "--test-list", videos / "test.csv", *gt, "--epochs", 1) == 0
    ask = "eval", videos / "test.csv", "--model", tmp_path / "run", *gt, "--json", tmp_path / "out.json"
    assert call(*ask, "--classes", CLASSES, "-q") == 0
    (record,) = json.loads((tmp_path / "run" / HISTORY).read_text())["epochs"]
    assert record["test_ap"] == pytest.approx(json.loads((tmp_path / "out.json").read_text())["align"]["ap"])
    # other ground truth, or other features, would select otherwise
    np.save(tmp_path / "other.npy", 1 - np.load(videos / "gt.npy"))
    rows = data.read_list(videos / "test.csv")
    data.write_features(videos / "louder.npy", 2 * data.load_features(rows[0].audio))
    data.write_list(videos / "other.csv", [dataclasses.replace(rows[0], audio=videos / "louder.npy"), *rows[1:]])
    for list_, truth in (("test.csv", tmp_path / "other.npy"), ("other.csv", videos / "gt.npy")):
        again = "--test-list", videos / list_, "--gt", truth, "--epochs", 1, "--resume"
        assert "other settings (test videos)" in mistake(capsys, *start, *again)
    assert call(*start, "--test-list", videos / "test.csv", *gt, "--epochs", 1, "--resume") == 0


def test_the_robust_recipe_sets_defaults_and_yields_to_options(videos, tmp_path):
    few = "--epochs", 1, "--batch-size", 4, "--held-out", 0.3
    assert call("train", videos / "train.csv", "-o", tmp_path / "t", "--recipe", "robust", *few, *QUICK) == 0
    recipe = json.loads((tmp_path / "t" / HISTORY).read_text())["run"]["recipe"]
    assert recipe["temporal_lr"] == ROBUST["temporal_lr"] and recipe["noise"] == ROBUST["noise"]
    assert (recipe["epochs"], recipe["batch_size"], recipe["lr"]) == (1, 4, ROBUST["lr"])
    config = json.loads((tmp_path / "t/model/config.json").read_text())
    assert config["motion"] and config["standardize"] == ["audio", "visual"]
    teacher = "--teacher", tmp_path / "t", "--classes", CLASSES, "-q"
    noisy = "--recipe", "robust", "--noise", 0.25, *teacher, *few
    assert call("distill", videos / "train.csv", "-o", tmp_path / "s", *noisy) == 0
    recipe = json.loads((tmp_path / "s" / HISTORY).read_text())["run"]["recipe"]
    assert (recipe["noise"], recipe["distill_weight"]) == (0.25, ROBUST["distill_weight"])
    assert recipe["temporal_lr"] == ROBUST["temporal_lr"]
    config = json.loads((tmp_path / "s/model/config.json").read_text())
    assert config["motion"] and config["standardize"] == ["visual"]
    score = "--gt", videos / "gt.npy", "--student", tmp_path / "s", "--missing-sound", "50", "--classes", CLASSES, "-q"
    assert call("eval", videos / "test.csv", "--model", tmp_path / "t", *score) == 0
    hears = "--recipe", "robust", "--modality", "audio", *teacher, *few
    assert call("distill", videos / "train.csv", "-o", tmp_path / "h", *hears) == 0
    recipe = json.loads((tmp_path / "h" / HISTORY).read_text())["run"]["recipe"]
    assert recipe["temporal_lr"] == ROBUST_HEARER["temporal_lr"] != ROBUST["temporal_lr"] and recipe["noise"] == 0
    config = json.loads((tmp_path / "h/model/config.json").read_text())
    assert not config["motion"] and config["standardize"] == ["audio"]
    plain = "--recipe", "robust", "--no-motion", *few, *QUICK
    assert call("train", videos / "train.csv", "-o", tmp_path / "u", *plain) == 0
    config = json.loads((tmp_path / "u/model/config.json").read_text())
    assert not config["motion"] and config["standardize"] == ["audio"]


def test_a_stream_that_a_student_does_not_take(videos, trained, tmp_path, capsys):
    start = "train", videos / "train.csv", "-o", tmp_path / "run", "--student", *QUICK
    said = mistake(capsys, *start, "--modality", "audio", "--motion")
    assert "--motion is of sight, which a student of the sound does not take" in said
    assert "--standardize audio: the student takes visual alone" in mistake(capsys, *start, "--standardize", "audio")
    guided = "distill", videos / "train.csv", "--teacher", trained, "-o", tmp_path / "run", "--classes", CLASSES
    assert "the student takes visual alone" in mistake(capsys, *guided, "--standardize", "audio")
    assert "--noise is on sight" in mistake(capsys, *guided, "--modality", "audio", "--noise", "1")
    assert "--fusion add is of a teacher" in mistake(capsys, *start, "--fusion", "add")
    whole = "train", videos / "train.csv", "-o", tmp_path / "run", *QUICK
    assert "--modality audio is of a --student" in mistake(capsys, *whole, "--modality", "audio")


def test_a_held_out_list_takes_the_place_of_a_share(videos, tmp_path, capsys):
    separate = "--held-out-list", videos / "test.csv", "--epochs", 1
    assert call("train", videos / "train.csv", "-o", tmp_path / "run", *separate, *QUICK) == 0
    history = json.loads((tmp_path / "run" / HISTORY).read_text())
    assert history["run"]["samples"] == 12 and "val" in history["epochs"][0]
    assert Calibration.load(tmp_path / "run").videos == 6
    lines = (videos / "test.csv").read_text() + (videos / "train.csv").read_text().splitlines()[3] + "\n"
    (videos / "both.csv").write_text(lines)
    separate = "--held-out-list", videos / "both.csv"
    said = mistake(capsys, "train", videos / "train.csv", "-o", tmp_path / "other", *separate, *QUICK)
    assert "both.csv: " in said and "and not held out" in said
    (tmp_path / "folder").symlink_to(videos / "train", target_is_directory=True)
    (tmp_path / "a.npy").symlink_to(next((videos / "train").glob("*__v.npy")))
    for linked in (next((tmp_path / "folder").glob("*__v.npy")), tmp_path / "a.npy"):
        (tmp_path / "linked.csv").write_text(f"path,label\n{linked},A\n")
        student = "train", videos / "train.csv", "-o", tmp_path / "other", "--student", *QUICK
        assert "and not held out" in mistake(capsys, *student, "--held-out-list", tmp_path / "linked.csv")
    for other in (separate, ("--select", "last")):  # which leave a share aside
        said = mistake(capsys, "train", videos / "train.csv", "-o", tmp_path / "run", "--held-out", 0.3, *other, *QUICK)
        assert f"--held-out 0.3 is for --select val, and {other[0]} " in said


def test_a_video_is_known_for_the_same_in_a_file_packed_elsewhere(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(videos)
    assert call("pack", "train.csv", "-o", tmp_path / "p.safetensors", "--length", 16, "-q", *WIDE) == 0
    monkeypatch.chdir(tmp_path)
    separate = "--held-out-list", videos / "train.csv"
    assert "and not held out" in mistake(capsys, "train", "p.safetensors", "-o", "run", *separate, *QUICK)


def test_a_packed_file_takes_no_root(videos, trained, tmp_path, capsys):
    """Nor does it ignore one, which a list beside it may need."""
    packed = tmp_path / "p.safetensors"
    assert call("pack", videos / "train.csv", "-o", packed, "--length", 16, "-q", *WIDE) == 0
    run = packed, "-o", tmp_path / "run", "--root", videos, "--epochs", 1
    guided = "--teacher", trained, "--classes", CLASSES, "-q"
    for command in (("train", *run, *QUICK), ("distill", *run, *guided)):
        told = f"--root is for lists; {packed} is packed, and needs no other files: leave it out"
        assert told in mistake(capsys, *command)
        assert told in mistake(capsys, *command, "--held-out-list", packed)
    (tmp_path / "test.csv").write_text((videos / "test.csv").read_text())
    assert call("train", *run, "--held-out-list", tmp_path / "test.csv", *QUICK) == 0


def test_missing_sound(videos, trained, tmp_path, capsys):
    student = tmp_path / "student"
    options = "--classes", CLASSES, "-q"
    start = "distill", videos / "train.csv", "--teacher", trained, "-o", student
    assert call(*start, "--epochs", 1, "--held-out", 0.3, *options) == 0
    assert Calibration.load(student).videos == 4
    ask = "eval", videos / "test.csv", "--model", trained, "--gt", videos / "gt.npy", "--json", tmp_path / "out.json"
    assert call(*ask, "--student", student, "--missing-sound", "0,50,100", *options) == 0
    assert "automatic" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    heard, half, none = result["missing_sound"]
    assert heard["teacher"]["align"] == heard["automatic"]["align"] == result["align"]["ap"]
    assert none["automatic"] == none["student"] and half["missing"] == 50
    Calibration(Head(0.25, 0.5), Head(0.25, 0.5), 4).save(student / "model")
    assert call(*ask, "--student", student, "--missing-sound", "100", *options) == 0
    (none,) = json.loads((tmp_path / "out.json").read_text())["missing_sound"]
    for name, alone in (("teacher", (*ask, "--silent")), ("student", (*ask[:3], student, *ask[4:]))):
        assert call(*alone, *options) == 0
        assert none[name]["align"] == json.loads((tmp_path / "out.json").read_text())["align"]["ap"]
    assert "--student" in mistake(capsys, *ask, "--missing-sound", "50", *options)
    assert "hears" in mistake(capsys, *ask, "--student", trained, "--missing-sound", "50", *options)
    assert "--student is for --missing-sound" in mistake(capsys, *ask, "--student", student, *options)
    assert "--plots" in mistake(capsys, *ask, "--plot", "video", *options)
    for percents in ("half", "0,200", "nan"):
        said = mistake(capsys, *ask, "--student", student, "--missing-sound", percents, *options)
        assert "percents from 0 to 100" in said
    assert "takes visual only" in mistake(capsys, *ask[:3], student, *ask[4:], "--silent", *options)


def test_demo(tmp_path, monkeypatch, capsys):
    """The demo on a tenth of its videos, for one epoch: its files, its table, and that it overwrites nothing."""
    few = functools.partial(make_synthetic, videos=12, test_videos=6, max_snippets=20)
    monkeypatch.setattr(demo.data, "make_synthetic", few)
    for name in ("RECIPE", "STUDENT_RECIPE"):
        monkeypatch.setattr(demo, name, dataclasses.replace(getattr(demo, name), epochs=1))
    assert call("demo", "--output", tmp_path / "demo") == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())["results"]
    report = (tmp_path / "demo" / "report.md").read_text()
    for name, result in results.items():
        row = f"| {name} | {100 * result['ap']:.1f} | {100 * result['auc']:.1f} | {result['detection']:.1f} |"
        assert row in shown and row in report
    assert len(results) == 4
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    for name in ("teacher", "student", "baseline"):  # each was trained
        assert (tmp_path / "demo" / name / "model" / "model.safetensors").is_file()
    assert "distilling a student (3 of 3)" in shown
    assert "holds a demo already" in mistake(capsys, "demo", "--output", tmp_path / "demo")


def test_a_student_needs_no_sound(videos, tmp_path):
    lines = (videos / "train.csv").read_text().splitlines()
    silent = videos / "silent.csv"
    silent.write_text("\n".join(",".join((row.split(",")[0], row.split(",")[2])) for row in lines))
    assert call("train", silent, "-o", tmp_path / "run", "--student", "--epochs", 1, *QUICK) == 0


def test_resume_through_the_command_line(videos, trained, tmp_path, capsys, caplog):
    assert "--resume" in mistake(capsys, "train", videos / "train.csv", "-o", trained, "--epochs", 1, *QUICK)
    assert call("train", videos / "train.csv", "-o", trained, "--epochs", 1, *QUICK, "--resume") == 0
    said = capsys.readouterr().out
    assert "epoch 1 of 1" in said and "from 2 held-out videos: too few to trust" in said and not caplog.text
    assert call("train", videos / "train.csv", "-o", tmp_path / "new", "--epochs", 1, *QUICK, "--resume") == 0
    assert "holds no run to resume: starting one" in caplog.text
    assert "audio-visual" in (trained / "model" / "README.md").read_text()


def test_more_epochs_through_the_command_line(videos, tmp_path, capsys):
    start = "train", videos / "train.csv", "-o", tmp_path / "run", "--student", *QUICK
    assert call(*start, "--epochs", 1) == 0
    assert call(*start, "--epochs", 2, "--checkpoint-every", 7, "--resume") == 0
    assert "of 2" in capsys.readouterr().out
    assert "resume it with --epochs 2 or more" in mistake(capsys, *start, "--epochs", 1, "--resume")
    for path in (tmp_path / "run" / "model").iterdir():
        path.unlink()
    score = "eval", videos / "test.csv", "--model", tmp_path / "run", "--gt", videos / "gt.npy", "--classes", CLASSES
    assert "its training has not ended; go on with --resume" in mistake(capsys, *score)
    guided = "distill", videos / "train.csv", "--teacher", tmp_path / "run", "-o", tmp_path / "s", "--classes", CLASSES
    assert "its training has not ended; go on with --resume" in mistake(capsys, *guided)


def test_convert_there_and_back(trained, tmp_path, capsys):
    assert call("convert", trained, tmp_path / "official.pth", "--classes", CLASSES) == 0
    assert "weights only" in capsys.readouterr().out
    tower = "--image-tower", tmp_path / "nowhere.pth"
    assert "nowhere.pth: no such file to take the image tower" in mistake(
        capsys, "convert", trained, tmp_path / "x.pth", "--classes", CLASSES, *tower
    )
    assert "takes none" in mistake(capsys, "convert", tmp_path / "official.pth", tmp_path / "own", *tower)
    assert call("convert", tmp_path / "official.pth", tmp_path / "own", "--classes", CLASSES) == 0
    before, after = AVadCLIP.from_pretrained(trained / "model"), AVadCLIP.from_pretrained(tmp_path / "own")
    assert all(torch.equal(t, after.state_dict()[n]) for n, t in before.state_dict().items())
    assert after.padding == "official"
    Calibration(Head(0.25, 0.1), Head(0.25, 0.1), 30).save(tmp_path / "own")  # as of an earlier model
    assert call("convert", tmp_path / "official.pth", tmp_path / "own", "--classes", CLASSES) == 0
    assert Calibration.load(tmp_path / "own") == Calibration()
    (tmp_path / "own" / "model").mkdir()  # nor is that of a run whose folder it is written to
    Calibration(Head(0.25, 0.1), Head(0.25, 0.1), 30).save(tmp_path / "own" / "model")
    assert Calibration.load(tmp_path / "own") == Calibration()
    wide = "convert", tmp_path / "official.pth", tmp_path / "wide", "--window", 8, "--classes", CLASSES
    assert call(*wide) == 0 and AVadCLIP.from_pretrained(tmp_path / "wide").settings()["window"] == 8


def test_a_conversion_back_is_a_file(trained, tmp_path, capsys):
    for name in ("official", "official.safetensors"):
        assert "ends in .pth" in mistake(capsys, "convert", trained, tmp_path / name, "--classes", CLASSES)
        assert not (tmp_path / name).exists()
    (tmp_path / "folder.pth").mkdir()
    assert "ends in .pth" in mistake(capsys, "convert", trained, tmp_path / "folder.pth", "--classes", CLASSES)
    assert call("convert", trained, tmp_path / "new" / "folder" / "official.pth", "--classes", CLASSES) == 0
    assert (tmp_path / "new" / "folder" / "official.pth").is_file()


def test_a_conversion_back_keeps_the_classes(trained, tmp_path, capsys):
    said = mistake(capsys, "convert", trained, tmp_path / "x.pth", "--classes", "A=normal,B1=brawl")
    assert f"{trained}: --classes is of an official .pth; this model knows normal, " in said
    assert not (tmp_path / "x.pth").exists()


def test_a_conversion_of_a_file_is_a_folder(trained, tmp_path, capsys):
    for name in ("a.pth", "file", "b.bin"):
        (tmp_path / name).write_bytes(b"left as it is")
    for name in ("b.pth", "b.pt", "file", "a.pth"):
        said = mistake(capsys, "convert", tmp_path / "a.pth", tmp_path / name)
        assert f"{name}: a .pth is turned into a folder; name a folder" in said
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "file", "b.bin"}
    inner = trained / "model"
    said = mistake(capsys, "convert", inner / "model.safetensors", tmp_path / "b.pth")
    assert f"model.safetensors is a file of a model folder: give the folder, {inner}\n" in said
    assert "no model at" in mistake(capsys, "convert", tmp_path / "c.pth", tmp_path / "d.pth")
    assert "teacher is a run, for whose model" in mistake(capsys, "convert", tmp_path / "a.pth", trained)


def test_a_window_is_of_an_official_checkpoint(videos, trained, tmp_path, capsys):
    """It goes to the one model of two that is a .pth; a folder has its own."""
    wrong = "--window", 16, "--classes", CLASSES
    ask = "eval", videos / "test.csv", "--gt", videos / "gt.npy", "-q", "--model", trained
    told = "teacher: --window is of an official .pth; this model has 4"
    assert told in mistake(capsys, *ask, *wrong)
    assert told in mistake(capsys, "convert", trained, tmp_path / "x.pth", *wrong)
    assert told in mistake(capsys, "export", trained, "-o", tmp_path / "x.pt2", *wrong)
    assert not list(tmp_path.iterdir())
    assert call(*ask, "--window", 4, "--classes", CLASSES) == 0
    student = AVadCLIPStudent.beside(AVadCLIP.from_pretrained(trained / "model"), padding="official")
    student.to_official(tmp_path / "s.pth")
    student.save_pretrained(tmp_path / "s")
    both = *ask, "--missing-sound", "50", "--student"
    assert call(*both, tmp_path / "s.pth", *wrong) == 0
    assert told in mistake(capsys, *both, tmp_path / "s", *wrong)


def test_windows_are_bounded(trained, tmp_path, capsys):
    for command in (["convert", trained, tmp_path / "x.pth"], ["export", trained, "-o", tmp_path / "x.onnx"]):
        for window in (0, -1, 10**9):
            assert call(*command, "--window", window) == 2
            assert "--window" in capsys.readouterr().err and not (tmp_path / "x.pth").exists()


def test_integer_options_are_bounded(videos, tmp_path, capsys):
    """Also above: what torch's 64 bits cannot hold is refused by the name of its option."""
    from avadclip_fast.cli import export, kernels, media, profile  # noqa: F401  add their commands

    hints = [get_type_hints(one.callback, include_extras=True) for one in commands.app.registered_commands]
    numbers = [
        (name, of)
        for found in hints
        for name, of in found.items()
        if getattr(of, "__origin__", None) in (int, int | None)
    ]
    assert len(numbers) > 20
    free = {name for name, of in numbers if of.__metadata__[0].max is None and of.__metadata__[0].callback is None}
    assert free == {"crops"}  # one of three numbers
    start = "train", videos / "train.csv", "-o", tmp_path / "run", *QUICK
    for option in ("--batch-size", "--length", "--epochs"):
        assert call(*start, option, 10**23) == 2
        assert f"Invalid value for '{option}'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_list_in_another_order_than_the_truth_is_told(videos, trained, tmp_path, capsys, caplog):
    header, *rows = (videos / "test.csv").read_text().splitlines()
    (videos / "turned.csv").write_text("\n".join([header, *rows[::-1]]))
    ask = "--model", trained, "--gt", videos / "gt.npy", "--classes", CLASSES, "-q"
    assert call("eval", videos / "test.csv", *ask) == 0 and "order" not in caplog.text
    assert call("eval", videos / "turned.csv", *ask) == 0
    assert "is the list in the order of the ground truth?" in caplog.text


def test_where_numbers_go_is_looked_at_before_scoring(videos, trained, tmp_path, capsys, monkeypatch):
    ask = "eval", videos / "test.csv", "--model", trained, "--gt", videos / "gt.npy", "--classes", CLASSES, "-q"
    assert call(*ask, "--json", tmp_path / "new" / "out.json", "--plots", tmp_path / "other" / "plots") == 0
    assert (tmp_path / "new" / "out.json").is_file()
    monkeypatch.setattr("avadclip_fast.cli.commands.score_rows", None)
    (tmp_path / "file").touch()
    for option in (["--json", tmp_path / "file" / "out.json"], ["--plots", tmp_path / "file"]):
        assert f"{tmp_path / 'file'}: cannot be made" in mistake(capsys, *ask, *option)
    assert "is a folder" in mistake(capsys, *ask, "--json", tmp_path)
    for read in ("test.csv", "gt.npy"):
        assert "is read, and would be replaced" in mistake(capsys, *ask, "--json", videos / read)
    assert "no video is named xyz" in mistake(capsys, *ask, "--plots", tmp_path / "p", "--plot", "xyz")
    assert "give both" in mistake(capsys, *ask, "--segment-labels", tmp_path / "file")
    np.save(tmp_path / "short.npy", np.load(videos / "gt.npy")[16:])
    assert "short.npy: 2384 frames, but" in mistake(capsys, *ask[:5], tmp_path / "short.npy", *ask[6:])
    spans = json.loads((videos / "gt_segments.json").read_text())
    few = {name: part[:-1] for name, part in spans.items()}
    other = {**spans, "labels": [["X"] * len(codes) for codes in spans["labels"]]}
    for wrong, said in ((few, "spans.json: spans of 5 videos, the list has 6"), (other, "the segments name X, which")):
        (tmp_path / "spans.json").write_text(json.dumps(wrong))
        assert said in mistake(capsys, *ask, "--segments", tmp_path / "spans.json")
    np.save(tmp_path / "normal.npy", 0 * np.load(videos / "gt.npy"))
    normal = *ask[:5], tmp_path / "normal.npy", *ask[6:]
    assert "all of one kind" in mistake(capsys, *normal, "--student", trained, "--missing-sound", "50")


def test_numbers_are_written_before_they_are_told(videos, trained, tmp_path, monkeypatch):
    """To a `head`, which has closed standard output once it has its lines."""

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(commands.typer, "echo", closed)
    ask = "eval", videos / "test.csv", "--model", trained, "--gt", videos / "gt.npy", "--classes", CLASSES, "-q"
    assert call(*ask, "--json", tmp_path / "out.json") == 2
    assert json.loads((tmp_path / "out.json").read_text())["threshold"]


def test_videos_of_one_name_in_several_folders_are_all_drawn(videos, trained, tmp_path):
    """As extract writes them for a tree of videos: those whose names clash are told apart by their folders."""
    rows = data.read_list(videos / "test.csv")
    for i, name in enumerate(("cam1/clip", "cam2/clip", "clip")):
        path = videos / "tree" / f"{name}__0.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows[i] = dataclasses.replace(rows[i], visual=Path(shutil.copy(rows[i].visual, path)))
    data.write_list(videos / "tree.csv", rows)
    ask = "eval", videos / "tree.csv", "--model", trained, "--gt", videos / "gt.npy", "--classes", CLASSES, "-q"
    clash, other = ("cam1/clip__0", "cam2/clip__0", "clip__0"), rows[3].visual.stem
    asked = [part for name in (*clash, other) for part in ("--plot", name)]
    assert call(*ask, "--plots", tmp_path, *asked) == 0
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert drawn == {*(f"{name}.png" for name in (*clash, other)), "reliability.png"}
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in clash}) == 3
    rows[0] = dataclasses.replace(rows[0], visual=Path(shutil.copy(rows[0].visual, videos / "reliability.npy")))
    data.write_list(videos / "tree.csv", rows)
    assert call(*ask, "--plots", tmp_path / "named", "--plot", "reliability") == 0  # as the diagram would be
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == ["reliability.png", "reliability_.png"]


def test_what_cannot_be_is_told_before_features_are_read(videos, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("avadclip_fast.engine.run.FeatureSet", None)
    train = "train", videos / "train.csv", *QUICK, "-o"
    assert "holds a run already" in mistake(capsys, *train, trained)
    (tmp_path / "file").touch()
    assert "is a file; name a folder" in mistake(capsys, *train, tmp_path / "file")
    assert "holds a model, which would be taken for the run's" in mistake(capsys, *train, trained / "model")
    assert "needs --test-list and --gt" in mistake(capsys, *train, tmp_path / "x", "--select", "test")
    guided = "distill", videos / "train.csv", "--teacher", trained, "-o", tmp_path / "x", *QUICK[:2]
    for command in ((*train, tmp_path / "x"), guided, ("check", videos / "test.csv")):
        told = mistake(capsys, *command, "--frames-per-snippet", 4)
        assert told == "error: --frames-per-snippet 4 is of the ground truth --gt, which is not given: leave it out\n"


@pytest.mark.parametrize("seed", [-1, 2**63, 10**20])
def test_seeds_are_bounded(videos, trained, tmp_path, capsys, seed):
    guided = "distill", videos / "train.csv", "--teacher", trained, "-o", tmp_path / "run"
    ask = "eval", videos / "test.csv", "--model", trained, "--gt", videos / "gt.npy"
    for command in (("train", videos / "train.csv", "-o", tmp_path / "run"), guided, ask):
        assert call(*command, "--seed", seed) == 2 and "--seed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_has_room_for_steps(videos, tmp_path):
    few = "--student", "--select", "last", "--epochs", 1, "--batch-size", 6, "--seed", 2**63 - 1
    assert call("train", videos / "train.csv", "-o", tmp_path / "run", *few, *QUICK) == 0


def test_a_part_of_torchruns_variables(videos, tmp_path, capsys, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = mistake(capsys, "train", videos / "train.csv", "-o", tmp_path / "run", "--device", "cpu", *QUICK)
    assert "WORLD_SIZE is 2" in said and "RANK" in said and "unset WORLD_SIZE" in said


def test_env_names_every_op(capsys, monkeypatch):
    from avadclip_fast.ops._dispatch import TABLE, why_not_chosen

    assert call("env") == 0
    out = capsys.readouterr().out
    assert [op for op in TABLE if op not in out] == [] and "forced" not in out
    rows = out[out.index("because") :].splitlines()[1:]
    assert all(len(row) <= 80 for row in rows if row.endswith(": it runs on cuda, and a tensor is on cpu"))
    told = dict(row.split()[:2] for row in rows)
    for op, arguments in _examples("cuda" if torch.cuda.is_available() else "cpu").items():
        assert why_not_chosen(op, told[op], *arguments) is None  # the one that serves
    with use_backend("reference"):
        assert call("env") == 0
    out = capsys.readouterr().out
    assert "forced by" in out and not any(f" {backend} " in out for backend in ("cpp", "amx", "triton"))
    with use_backend("cuda"):
        assert call("env") == 0
    assert "forced, and cannot serve" in capsys.readouterr().out
    monkeypatch.setattr("avadclip_fast.ops._dispatch._forced", "fpga")
    assert "fpga: unknown backend; one of cuda" in mistake(capsys, "env")


def test_the_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"avadclip_fast {avadclip_fast.__version__}\n"


def test_help_names_every_option_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in get_command(commands.app).commands.items():
        assert call(name, "--help") == 0
        shown = capsys.readouterr().out
        assert not [o for p in command.params for o in p.opts if o.startswith("--") and o not in shown], name
        assert not re.search(r"\d{10}", shown), name  # of bounds that only mean what 64 bits hold


def test_the_commands_are_told_in_whole_sentences(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("--help") == 0
    told = " ".join(capsys.readouterr().out.partition("Commands:")[2].split())
    assert "train Train the teacher or, with --student, a student without a teacher. distill " in told
    assert "..." not in told


def test_check(videos, tmp_path, capsys):
    assert call("check", videos / "test.csv", "--gt", videos / "gt.npy", "--classes", CLASSES, "-q", *WIDE) == 0
    np.save(tmp_path / "bad.npy", np.full((3, 512), np.nan, dtype=np.float32))
    (tmp_path / "list.csv").write_text("path,audio_path,label\nbad.npy,missing.npy,X9\n")
    capsys.readouterr()
    assert call("check", tmp_path / "list.csv", "-q") == 1
    out = capsys.readouterr().out
    assert "bad.npy" in out and "missing.npy" in out and "X9" in out


@pytest.mark.parametrize(("of", "missing"), [("A", "abnormal"), ("B1", "normal")])
def test_a_list_of_one_kind_is_warned_of(videos, tmp_path, capsys, caplog, of, missing):
    """By check, train and distill, which go on: a test list may be such, and a try."""
    header, *rows = (videos / "train.csv").read_text().splitlines()
    rows = [f"{row.rpartition(',')[0]},{of}" for row in rows[:4]]
    (videos / "one.csv").write_text("\n".join([header, *rows]))
    warning = f"a list needs {missing} ones too: add some, or correct the labels (A is normal)"
    packed = tmp_path / "p.safetensors"
    assert call("pack", videos / "one.csv", "-o", packed, "--length", 16, "-q", *WIDE) == 0
    capsys.readouterr()
    for path in (videos / "one.csv", packed):
        assert call("check", path, "--classes", CLASSES, "-q", *WIDE) == 0
        out = capsys.readouterr().out
        assert f"{path}: warning: every video" in out and warning in out and "no other problems" in out
    assert call("check", videos / "train.csv", "--classes", CLASSES, "-q", *WIDE) == 0
    assert capsys.readouterr().out == f"{videos / 'train.csv'}: no problems\n"
    few = "--student", "--epochs", 1, "--select", "last"
    assert call("train", videos / "one.csv", "-o", tmp_path / "run", *few, *QUICK) == 0
    assert f"one.csv: every video is labelled {'normal' if of == 'A' else 'abnormal'}" in caplog.text
    assert warning in caplog.text


class Slow(types.ModuleType):
    """Ctrl-C comes while it is imported."""

    def __getattr__(self, name):
        raise KeyboardInterrupt


def test_an_interrupt_of_the_imports_is_quiet(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "avadclip_fast.ops", Slow("avadclip_fast.ops"))
    for command, resumes in (("env", ""), ("extract", ", and the same call goes on from there")):
        assert call(command) == cli.INTERRUPTED
        assert capsys.readouterr().err == f"error: interrupted; what was written stays{resumes}\n"


def test_a_second_interrupt_at_the_exit_is_quiet():
    """It comes where torch cleans up, after the first was told."""
    code = "import atexit, os, signal; from avadclip_fast import cli; cli._run = lambda: cli._fail('told', 130)\n"
    code += "atexit.register(os.kill, os.getpid(), signal.SIGINT); cli.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "error: told\n")


def test_a_plain_pickle_is_refused_without_a_warning(tmp_path, capsys, recwarn):
    """torch adds four lines about the protocol to what its reader raises."""
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": [1.0]}, protocol=4))
    assert "a.pth cannot be read as weights" in mistake(capsys, "convert", tmp_path / "a.pth", tmp_path / "made")
    assert not recwarn.list


def test_mistakes_end_in_one_line(videos, trained, tmp_path, capsys):
    train, test = videos / "train.csv", videos / "test.csv"
    run = tmp_path / "run"
    assert "nothing.csv" in mistake(capsys, "train", tmp_path / "nothing.csv", "-o", run, *QUICK)
    assert "preset" in mistake(capsys, "train", train, "-o", run, "--preset", "ucf", "-q")
    assert "--classes" in mistake(capsys, "train", train, "-o", run, "--classes", "A", "-q")
    for wrong in ("A=normal", "A=normal,B1=violence,B2=violence", "A=normal,B1=a,B1=b"):
        assert "each once" in mistake(capsys, "train", train, "-o", run, "--classes", wrong, "-q")
    for wrong, code in (("0=normal,1=fighting", "0"), ("A=normal,B-1=fighting", "B-1")):  # no label can name them
        assert f"{code} cannot be a code" in mistake(capsys, "check", train, "--classes", wrong, "-q")
    long = "--classes", "A=normal,B1=" + "very " * 60 + "odd", "--text-weights", "random", "-q"
    assert "number 2 has 61 tokens; at most 55" in mistake(capsys, "train", train, "-o", run, *long)
    assert "not a packed list" in mistake(capsys, "train", trained / "state.safetensors", "-o", run, *QUICK)
    (tmp_path / "nul.csv").write_text("path,audio_path,label\na\0.npy,b.npy,A\n")
    assert "nul.csv, line 2: a NUL" in mistake(capsys, "train", tmp_path / "nul.csv", "-o", run, *QUICK)
    assert call("check", tmp_path / "nul.csv", "-q") == 1 and "nul.csv, line 2: a NUL" in capsys.readouterr().out
    assert "cuda:99" in mistake(capsys, "train", train, "-o", run, "--device", "cuda:99", *QUICK)
    for name in ("gpu", "meta"):  # the second is a device to torch
        said = mistake(capsys, "train", train, "-o", run, "--device", name, *QUICK)
        assert f"device '{name}': it must be auto, cpu, cuda" in said
    assert "weights" in mistake(capsys, "train", train, "-o", run, "--text-weights", tmp_path / "no.pt", "-q")
    assert "--test-list" in mistake(capsys, "train", train, "-o", run, "--select", "test", *QUICK)
    gt = ["--gt", videos / "gt.npy"]
    assert "for --select test" in mistake(capsys, "train", train, "-o", run, "--test-list", test, *gt, *QUICK)
    np.save(tmp_path / "normal.npy", np.zeros_like(np.load(videos / "gt.npy")))
    np.save(tmp_path / "short.npy", np.load(videos / "gt.npy")[16:])
    for name, said in (("normal", "all of one kind"), ("short", "short.npy: 2384 frames, but")):
        asked = "--select", "test", "--test-list", test, "--gt", tmp_path / f"{name}.npy"
        assert said in mistake(capsys, "train", train, "-o", run, *asked, *QUICK)
    assert "no model" in mistake(capsys, "eval", test, "--model", tmp_path / "nowhere", *gt, "--classes", CLASSES, "-q")
    assert "classes" in mistake(capsys, "eval", test, "--model", trained, *gt, "-q")
    bad = ["--classes", CLASSES, "--frames-per-snippet", 4, "-q"]
    assert "--frames-per-snippet" in mistake(capsys, "eval", test, "--model", trained, *gt, *bad)
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    assert "broken.pth" in mistake(capsys, "convert", tmp_path / "broken.pth", tmp_path / "out")
    assert "holds no video out" in mistake(capsys, "train", train, "-o", run, "--held-out", 0, *QUICK)
    (tmp_path / "empty.csv").touch()
    assert "empty.csv: the file is empty" in mistake(capsys, "train", tmp_path / "empty.csv", "-o", run, *QUICK)
    odd = ["--gt", videos / "gt_segments.json", "--classes", CLASSES, "-q"]
    assert "not a .npy file" in mistake(capsys, "eval", test, "--model", trained, *odd)
    assert not run.exists(), "a mistake leaves nothing behind"


def test_bad_features_stop_before_training(videos, tmp_path, capsys):
    rows = (videos / "train.csv").read_text().splitlines()
    np.save(tmp_path / "short.npy", np.zeros((2, WIDTH), dtype=np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((3, WIDTH), dtype=np.float32))
    (tmp_path / "list.csv").write_text("\n".join([rows[0], "whole.npy,short.npy,A"]))
    message = mistake(capsys, "train", tmp_path / "list.csv", "-o", tmp_path / "run", "--select", "last", *QUICK)
    assert "short.npy" in message and "line 2" in message
    assert not (tmp_path / "run").exists()


def test_without_pretrained_weights_it_says_so(videos, tmp_path, capsys, monkeypatch):
    from open_clip import pretrained

    def refuse(url, cache_dir=None):
        raise OSError("no network")

    monkeypatch.setattr(pretrained, "download_pretrained_from_url", refuse)
    message = mistake(capsys, "train", videos / "train.csv", "-o", tmp_path / "run", "--classes", CLASSES, "-q")
    assert "--text-weights random" in message and "no network" in message


def test_too_little_memory_is_told_in_one_line(videos, tmp_path, capsys, monkeypatch):
    ask = "train", videos / "train.csv", "-o", tmp_path / "run", *QUICK
    message = mistake(capsys, *ask, "--length", 10**12)  # more than there are addresses
    assert message.startswith("error: out of memory: can't allocate memory: you tried to allocate 256000000000000 ")
    assert message.endswith("; a smaller --batch-size or --length takes less\n")
    of_torch = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. If reserved memory is large"
    for error, told in (
        (torch.OutOfMemoryError(of_torch), "Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free; a smaller"),
        (MemoryError(), "the system gives no more; a smaller"),
    ):
        monkeypatch.setattr(commands, "train_on_list", raiser(error))
        assert told in mistake(capsys, *ask)
    monkeypatch.setattr(commands, "train_on_list", raiser(RuntimeError("a mistake of the library's own")))
    with pytest.raises(RuntimeError, match="of the library's own"):
        call(*ask)


def test_too_few_threads_are_told_in_one_line(videos, tmp_path, capsys, monkeypatch):
    """As in a container that may have only so many."""
    monkeypatch.setattr(threading, "_start_new_thread", raiser(RuntimeError("can't start new thread")))
    told = mistake(capsys, "train", videos / "train.csv", "-o", tmp_path / "run", *QUICK)
    assert told.startswith("error: out of threads: the system starts no more: ")


def raiser(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept is glibc's")
def test_memory_is_kept_between_steps():
    """Of a process before and after a command has asked for it; its own, as it cannot be asked back."""
    faults = """
import resource, torch
from avadclip_fast.cli import commands
def step(): [torch.empty(2**26 // 4).fill_(1) for _ in range(2)]  # 64 MiB, which glibc never keeps by itself
def faults():
    for _ in range(5): step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
commands._device("cpu")
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", faults], check=True, capture_output=True, text=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 10
