"""`avadclip-fast detect`: models trained on a stand-in encoder find what stands at known places in videos."""

import csv
import io
import json
import os
import re
import shutil
import signal
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import CLASSES, student, teacher
from standins import AXES, NAMED, WIDTH, Hearing, Sight, overlap, seen
from test_cli import call, mistake
from test_docs import ROOT, examples
from videos import BAD, bad_videos, damage, forbid, joined, make_video

from avadclip_fast import data
from avadclip_fast.cli.media import note_threshold
from avadclip_fast.data.atomic import write_csv
from avadclip_fast.engine import detect, search, timeline
from avadclip_fast.engine.calibrate import Calibration, Head
from avadclip_fast.engine.evaluate import stream_scores
from avadclip_fast.engine.timeline import _apart
from avadclip_fast.media import decode
from avadclip_fast.media.annotate import _drawn, _strip, annotate
from avadclip_fast.media.extract import Source
from avadclip_fast.media.features import Sampling, VideoFeatures
from avadclip_fast.models import AVadCLIP, AVadCLIPStudent

av = pytest.importorskip("av")

QUICK = [*NAMED, "--every", "5", "-q"]


def film(path, spans, frames=150, **options):
    """30 snippets of 5 frames at 25 a second: dark, but for (start, end, level) in snippets."""
    level = np.full(frames, 30)
    for start, end, of in spans:
        level[5 * start : 5 * end] = of
    return make_video(path, frames=frames, rate=25, grey=lambda i: level[i], **options)


def test_known_spans_are_found(pair, tmp_path, capsys):
    film(tmp_path / "a.mkv", [(4, 10, 120), (20, 26, 220)], audio=1, tone=(0, 6))
    film(tmp_path / "b.mkv", [(10, 16, 220)])
    film(tmp_path / "c.mkv", [], audio=1, tone=(0, 6))
    out = tmp_path / "out"
    assert call("detect", *(tmp_path / f"{x}.mkv" for x in "abc"), "-m", pair, "-o", out, *QUICK, "--per-frame") == 0
    said = capsys.readouterr().out
    records = {x: json.loads((out / f"{x}.json").read_text()) for x in "abc"}
    found = {x: [(e["class"], e["start"], e["end"]) for e in r["events"]] for x, r in records.items()}
    truth = {"a": [("fighting", 0.8, 2.0), ("explosion", 4.0, 5.2)], "b": [("explosion", 2.0, 3.2)]}
    for x, spans in truth.items():
        assert [name for name, *_ in found[x]] == [name for name, *_ in spans]
        for (_, start, end), (_, first, last) in zip(found[x], spans, strict=True):
            # the temporal encoder spreads what it sees over its neighbours
            assert overlap((start, end), first, last) >= 0.5, found[x]
    assert found["c"] == [] and "c: nothing found" in said
    assert [p["by"] for p in records["a"]["parts"]] == ["teacher"]
    assert records["b"]["parts"] == [{"start": 0, "end": 6, "by": "student", "why": "no sound track"}]
    assert "b: 00:00:00.000 - 00:00:06.000 scored by the student: no sound track" in said
    lines = list(csv.DictReader((out / "events.csv").read_text().splitlines()))
    assert [line["video"] for line in lines] == ["a", "a", "b"]
    assert lines[0]["start"] == detect.time_code(found["a"][0][1])
    frames = (out / "a.frames.csv").read_text().splitlines()
    assert frames[0] == "frame,score,normal,fighting,explosion" and len(frames) == 151
    scores = [float(line.split(",")[1]) for line in frames[5::5]]  # of the last frame of each snippet
    np.testing.assert_allclose(scores, records["a"]["snippets"]["score"], atol=1e-4)
    assert all((out / f"{x}.png").read_bytes().startswith(b"\x89PNG") for x in "abc")


def test_names_steer_no_terminal(pair, tmp_path, capsys):
    """Nor do classes, which come with a model."""
    film(tmp_path / "a\x1b[2J\n.mkv", [(10, 16, 220)])
    classes = "--classes", "normal,\x1b[2J\nfight,\x1b[2J\nfire"
    assert call("detect", tmp_path, "-m", pair / "student", "-o", tmp_path / "out", *classes, *QUICK) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"a\\x1b\[2J\\n: [\d:. -]+ \\x1b\[2J\\nfi\w+, score 0.\d+\nwrote .*/events.csv\n", said), said


def test_the_example_of_the_docs_finds_what_the_command_does(pair, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").symlink_to(pair)
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "camera.mp4", [(16, 48, 220)], frames=400, audio=1, tone=(0, 16))
    assert call("detect", "camera.mp4", "-m", pair, "-o", "out", *NAMED, "-q") == 0
    capsys.readouterr()
    (found,) = json.loads((tmp_path / "out" / "camera.json").read_text())["events"]
    monkeypatch.setattr("avadclip_fast.media.encoders.ClipVisual", lambda: Sight("cpu"))
    monkeypatch.setattr("avadclip_fast.media.wav2clip.Wav2Clip", lambda path: Hearing("cpu"))
    (code,) = [code for _, code, _ in examples(ROOT / "docs" / "videos.md") if "Sampling" in code]
    exec(code, {})  # noqa: S102
    start, end, name, score = capsys.readouterr().out.split()
    assert (float(start), float(end), name) == (found["start"], found["end"], found["class"])
    assert float(score) == pytest.approx(found["score"], abs=1e-5)


def test_annotated_copy(pair, tmp_path):
    """As many frames at the same times, the same sound, and red around what is part of an event.

    And what a killed call left of one an hour ago is removed. In a folder of its own, as the video is.
    """
    look = {"width": 160, "height": 121}
    inner, out = tmp_path / "in" / "day", tmp_path / "out" / "day"
    inner.mkdir(parents=True)
    film(inner / "a.mkv", [(18, 24, 220)], audio=2, tone=(0, 6), sound_codec="pcm_s16le", **look)
    out.mkdir(parents=True)
    (left := out / ".0123456789abcdef.tmp").touch()
    os.utime(left, (0, 0))
    given = ["detect", tmp_path / "in", "-m", pair, "-o", tmp_path / "out", *QUICK, "--no-plot", "--annotate"]
    assert call(*given) == 0
    assert (tmp_path / "out" / "events.csv").read_text().splitlines()[1].startswith("day/a,")
    (event,) = json.loads((out / "a.json").read_text())["events"]
    pictures = {}
    for name, path in {"given": inner / "a.mkv", "made": out / "a.mkv"}.items():
        with decode.opened(path) as container:
            stream = decode.video_stream(container, path)
            pictures[name] = [(t, f.to_ndarray(format="rgb24")) for t, f in decode.frames(path, stream, container)]
    np.testing.assert_allclose([t for t, _ in pictures["made"]], [t for t, _ in pictures["given"]], atol=2e-3)
    for at, image in pictures["made"]:
        assert image.shape == (120, 160, 3)
        red = image[60, 0].astype(int)
        assert (red[0] - red[2] > 60) == (event["start"] <= at < event["end"] - 1e-6), at
    sounds = [decode.read_sound(path).samples for path in (inner / "a.mkv", out / "a.mkv")]
    np.testing.assert_array_equal(*sounds)
    with av.open(str(out / "a.mkv")) as made:
        assert made.streams.audio[0].codec_context.name == "pcm_s16le"  # its packets as they were
    assert not left.exists()


def test_annotating_replaces_no_video(pair, tmp_path, capsys, monkeypatch):
    """Nor a list that is given, nor a video that is not searched for in the folder of the results."""
    path, inner = film(tmp_path / "a.mkv", []), tmp_path / "in"
    inner.mkdir()
    film(inner / "a.mkv", [])
    before = path.read_bytes(), (inner / "a.mkv").read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    options = ["-m", pair, *QUICK, "--visual-encoder", "no:encoder", "--annotate"]  # it is told before that is missed
    for given, out, kept in (
        ("a.mkv", ".", "a.mkv"), (tmp_path, tmp_path, path), ("link/a.mkv", tmp_path, "link/a.mkv"),
        ("a.mkv", "in", "in/a.mkv"), (tmp_path, "in", "in/a.mkv"),
    ):  # fmt: skip
        told = mistake(capsys, "detect", given, "-o", out, *options)
        assert told == f"error: {kept} would be overwritten by the results: give another folder with --output\n"
    (tmp_path / "events.csv").write_text("path\na.mkv\n")
    assert "events.csv would be overwritten" in mistake(capsys, "detect", "events.csv", "-o", ".", *options[:-1])
    assert (path.read_bytes(), (inner / "a.mkv").read_bytes()) == before and not list(tmp_path.rglob("*.json"))


def test_own_copies_are_not_taken_for_videos(pair, tmp_path, monkeypatch):
    """The folder of the results, by default within the one at hand, is searched only if it is given."""
    (tmp_path / "day").mkdir()
    film(tmp_path / "day" / "a.mkv", [])
    monkeypatch.chdir(tmp_path)
    same = ["-m", pair / "student", *QUICK, "--no-plot", "--annotate"]
    for given in (".", ".", tmp_path):
        assert call("detect", given, *same) == 0
        assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
            "day/a.mkv", "detections/day/a.json", "detections/day/a.mkv", "detections/events.csv",
        ]  # fmt: skip
    assert call("detect", "detections", "-o", "again", *same[:-1]) == 0
    assert (tmp_path / "again" / "day" / "a.json").is_file()


def test_copies_go_to_no_folder_that_is_searched(pair, tmp_path, capsys):
    """The next call would take them for videos of the same names."""
    film(tmp_path / "a.mp4", [])
    given = ["detect", tmp_path, "-o", tmp_path, "-m", pair / "student", *QUICK, "--no-plot"]
    assert "--annotate would write videos into" in mistake(capsys, *given, "--annotate")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert call(*given) == 0
    capsys.readouterr()
    assert call("detect", tmp_path / "gone.mp4", *given[2:], "--annotate") == 1  # which is no folder
    assert f"failed: {tmp_path / 'gone.mp4'}: " in capsys.readouterr().err


def test_sound_that_is_left_out_is_not_said_to_be_missing(pair, tmp_path, capsys):
    film(tmp_path / "a.mkv", [], audio=1, tone=(0, 6))
    options = [*QUICK, "--no-plot", "--audio-encoder", "none"]
    assert call("detect", tmp_path / "a.mkv", "-m", pair, "-o", tmp_path / "out", *options) == 0
    assert "scored by the student: sound is left out" in capsys.readouterr().out


SOUNDS = {  # that Matroska does not take: (suffix, codec, rate, channels)
    "G.711": (".mov", "pcm_alaw", 8000, 1),
    "IMA of AVI": (".avi", "adpcm_ima_wav", 22_050, 2),
    "Microsoft": (".avi", "adpcm_ms", 22_050, 1),
    "IMA of QuickTime": (".mov", "adpcm_ima_qt", 22_050, 2),
    "AMR": (".3gp", "libopencore_amrnb", 8000, 1),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_that_the_copy_cannot_hold_is_re_encoded(pair, tmp_path, capsys, name):
    suffix, codec, rate, channels = SOUNDS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg without {codec}")
    how = {"sound_codec": codec, "sample_rate": rate, "audio": channels, "tone": (1.0, 2.0)}
    path = film(tmp_path / f"a{suffix}", [(18, 24, 220)], **how)
    options = ["-o", tmp_path / "out", *QUICK, "--no-plot", "--annotate"]
    assert call("detect", path, "-m", pair / "student", *options) == 0
    assert "note: a" not in capsys.readouterr().err
    with av.open(str(tmp_path / "out" / "a.mkv")) as made:
        (stream,) = made.streams.audio
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("flac", rate, channels)
    sounds = [decode.read_sound(one) for one in (path, tmp_path / "out" / "a.mkv")]
    given, copied = (sound.windows(np.arange(300) * 0.02, 0.02) for sound in sounds)
    assert 48 <= given.heard().sum() <= 53 and (given.heard() != copied.heard()).sum() <= 1
    np.testing.assert_allclose(given[60:90].std(), copied[60:90].std(), rtol=1e-3)


def test_sound_that_nothing_decodes_is_left_out_and_told(pair, tmp_path, capsys):
    path = film(tmp_path / "a.mov", [], audio=1, sound_codec="pcm_alaw", sample_rate=8000, tone=(0, 6))
    path.write_bytes(path.read_bytes().replace(b"alaw", b"zzzz"))
    options = ["-o", tmp_path / "out", *QUICK, "--no-plot", "--annotate"]
    assert call("detect", path, "-m", pair / "student", *options) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "sound" in line]
    assert told == [f"note: {path}: the annotated copy has no sound: its codec cannot be re-encoded (no decoder)"]
    with av.open(str(tmp_path / "out" / "a.mkv")) as made:
        assert not made.streams.audio and len(list(made.decode(video=0))) == 150


def test_sound_of_more_channels_than_are_encoded_is_left_out_and_told(tmp_path):
    path = film(tmp_path / "a.mov", [], frames=30, audio=16, sound_codec="pcm_alaw", sample_rate=8000)
    told = annotate(path, tmp_path / "a.mkv", np.linspace(0, 1.2, 7), np.zeros(6), np.full(6, 0.5), [""] * 6)
    assert f"{path}: the annotated copy has no sound: pcm_alaw cannot be re-encoded" in told
    with av.open(str(tmp_path / "a.mkv")) as made:
        assert not made.streams.audio and len(list(made.decode(video=0))) == 30


def test_snippets_longer_than_events_are_told(pair, tmp_path, capsys):
    path = make_video(tmp_path / "slow.mkv", frames=20, rate=2, grey=lambda i: 30)
    for options, told in (("--every", 5), 1), (("--every", 2), 0), (("--fps", 0.4), 0):
        given = [path, "-m", pair / "student", "-o", tmp_path / "out", *NAMED, *options, "--no-plot", "-q"]
        assert call("detect", *given) == 0
        assert capsys.readouterr().err.count(f"note: {path}: a snippet of 5 frames lasts 2.5 s") == told


@pytest.mark.parametrize("width, height", [(2000, 3), (64, 1), (1, 64), (1, 1), (3, 2000)])
def test_frames_of_few_pixels_are_annotated(pair, tmp_path, width, height):
    path = make_video(tmp_path / "a.mkv", frames=10, width=width, height=height, codec="rawvideo", grey=lambda i: 220)
    options = ["-o", tmp_path / "out", *QUICK, "--annotate", "--threshold", "0"]
    assert call("detect", path, "-m", pair / "student", *options) == 0
    (frame, *_) = decode.snippet_frames(tmp_path / "out" / "a.mkv", every=5)
    assert frame.image.shape == (max(2, height // 2 * 2), max(2, width // 2 * 2), 3)


def test_long_names_fit_an_annotated_frame_in_one_line():
    plain, strip = np.zeros((640, 360, 3), np.uint8), np.zeros((80, 360, 3), np.uint8)
    edge = 5  # of the frame around it
    for name in ("fire", "a man who climbs\nover a high fence at night"):
        red = _drawn(plain, strip, np.arange(3.0), 0.5, 0.93, name)[edge:-85, edge:-edge, 0] > 128
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        assert len(columns) and columns[-1] < 360 - 3 * edge and np.ptp(rows) < 40


def test_what_cannot_be_drawn_leaves_what_was_found(pair, tmp_path, capsys, monkeypatch):
    """Whichever of the other results fails: the others are made, and the failure is told."""
    path, out = film(tmp_path / "a.mkv", [(10, 16, 220)]), tmp_path / "out"

    def broken(*_):
        raise ValueError("no\nroom")

    for name, ending in (("engine.timeline.timeline", "png"), ("media.annotate.annotate", "mkv")):
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(f"avadclip_fast.{name}", broken)
            assert call("detect", path, "-m", pair / "student", "-o", out, *QUICK, "--annotate", "--per-frame") == 1
        said = capsys.readouterr()
        assert f"failed: {path}: ValueError: no room ({out / f'a.{ending}'} alone was not written)\n" in said.err
        assert "explosion, score" in said.out
        assert len((out / "events.csv").read_text().splitlines()) == 2
        written = {"a.json", "a.png", "a.mkv", "a.frames.csv", "events.csv"} - {f"a.{ending}"}
        assert {p.name for p in out.iterdir()} == written


HOLE = np.r_[np.arange(250), 1500 + np.arange(250)] / 25  # ten seconds of frames, fifty without, and ten again


def with_a_hole(path, **options):
    """A fight from 8 s to the hole, and an explosion from 62 s to 64 s."""
    level = np.full(500, 30)
    level[200:250], level[300:350] = 120, 220
    return make_video(path, frames=500, rate=25, times=HOLE, grey=lambda i: level[i], **options)


def test_events_end_at_a_gap_in_the_footage(pair, tmp_path, capsys):
    path, out = with_a_hole(tmp_path / "a.mkv"), tmp_path / "out"
    assert call("detect", path, "-m", pair / "student", "-o", out, *QUICK, "--annotate") == 0
    said = capsys.readouterr().out
    record = json.loads((out / "a.json").read_text())
    fight, explosion = record["events"]
    assert fight["class"] == "fighting" and fight["end"] == 10.0 and overlap((fight["start"], 10.0), 8, 10) >= 0.5
    assert explosion["class"] == "explosion" and overlap((explosion["start"], explosion["end"]), 62, 64) >= 0.5
    assert [(part["start"], part["end"]) for part in record["parts"]] == [(0, 10), (60, 70)]
    assert len((out / "events.csv").read_text().splitlines()) == 3 and said.count("a: 00:") == 2
    capsys.readouterr()
    stream = ["--every", "5", "--longest", "60", "--delay", "30", "-q", *NAMED]
    assert call("stream", path, "-m", pair / "student", *stream) == 0
    streamed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for one, other in zip(record["events"], streamed, strict=True):
        assert one["class"] == other["class"]
        np.testing.assert_allclose([one["start"], one["end"]], [other["start"], other["end"]], atol=0.21)


def test_a_snippet_across_a_gap_ends_before_it(pair, tmp_path):
    """Of 250 frames, the last ten are in one snippet with six from after the gap."""
    path, out = with_a_hole(tmp_path / "a.mkv"), tmp_path / "out"
    options = [*NAMED, "--threshold", "0", "--no-plot", "-q"]
    assert call("detect", path, "-m", pair / "student", "-o", out, *options) == 0
    events = json.loads((out / "a.json").read_text())["events"]
    np.testing.assert_allclose([(e["start"], e["end"]) for e in events], [(0, 10.24), (60.24, 69.84)], atol=2e-3)


def test_few_frames_a_second_are_no_gap(pair, tmp_path):
    """Where a camera takes one frame a second while nothing moves, sixteen of them last long and are footage."""
    times = np.r_[np.arange(100) / 25, 4 + np.arange(32), 36 + np.arange(100) / 25]
    path = make_video(tmp_path / "a.mkv", frames=len(times), times=times, grey=lambda i: 220)
    options = [*NAMED, "--threshold", "0", "--no-plot", "-q"]
    assert call("detect", path, "-m", pair / "student", "-o", tmp_path / "out", *options) == 0
    (event,) = json.loads((tmp_path / "out" / "a.json").read_text())["events"]
    assert event["start"] == 0 and event["end"] > 36


@pytest.mark.parametrize("kind", ["sound", "silence", "none"])
def test_what_a_gap_separates_is_scored_like_two_videos(pair, kind):
    rng = np.random.default_rng(0)
    x = seen(rng.uniform(15, 220, 20)).numpy()
    sound = rng.uniform(0.1, 0.4, (20, 1)).astype(np.float32) * AXES[2].numpy()
    times, heard = np.r_[np.arange(12.0), 30 + np.arange(8.0)], np.full(20, kind == "sound")

    def scored(here):
        given = None if kind == "none" else sound[here]
        features = VideoFeatures(x[None, here], given, times[here], 1.0, heard[here])
        return detect.detect("x", features, detect.load_scorers(pair), threshold=0.0)

    whole, parts = scored(slice(None)), [scored(slice(0, 12)), scored(slice(12, 20))]
    assert whole.cuts == [12] and [(p.start, p.end) for p in whole.parts] == [(0, 12), (12, 20)]
    assert {p.why for p in whole.parts} == {p.why for part in parts for p in part.parts}
    np.testing.assert_array_equal(whole.probabilities, np.concatenate([part.probabilities for part in parts]))
    assert [e[:2] for e in whole.events()] == [(0.0, 12.0), (30.0, 38.0)]


def test_the_curve_is_high_where_the_score_is():
    strip = _strip(100, 40, np.arange(3.0), np.array([1.0, 0.0]), np.array([0.5, 0.5])).astype(int)
    blue = strip[..., 2] - strip[..., 0] > 60  # [height, width]
    for half, near, far in ((slice(10, 40), blue[:8], blue[8:]), (slice(60, 90), blue[-8:], blue[:-8])):
        assert near[:, half].any(0).all() and not far[:, half].any()


def test_threshold_and_classes(pair, tmp_path, capsys):
    film(tmp_path / "a.mkv", [(4, 9, 120)])
    out = tmp_path / "out"
    alone = ["-m", pair / "student", "-o", out, *QUICK, "--no-plot"]
    assert call("detect", tmp_path / "a.mkv", *alone, "--threshold", "0") == 0
    events = json.loads((out / "a.json").read_text())["events"]
    assert [(e["start"], e["end"]) for e in events] == [(0, 6)]
    assert call("detect", tmp_path / "a.mkv", *alone, "--classes", "normal, people brawling, fire") == 0
    assert json.loads((out / "a.json").read_text())["classes"] == ["normal", "people brawling", "fire"]
    assert call("detect", tmp_path / "a.mkv", *alone, "--classes", "A=normal, B1=brawl") == 0  # as train takes them
    assert json.loads((out / "a.json").read_text())["classes"] == ["normal", "brawl"]
    assert not list(out.glob("*.png"))
    capsys.readouterr()
    few, long = ("normal", "at least two"), ("normal," + "very " * 70, "tokens")
    for classes, wrong in (few, ("a,a", "different"), ("brawl,Normal", "normal must be the first"), long):
        assert wrong in mistake(capsys, "detect", tmp_path / "a.mkv", *alone, "--classes", classes)


@pytest.mark.parametrize("names", [["calm", "people brawling"], ["calm", "riot", "fire"], [*CLASSES, "fire"]])
def test_other_classes_are_saved(tmp_path, names):
    model = teacher()
    detect.set_classes(model, names)
    model.save_pretrained(tmp_path)
    loaded = AVadCLIP.from_pretrained(tmp_path)
    assert loaded.classes == names and torch.equal(loaded.encode_text(), model.encode_text())
    assert loaded.settings()["classes"] == names and len(loaded.align_loss.alpha) == len(names)


def test_a_threshold_that_nothing_calibrated_is_told(pair, tmp_path, capsys):
    """On stderr, by detect and stream: of each model that has none, unless --threshold is given."""
    film(tmp_path / "a.mkv", [])
    given = shutil.copytree(pair, tmp_path / "pair")
    none = "no calibrated threshold; using 0.5 (--threshold sets another)\n"

    def told():
        return [line for line in capsys.readouterr().err.splitlines(True) if line.startswith("note: ")]

    for command in (["detect", "-o", tmp_path / "out", "--no-plot"], ["stream"]):
        options = tmp_path / "a.mkv", "-m", given / "student", *QUICK
        assert call(*command, *options) == 0 and told() == [f"note: the model has {none}"]
        assert call(*command, *options, "--threshold", "0.5") == 0 and told() == []
    note_threshold(detect.load_scorers(given), None)
    assert told() == [f"note: the models have {none}"]
    Calibration(Head(1.2, 0.4), videos=4).save(given / "teacher" / "model")
    both = detect.load_scorers(given)
    note_threshold(both, None)
    assert told() == [f"note: one of the models has {none}"]
    note_threshold(both[:1], None)
    assert told() == []


class Impatient(Sight):
    """Is interrupted at a bright frame."""

    number, left = signal.SIGINT, None

    def __call__(self, images):
        if images.float().mean() > 240:
            if self.left is not None:
                shutil.copy(self.left / "events.csv", self.left / "then.csv")
            os.kill(os.getpid(), self.number)
            time.sleep(0.2)  # until it has arrived
        return super().__call__(images)


class Terminated(Impatient):
    number = signal.SIGTERM


@pytest.mark.parametrize("by", [Impatient, Terminated])
def test_an_interrupt_leaves_the_events_that_were_found(pair, tmp_path, capsys, monkeypatch, by):
    """Which were there before: SIGKILL leaves them too."""
    monkeypatch.setattr(by, "left", tmp_path / "out")
    film(tmp_path / "a.mkv", [(10, 16, 220)])
    film(tmp_path / "b.mkv", [(0, 80, 255)], frames=400)
    options, code = [*QUICK, "--visual-encoder", f"test_detect:{by.__name__}", "--no-plot"], 128 + by.number
    assert call("detect", tmp_path, "-m", pair / "student", "-o", tmp_path / "out", *options) == code
    lines = (tmp_path / "out" / "events.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("a,")
    assert (tmp_path / "out" / "then.csv").read_text().splitlines() == lines
    monkeypatch.setattr(by, "left", None)
    found = f"stopped by {by.number.name}; {tmp_path / 'out' / 'events.csv'} holds what was found so far\n"
    assert capsys.readouterr().err.endswith(f"error: {found}")
    assert call("detect", tmp_path / "b.mkv", "-m", pair / "student", "-o", tmp_path / "new", *options) == code
    assert "no video was finished" in capsys.readouterr().err and not list((tmp_path / "new").iterdir())


def test_events_of_earlier_calls_stay(pair, tmp_path, capsys):
    """Those of other videos, as their other results do; a file of someone else's is not replaced."""
    for name in "abc":
        film(tmp_path / f"{name}.mkv", [(10, 16, 220)])
    out, options = tmp_path / "out", ["-m", pair / "student", *QUICK, "--no-plot"]

    def found(*given):
        code = call("detect", *given, "-o", out, *options)
        return code, [line.partition(",")[0] for line in (out / "events.csv").read_text().splitlines()[1:]]

    assert found(tmp_path / "c.mkv", tmp_path / "a.mkv") == (0, ["a", "c"])
    assert found(tmp_path / "b.mkv", tmp_path / "c.mkv") == (0, ["a", "b", "c"])
    film(tmp_path / "a.mkv", [])
    assert found(tmp_path / "a.mkv") == (0, ["b", "c"])
    (tmp_path / "c.mkv").write_text("no video")
    assert found(tmp_path / "c.mkv") == (1, ["b", "c"])
    (out / "events.csv").write_text("video,notes\nb,mine\n")
    capsys.readouterr()
    told = mistake(capsys, "detect", tmp_path / "b.mkv", "-o", out, *options)
    assert "events.csv was not written by detect" in told and (out / "events.csv").read_text().endswith("mine\n")


def test_resuming_leaves_out_what_is_done(pair, tmp_path, capsys):
    """With the same models and options, of the same video, with all that is asked for."""
    for name in "ab":
        film(tmp_path / f"{name}.mkv", [(10, 16, 220)])
    given = ["detect", tmp_path, "-m", pair / "student", "-o", tmp_path / "out", *QUICK, "--no-plot"]
    assert call(*given) == 0
    film(tmp_path / "b.mkv", [(4, 10, 220)])
    for options, count in (((), 1), ((), 2), (("--per-frame",), 0), (("--threshold", "0.3"), 0)):
        capsys.readouterr()
        assert call(*given, "--resume", *options) == 0
        said = capsys.readouterr().out
        assert f"finished before: {count} of 2 videos\n" in said and ("a: 00:" in said) == (count == 0)
    whole = json.loads((tmp_path / "out" / "a.json").read_text())
    for events in ([{}], [1], None, [{**whole["events"][0], "start": "0"}]):  # changed by hand
        (tmp_path / "out" / "a.json").write_text(json.dumps({**whole, "events": events}))
        assert call(*given, "--resume", "--threshold", "0.3") == 0
        assert "finished before: 1 of 2 videos\n" in capsys.readouterr().out
        assert json.loads((tmp_path / "out" / "a.json").read_text()) == whole


def test_pictures_that_an_earlier_call_left_are_told(pair, tmp_path, capsys):
    """Beside results of other options, they show events that are found no more."""
    path = film(tmp_path / "a.mkv", [(10, 16, 220)])  # beside its results: no copy by an earlier call
    given = ["detect", path, "-m", pair / "student", "-o", tmp_path, *QUICK, "--threshold", "0.3"]
    told = "note: not written again, and still of an earlier call:"
    for options, left in (
        (["--per-frame"], ""),
        (["--no-plot", "--per-frame"], f"{told} {tmp_path / 'a.png'}\n"),
        (["--no-plot"], f"{told} {tmp_path / 'a.frames.csv'} and 1 more\n"),
        (["--no-plot", "--resume"], ""),
        (["--per-frame"], ""),
    ):
        assert call(*given, *options) == 0
        assert capsys.readouterr().err == left


def test_resuming_makes_anew_what_is_of_other_options(pair, tmp_path, capsys):
    """And adds events that the table has lost, as of calls that ended at once where folders cannot be locked."""
    film(tmp_path / "a.mkv", [(10, 16, 220)])
    out, given = tmp_path / "out", ["detect", tmp_path, "-m", pair / "student", "-o", tmp_path / "out", *QUICK]
    assert call(*given, "--per-frame", "--no-plot", "--classes", "normal,cat,dog") == 0
    assert call(*given, "--no-plot") == 0  # leaves the frames' scores as they are
    lines = (out / "events.csv").read_text()
    (out / "events.csv").unlink()
    capsys.readouterr()
    for options, count in ((("--per-frame", "--no-plot"), 0), (("--per-frame", "--no-plot"), 1), (("--no-plot",), 1)):
        assert call(*given, *options, "--resume") == 0
        assert f"finished before: {count} of 1 videos\n" in capsys.readouterr().out
        assert (out / "events.csv").read_text() == lines
        (out / "events.csv").unlink()
        for path in out.glob("a.*"):
            os.utime(path, (1, 1))  # a disk may know whole seconds alone
    assert (out / "a.frames.csv").read_text().startswith("frame,score,normal,fighting,explosion\n")


def test_settings_are_all_that_results_depend_on(pair):
    (scorer,), (other,) = (detect.load_scorers(pair / kind) for kind in ("student", "teacher"))
    rescaled = scorer._replace(calibration=Calibration(align=Head(1.5, 0.5)))
    made = [
        search.settings_of(scorers, threshold, {"every": every, "visual": ("clip", None)})
        for scorers, threshold, every in (
            ([scorer], None, 16), ([scorer], 0.5, 16), ([scorer], None, 8), ([other], None, 16), ([rescaled], None, 16),
        )
    ]  # fmt: skip
    assert len({json.dumps(each) for each in made}) == 5
    assert json.loads(json.dumps(made)) == made  # as they are read


def test_calls_that_share_a_folder_lose_no_events(tmp_path):
    def write(name):
        for i in range(5):
            search.write_events(tmp_path / "e.csv", {f"{name}{i}": [detect.event_record(by_hand().events()[0])]})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert len(search.read_events(tmp_path / "e.csv")) == 20


def test_a_video_that_grows_while_it_is_read_is_done_again(pair, tmp_path, capsys, monkeypatch):
    film(tmp_path / "a.mkv", [(10, 16, 220)])
    given = ["detect", tmp_path, "-m", pair / "student", "-o", tmp_path / "out", *QUICK, "--no-plot", "--resume"]
    scored = detect.detect

    def meanwhile(*args):
        film(tmp_path / "a.mkv", [(4, 10, 220)])
        return scored(*args)

    monkeypatch.setattr(search, "detect", meanwhile)
    assert call(*given) == 0
    monkeypatch.undo()
    for count in (0, 1):
        capsys.readouterr()
        assert call(*given) == 0
        assert f"finished before: {count} of 1 videos\n" in capsys.readouterr().out


def test_events_in_another_video_of_the_same_name_stay(pair, tmp_path, capsys, monkeypatch):
    """Wherever the call is made, and if that is gone; a moved video, or a record that is none, is in nobody's way."""
    for day, at in (("monday", 10), ("tuesday", 20)):
        (tmp_path / day).mkdir()
        film(tmp_path / day / "a.mkv", [(at, at + 6, 220)])
    given = ["detect", "a.mkv", "-m", pair / "student", "-o", tmp_path / "out", *QUICK, "--no-plot"]
    monkeypatch.chdir(tmp_path / "monday")
    assert call(*given) == call(*given) == 0
    capsys.readouterr()
    kept = [(tmp_path / "out" / name).read_bytes() for name in ("a.json", "events.csv")]
    monkeypatch.chdir(tmp_path / "tuesday")
    assert f"a.json is of {tmp_path / 'monday' / 'a.mkv'}, and would be replaced by" in mistake(capsys, *given)
    assert kept == [(tmp_path / "out" / name).read_bytes() for name in ("a.json", "events.csv")]
    (tmp_path / "monday").rename(tmp_path / "moved")
    told = f"a.json is of {tmp_path / 'monday' / 'a.mkv'}, which is gone, and would be replaced by"
    assert told in mistake(capsys, *given)
    assert kept == [(tmp_path / "out" / name).read_bytes() for name in ("a.json", "events.csv")]
    monkeypatch.chdir(tmp_path / "moved")
    assert call(*given) == 0
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    older = {**record, "video": str(tmp_path / "monday" / "a.mkv"), "file": None}
    monkeypatch.chdir(tmp_path / "tuesday")
    for text in (json.dumps(older), "[]", "{}", "{"):
        (tmp_path / "out" / "a.json").write_text(text)
        assert call(*given) == 0


def test_a_record_that_stops_nothing(tmp_path):
    """One that names no video, one of a video that is not there to be searched; and what is told of others."""
    path, video, other = tmp_path / "a.json", tmp_path / "a.mkv", tmp_path / "b.mkv"
    video.touch()
    other.write_text("longer")
    theirs = {"bytes": 1, "modified": 1}
    for name in (10**400, None, [], str(video)):
        path.write_text(json.dumps({"video": name, "file": theirs}))
        search.check_video(path, video)
    for gone in (str(other), str(tmp_path / "c.mkv")):
        path.write_text(json.dumps({"video": gone, "file": theirs}))
        search.check_video(path, tmp_path / "none.mkv")
        remedy = "their common folder as the videos" if gone == str(other) else f"remove {path}"
        with pytest.raises(data.DataError, match=f"give another folder with --output, or {re.escape(remedy)}"):
            search.check_video(path, video)
    event = detect.event_record(by_hand().events()[0])
    for start, done in ((0.5, True), (10**400, False)):
        events = [{**event, "start": start}]
        path.write_text(json.dumps({"settings": {}, "file": search.identity_of(video), "events": events}))
        assert search.done_with(path, video, {}) == (events if done else None)


def test_events_of_a_table(tmp_path):
    """Sorted by video, whichever was searched first; blank lines are none, and another table is told."""
    path, (first, second) = tmp_path / "events.csv", map(detect.event_record, by_hand().events())
    search.write_events(path, {"b": [first]})
    path.write_text(path.read_text() + "\n\n")
    search.write_events(path, {"a": [first, second]})
    assert [(row[0], row[3]) for row in search.read_events(path)] == [("a", "0.500"), ("a", "2.000"), ("b", "0.500")]
    for written, told in (
        (b"", "was not written by detect"), (b"\xff", "not a CSV file in UTF-8"), (b'"' + b"x" * 2**18, "not a CSV"),
    ):  # fmt: skip
        path.write_bytes(written)
        with pytest.raises(data.DataError, match=f"events.csv.* {told}"):
            search.read_events(path)


def test_rows_of_one_more_video_follow_those_there(tmp_path, monkeypatch):
    """All are not written for each of thousands of videos, but for one whose rows are replaced, and to sort them."""
    path, (first, second) = tmp_path / "events.csv", map(detect.event_record, by_hand().events())
    names, written = ['b "2", left', "b", "b\n3", *(f"{i % 7}/{i}" for i in range(50))], []
    monkeypatch.setattr(search, "write_csv", lambda path, rows: (written.append(path), write_csv(path, rows)))
    for name in names:
        search.add_events(path, name, [first, second])
    search.add_events(path, "nothing", [])
    assert len(written) == 1 and [row[0] for row in search.read_events(path)[::2]] == names
    for again in names[:4]:
        search.add_events(path, again, [second])
    assert len(written) == 5
    search.add_events(path, "a", [first])
    search.sort_events(path)
    search.sort_events(path)
    assert len(written) == 6
    table = path.read_bytes()
    path.unlink()
    events = {"a": [first]} | dict.fromkeys(names, [first, second]) | dict.fromkeys(names[:4], [second])
    search.write_events(path, events)
    assert path.read_bytes() == table


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path):
    """Of a video that is not done, as its other results follow."""
    path, (first, second) = tmp_path / "events.csv", map(detect.event_record, by_hand().events())
    search.write_events(path, {"a": [first]})
    whole = path.read_bytes()
    for name in ("b", "0"):
        path.write_bytes(whole + b"video,00:0")
        search.add_events(path, name, [second])
        assert sorted(row[0] for row in search.read_events(path)) == sorted(["a", name])


def test_drawing_tells_its_progress(monkeypatch):
    """By which it is interrupted."""
    given, told = [], lambda frames: None
    for name in ("engine.search.key_frames", "engine.timeline.timeline", "media.annotate.annotate"):
        monkeypatch.setattr(f"avadclip_fast.{name}", lambda *args: given.extend(args))
    source, found = Source(Path("a.mkv"), "a"), search.Found(by_hand(), 22, 0)
    for ending in ("png", "mkv"):
        search.illustrate(Path(f"a.{ending}"), source, found, Sampling(4), told)
    assert sum(each is told for each in given) == 2


def test_paths_of_a_list_have_a_root(pair, tmp_path, capsys):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "films.txt").write_text("../a.mkv\n")
    given = ["detect", tmp_path / "lists" / "films.txt", "-m", pair / "student", *QUICK, "--no-plot"]
    assert "name a --root that holds it" in mistake(capsys, *given, "-o", tmp_path / "out")
    film(tmp_path / "a.mkv", [])
    (tmp_path / "lists" / "films.txt").write_text("a.mkv\n")
    assert call(*given, "-o", tmp_path / "out", "--root", tmp_path) == 0
    assert (tmp_path / "out" / "a.json").is_file()


@pytest.mark.parametrize("frames, options", [(100, ["--fps", "0.3"]), (5, ["--every", "16"]), (100, ["--every", "20"])])
def test_no_event_ends_after_the_video(pair, tmp_path, capsys, frames, options):
    path = film(tmp_path / "a.mkv", [], frames=frames)
    given = [path, "-m", pair / "student", *NAMED, "-q", *options, "--threshold", "0"]
    assert call("detect", *given, "-o", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["events"][-1]["end"] == record["parts"][-1]["end"] == pytest.approx(frames / 25)
    capsys.readouterr()
    assert call("stream", *given) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["end"] == pytest.approx(frames / 25)


@pytest.mark.parametrize("turn, shape", [(0, Fraction(24, 11)), (-90, Fraction(11, 24))])
def test_an_annotated_copy_has_the_shape_of_its_video(pair, tmp_path, turn, shape):
    """Pixels of PAL are not square; those of a video that is turned are turned too."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(24, 11)
        if turn:
            stream.set_display_rotation(turn)
        for _ in range(10):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    options = ["-o", tmp_path / "out", *QUICK, "--no-plot", "--annotate"]
    assert call("detect", path, "-m", pair / "student", *options) == 0
    with av.open(str(tmp_path / "out" / "a.mkv")) as made:
        assert made.streams.video[0].sample_aspect_ratio == shape


def test_damaged_frames_are_left_out_and_told(pair, tmp_path, capsys):
    path = damage(make_video(tmp_path / "a.mp4", frames=100, noise=True))
    options = ["-o", tmp_path / "out", *QUICK, "--annotate", "--per-frame"]
    assert call("detect", path, "-m", pair / "student", *options) == 0
    assert f"note: {path}: damaged: 4 frames could not be decoded\n" in capsys.readouterr().err
    assert len((tmp_path / "out" / "a.frames.csv").read_text().splitlines()) == 97
    assert json.loads((tmp_path / "out" / "a.json").read_text())["parts"][-1]["end"] == pytest.approx(3.96)


def test_where_results_go_is_looked_at_first(pair, tmp_path, capsys):
    film(tmp_path / "a.mkv", [])
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        wrong = ["detect", tmp_path / "a.mkv", "-m", pair, "-o", out, *QUICK, "--visual-encoder", "no:encoder"]
        assert f"{out}: cannot be made" in mistake(capsys, *wrong)


def test_names_for_an_official_checkpoint(pair, tmp_path, capsys):
    """It does not hold them: as many as it has classes are taken for those, and of XD-Violence's seven, others."""
    film(tmp_path / "a.mkv", [(10, 16, 220)])
    model = AVadCLIPStudent.from_pretrained(pair / "student" / "model")
    model.to_official(tmp_path / "three.pth")
    given = ["detect", tmp_path / "a.mkv", "-m", tmp_path / "three.pth", "-o", tmp_path / "out", *QUICK, "--no-plot"]
    assert call(*given, "--classes", "normal, fighting, explosion", "--threshold", "0.5") == 0
    assert json.loads((tmp_path / "out/a.json").read_text())["classes"] == ["normal", "fighting", "explosion"]
    capsys.readouterr()
    assert "3 classes, 2 names" in mistake(capsys, *given, "--classes", "normal,fighting")
    assert "3 classes, 7 names" in mistake(capsys, *given)
    assert "different names" in mistake(capsys, *given, "--classes", "normal,normal,fire")


def test_a_name_that_is_not_utf_8_fails_alone(pair, tmp_path, capsys):
    film(tmp_path / "films.mkv", []).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mkv"))
    film(tmp_path / "a.mkv", [(10, 16, 220)])
    assert call("detect", tmp_path, "-m", pair / "student", "-o", tmp_path / "out", *QUICK, "--no-plot") == 1
    assert r"\xe9.mkv: its name is not UTF-8" in capsys.readouterr().err
    assert len((tmp_path / "out" / "events.csv").read_text().splitlines()) == 2


def test_a_name_for_which_neither_output_nor_fonts_have_letters(pair, tmp_path, monkeypatch, recwarn):
    path, written = film(tmp_path / "日本.mkv", [(10, 16, 220)]), io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "latin-1", write_through=True))
    assert call("detect", path, "-m", pair / "student", "-o", tmp_path / "out", *QUICK) == 0
    assert rb"\u65e5\u672c: 00:00:01.800" in written.getvalue()
    assert (tmp_path / "out" / "日本.png").is_file() and not [one for one in recwarn if "Glyph" in str(one.message)]


def test_an_annotated_copy_goes_on_where_time_stamps_begin_anew(pair, tmp_path):
    path = joined(tmp_path / "a.ts", 2, frames=100, audio=1, tone=(1.0, 1.6), sound_ends=4.5)
    options = [*QUICK, "--no-plot", "--annotate"]
    assert call("detect", path, "-m", pair / "student", "-o", tmp_path / "out", *options) == 0
    times = [frame.time for frame in decode.snippet_frames(tmp_path / "out" / "a.mkv", every=5)]
    np.testing.assert_allclose(times, np.arange(40) * 0.2, atol=2e-3)
    heard = decode.read_sound(tmp_path / "out" / "a.mkv").windows(np.arange(40) * 0.2, 0.2).heard()
    assert heard[5:8].all() and heard[25:28].all() and heard.sum() <= 10


def test_a_failure_is_told_at_the_end(pair, tmp_path, capsys):
    film(tmp_path / "a.mkv", [])
    (tmp_path / "b.mp4").write_text("no video")
    out = tmp_path / "out"
    assert call("detect", tmp_path, "-m", pair, "-o", out, *QUICK, "--no-plot") == 1
    said = capsys.readouterr()
    assert "b.mp4: not a video\n" in said.err and (out / "a.json").is_file() and not (out / "b.json").exists()
    wrong = ["-m", pair / "student", "--student", pair / "student", "-o", out, *QUICK]
    assert "must be a model that hears" in mistake(capsys, "detect", tmp_path, *wrong)
    assert "no model at" in mistake(capsys, "detect", tmp_path, "-m", tmp_path / "none", "-o", out, *QUICK)


def test_bad_input_is_told_and_leaves_nothing(pair, tmp_path, capsys, monkeypatch):
    films, out = bad_videos(tmp_path / "bad"), tmp_path / "out"
    (films / "locked").mkdir()
    make_video(films / "one.mkv", frames=1, width=35, height=51)  # a single frame of odd sizes is a video
    forbid(monkeypatch, films / "locked")
    options = ["-m", pair, "-o", out, *QUICK, "--annotate", "--per-frame"]
    assert call("detect", films, *options) == 1
    lines = capsys.readouterr().err.splitlines()
    told = {line.removeprefix(f"failed: {films}/").partition(":")[0]: line for line in lines if "failed:" in line}
    assert set(told) == {*BAD, "locked"} and told["locked"].endswith("Permission denied")
    for name, wrong in BAD.items():
        assert re.search(wrong, told[name]), told[name]
    made = ["events.csv", "one.frames.csv", "one.json", "one.mkv", "one.png"]
    assert sorted(path.name for path in out.iterdir()) == made
    assert call("detect", films / "text.mp4", "-m", pair, "-o", tmp_path / "none", *QUICK) == 1
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.parametrize(
    "heard, expected",
    [
        ("1111", [(0, 4, True, "sound")]),
        ("0000", [(0, 4, False, "the sound track is silent")]),
        ("1101", [(0, 4, True, "sound")]),  # a pause
        ("11" + "0" * 6, [(0, 2, True, "sound"), (2, 8, False, "the sound ends")]),
        ("0" * 5 + "1" + "0" * 4, [(0, 5, False, "silent"), (5, 10, True, "sound")]),
    ],
)
def test_parts_of_sound(heard, expected):
    mask = np.array([x == "1" for x in heard])
    assert list(detect.sound_parts(mask, "", np.ones(len(mask)))) == expected
    assert list(detect.sound_parts(mask, "no sound track", np.ones(len(mask)))) == [
        (0, len(mask), False, "no sound track")
    ]


def test_a_pause_is_told_by_its_seconds():
    heard = np.arange(8) < 2  # then six snippets of silence
    assert list(detect.sound_parts(heard, "", np.full(8, 0.5))) == [(0, 8, True, "sound")]
    assert [part[:3] for part in detect.sound_parts(heard, "", np.ones(8))] == [(0, 2, True), (2, 8, False)]


def test_a_silence_in_which_frames_are_fewer_lasts_as_long_as_they_do(pair):
    """Ten snippets of half a second, then four of three seconds: as many frames each."""
    times = np.array([*np.arange(10) / 2, *range(5, 17, 3)])
    visual, heard = np.zeros((1, 14, WIDTH), np.float32), np.arange(14) < 10
    found = VideoFeatures(visual, visual[0], times, 0.5, heard)
    parts = detect.detect("a", found, detect.load_scorers(pair)).parts
    assert [(part.start, part.end, part.by) for part in parts] == [(0, 10, "teacher"), (10, 14, "student")]


def test_sound_that_ends_is_taken_over_by_the_student(pair):
    """Each part is scored by its own model, and with its own threshold; the silence changes no score before it."""
    rng = np.random.default_rng(0)
    x = (seen(rng.uniform(15, 220, 20)).numpy(), rng.uniform(0.1, 0.4, (20, 1)).astype(np.float32) * AXES[2].numpy())
    heard = np.arange(20) < 12
    times = np.arange(20.0)
    scorers = [
        s._replace(calibration=Calibration(align=Head(1.0, t)))
        for s, t in zip(detect.load_scorers(pair), (0.3, 0.7), strict=True)
    ]
    found = detect.detect("x", VideoFeatures(x[0][None], x[1], times, 1.0, heard), scorers)
    assert [(p.start, p.end, p.by) for p in found.parts] == [(0, 12, "teacher"), (12, 20, "student")]
    cut = detect.detect("x", VideoFeatures(x[0][None, :12], x[1][:12], times[:12], 1.0, heard[:12]), scorers)
    np.testing.assert_array_equal(found.scores[:12], cut.scores)
    whole = detect.detect("x", VideoFeatures(x[0][None], None, times, 1.0, np.zeros(20, bool)), scorers[1:])
    np.testing.assert_array_equal(found.scores[12:], whole.scores[12:])
    assert found.thresholds.tolist() == [0.3] * 12 + [0.7] * 8
    teacher, only = scorers[0], scorers[:1]
    deaf = detect.detect("x", VideoFeatures(x[0][None], x[1], times, 1.0, heard), only)
    assert deaf.parts[1].by == "teacher without sound"
    np.testing.assert_array_equal(deaf.scores[12:], 1 - detect.score(teacher, x[0], None, "cpu").probabilities[12:, 0])


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_hours_are_scored_in_parts(pair, kind):
    """What is padded and computed at once is bounded, however long a video is; the scores are those of the whole."""
    (scorer,) = detect.load_scorers(pair / kind)
    most = []
    scorer.model.register_forward_pre_hook(lambda _, given: most.append(len(given[0])))
    x = seen(np.random.default_rng(0).uniform(15, 220, 32 * 100 + 5)).numpy()
    sound = None if kind == "student" else seen(np.random.default_rng(1).uniform(15, 220, len(x))).numpy()
    tracemalloc.start()
    found = detect.score(scorer, x, sound, "cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    given = x.nbytes + (0 if sound is None else sound.nbytes)
    assert most == [16] * 6 + [5] and peak < given  # not a padded copy of the whole
    chunks, lengths = data.chunk(x, 32)
    heard = None if sound is None else data.chunk(sound, 32)[0]
    video = data.TestVideo("", chunks, heard, lengths, len(x))
    (whole,) = stream_scores(scorer.model, [video], calibration=scorer.calibration)
    np.testing.assert_allclose(found.probabilities, whole.probabilities, atol=1e-6)
    np.testing.assert_allclose(found.anomaly, whole.anomaly, atol=1e-6)


def test_motion_is_that_of_the_whole_video_in_every_part(pair):
    """Of a model that takes it: what is computed in parts sees the rows before and after them."""
    (scorer,) = detect.load_scorers(pair / "student")
    torch.manual_seed(0)
    model = AVadCLIPStudent(**{**scorer.model.settings(), "motion": True, "standardize": ["visual"]}).eval()
    x = seen(np.random.default_rng(0).uniform(15, 220, 32 * 20 + 5)).numpy()
    found = detect.score(scorer._replace(model=model), x, None, "cpu")
    chunks, lengths = data.chunk(data.with_motion(x), 32)
    (whole,) = stream_scores(
        model, [data.TestVideo("", chunks, None, lengths, len(x))], calibration=scorer.calibration, text=scorer.text
    )
    np.testing.assert_allclose(found.probabilities, whole.probabilities, atol=1e-6)


def test_names_in_the_plot_do_not_cover_one_another():
    events = [detect.Event(i, i + 1, str(i), 1 - abs(i - 50) / 100, 1.0) for i in range(0, 100, 2)]
    shown = _apart(events, 0, 100, lambda name: 10)
    assert shown[0] == (50.5, "50") and len(shown) == 9  # the highest first
    middles = sorted(middle for middle, _ in shown)
    assert min(np.diff(middles)) >= 10 and middles[0] >= 5 and middles[-1] <= 95
    assert _apart([detect.Event(0, 9, "a\nfire", 1.0, 1.0)], 0, 9, len)[0][1] == "a?fire"  # in its line


def test_plot_names_each_kind_of_part_once_and_keeps_names_inside(monkeypatch):
    drawn = []
    monkeypatch.setattr(timeline, "save", lambda figure, path: drawn.append(figure))
    n = 1000
    normal = np.full(n, 0.9, np.float32)
    normal[[*range(3), *range(500, 510), n - 1]] = 0.1
    probabilities = np.stack([normal, 1 - normal], 1)
    parts = [
        detect.Part(0, 300, "teacher", "sound"),
        *(detect.Part(i, i + 100, "student", "silent") for i in (300, 500)),
        detect.Part(400, 500, "teacher", "sound"),
        detect.Part(900, n, "student", "the sound ends"),
    ]
    for seconds in (12.6, 0.5, 0.004):
        times = np.arange(n) * seconds
        arguments = ["normal", "fighting, $long$ name"], times, seconds, np.zeros(n), probabilities, np.full(n, 0.5)
        timeline.timeline("x.png", detect.Detection("x" * 250, *arguments, parts), {1: np.zeros((9, 16, 3), np.uint8)})
    for figure, last in zip(drawn, ("3:30:00", "8:00", "0:04.0"), strict=True):
        figure.draw_without_rendering()
        image, ax = figure.axes
        assert image.get_title().endswith("  score 0.90") and len(figure.get_suptitle()) == 90
        said = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(said) == ["event", "score", "student: silent", "student: the sound ends", "threshold"]
        inside = ax.get_window_extent()
        assert len(ax.texts) == 3
        for text in ax.texts:
            box = text.get_window_extent()
            assert inside.x0 <= box.x0 < box.x1 <= inside.x1
        low, high = ax.get_xlim()
        ticks = [t.get_text() for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]
        assert ticks[-1] == last and 4 <= len(ticks) <= 11, ticks


def by_hand() -> detect.Detection:
    """Five snippets of half a second; two events, of two and of one snippet."""
    p = np.array([[0.9, 0.1, 0.0], [0.4, 0.5, 0.1], [0.2, 0.4, 0.4], [0.8, 0.1, 0.1], [0.1, 0.2, 0.7]])
    classes, parts = ["normal", "fighting", "explosion"], [detect.Part(0, 5, "student", "no sound track")]
    return detect.Detection("x", classes, np.arange(5) / 2, 0.5, np.arange(5) / 5, p, np.full(5, 0.5), parts)


def test_events_are_those_of_the_probabilities():
    first, second = by_hand().events()
    # the highest score, and the mean of the class
    assert first[:3] == (0.5, 1.5, "fighting") and first[3:] == pytest.approx((0.8, 0.45))
    assert second[:3] == (2.0, 2.5, "explosion") and second[3:] == pytest.approx((0.9, 0.7))


def test_what_is_written_is_what_was_found(tmp_path):
    found = by_hand()
    search.write_events(tmp_path / "e.csv", {"x": [detect.event_record(e) for e in found.events()]})
    assert (tmp_path / "e.csv").read_text().splitlines()[1:] == [
        "x,00:00:00.500,00:00:01.500,0.500,1.500,fighting,0.8000",
        "x,00:00:02.000,00:00:02.500,2.000,2.500,explosion,0.9000",
    ]
    search.write_frame_scores(tmp_path / "f.csv", found, 22, 4)  # two frames more than there are whole snippets
    header, *lines = csv.reader((tmp_path / "f.csv").read_text().splitlines())
    scores = np.append(found.scores.repeat(4), [0.9, 0.9])
    np.testing.assert_allclose([float(line[1]) for line in lines], scores, atol=1e-6)
    assert [line[0] for line in lines] == [str(i) for i in range(22)] and lines[5][2:] == ["0.4000", "0.5000", "0.1000"]
    written = search.as_record(found, "x.mkv")["snippets"]
    np.testing.assert_allclose(written["score"], found.scores, atol=1e-6)
    np.testing.assert_allclose(written["anomaly"], found.anomaly, atol=1e-6)


def test_a_record_is_of_what_was_found():
    found = by_hand()
    found.thresholds = np.array([0.5, 0.4, 0.3, 0.6, 0.7])
    record = search.as_record(found, "x.mkv")
    assert record["snippets"]["threshold"] == found.thresholds.tolist()
    assert record["snippets"]["probabilities"] == found.probabilities.tolist()
    assert record["snippets"]["time"] == [0, 0.5, 1, 1.5, 2]
    assert record["parts"] == [{"start": 0, "end": 2.5, "by": "student", "why": "no sound track"}]
    assert record["events"][0] == {
        "start": 0.5, "end": 1.5, "start_code": "00:00:00.500", "end_code": "00:00:01.500", "class": "fighting",
        "score": 0.8, "probability": 0.45,
    }  # fmt: skip


def test_the_snippets_that_are_shown():
    found = by_hand()
    assert detect.best_snippets(found) == [2, 4] and detect.best_snippets(found, 1) == [4]
    found.thresholds[:] = 1.0
    assert detect.best_snippets(found) == [4]  # of no event, the highest


def test_models_of_other_classes_do_not_go_together(pair, tmp_path):
    shutil.copytree(pair / "student" / "model", tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["classes"][1] = "riot"
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.DataError, match="know other classes"):
        detect.load_scorers(pair / "teacher", tmp_path / "student")


def test_two_models_that_hear_do_not_go_together(pair):
    with pytest.raises(data.DataError, match="must be a model that hears, and .* one that does not"):
        detect.load_scorers(pair / "teacher", pair / "teacher")


def test_a_student_of_the_sound_alone_looks_at_no_video():
    with pytest.raises(data.DataError, match="a student of the sound alone cannot look at videos"):
        detect.check_widths(student(modality="audio"), 32, 32)


@pytest.mark.parametrize(
    ("late", "wait", "gap"),
    [(-0.1, None, False), (0.1, None, True), (0.1, -0.1, False), (0.1, 0.1, True), (-0.1, 0.1, False)],
)
def test_a_gap_is_a_pause_after_the_end_of_a_snippet(late, wait, gap):
    """Of two seconds, by how much more than a pause: the next one comes late, and there is no frame."""
    waits = None if wait is None else np.array([0, 0, detect.PAUSE + wait])
    times = np.array([0, 2, 4 + detect.PAUSE + late])
    found = VideoFeatures(np.zeros((1, 3, 4)), None, times, 2.0, np.zeros(3, bool), waits=waits)
    assert detect.cuts_of(found) == ([2] if gap else [])


def test_gaps_are_left_out_of_what_is_shown():
    found = by_hand()
    found.times, found.cuts = np.array([0, 0.5, 60.0, 60.5, 61.0]), [2]
    assert [event[:2] for event in found.events()] == [(0.5, 1.0), (60.0, 60.5), (61.0, 61.5)]
    edges, scores, thresholds, names = found.curve()
    assert edges.tolist() == [0, 0.5, 1.0, 60.0, 60.5, 61.0, 61.5]
    np.testing.assert_allclose(scores, [0.1, 0.6, np.nan, 0.8, 0.2, 0.9])
    assert np.isnan(thresholds).tolist() == [False, False, True, False, False, False]
    assert names == ["", "fighting", "", "fighting", "", "explosion"]
    assert detect.best_snippets(found) == [1, 2, 4]
    blue = _strip(62, 40, edges, scores, thresholds).astype(int)
    assert not (blue[:, 5:55] != blue[0, 10]).any()  # no line in the hole


def with_events(count: int, kind: type[detect.Detection] = detect.Detection) -> detect.Detection:
    """Every other snippet is an event and a part of its own."""
    n = 2 * count
    p = np.tile([[0.9, 0.1], [0.1, 0.9]], (count, 1))
    parts = [detect.Part(i, i + 1, "student" if i % 2 else "teacher", "silent") for i in range(n)]
    return kind("x", ["normal", "fighting"], np.arange(n) / 2, 0.5, p[:, 1], p, np.full(n, 0.5), parts)


def test_work_grows_with_a_video_alone_and_not_with_its_events_too():
    class Counting(detect.Detection):
        computed = 0

        @property
        def ends(self):
            self.computed += 1
            return super().ends

        @property
        def scores(self):
            self.computed += 1
            return super().scores

    def computed(count: int) -> int:
        found = with_events(count, Counting)
        found.events(), found.curve(), search.as_record(found, "x.mp4")
        detect.summary(found), detect.best_snippets(found)
        return found.computed

    assert computed(2) == computed(50)


def test_names_in_a_timeline_are_measured_once(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import RendererAgg

    measure, asked = RendererAgg.get_text_width_height_descent, []

    def asking(*args, **options):
        asked.append(args[1])
        return measure(*args, **options)

    monkeypatch.setattr(RendererAgg, "get_text_width_height_descent", asking)
    timeline.timeline(tmp_path / "x.png", with_events(200), {})
    assert "fighting" in asked and len(asked) < 200


def test_what_ends_at_a_gap_is_not_the_end_of_the_sound():
    heard, lasts, at = np.arange(20) < 2, np.ones(20), [9]
    parts = [(0, 2, True, "sound"), (2, 9, False, "silent"), (9, 20, False, "the sound ends")]
    assert list(detect.sound_parts(heard, "", lasts, at)) == parts
    assert [part[3] for part in detect.sound_parts(heard & False, "", lasts, at)] == ["the sound track is silent"] * 2
    assert [part[:2] for part in detect.sound_parts(heard, "no sound track", lasts, at)] == [(0, 9), (9, 20)]


def test_time_codes():
    assert detect.time_code(0) == "00:00:00.000" and detect.time_code(3661.9996) == "01:01:02.000"
    assert detect.time_code(36_000) == "10:00:00.000"
