"""Streams: sources that never end, snippets of them, and events told as they come."""

import contextlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from standins import NAMED, WIDTH, Hearing, Sight, overlap
from test_cli import call, mistake
from test_detect import Impatient, Terminated, film
from test_docs import ROOT, examples
from videos import BAD, bad_videos, joined, make_video

from avadclip_fast.data import DataError
from avadclip_fast.engine import detect
from avadclip_fast.engine.calibrate import Calibration, Head
from avadclip_fast.engine.online import OnlineDetector
from avadclip_fast.media import MediaError, decode
from avadclip_fast.media import live as live_module
from avadclip_fast.media.decode import Clock
from avadclip_fast.media.live import WAITING, LiveSource, Placed, Ring
from avadclip_fast.media.wav2clip import Wav2Clip
from avadclip_fast.models.encoder import Standardize

pytest.importorskip("av")

SECONDS = 0.2  # of a snippet
LOUD = 0.3 * np.sin(np.arange(round(SECONDS * 16_000)) / 6).astype(np.float32)


def grey(level):
    return np.full((48, 64, 3), level, np.uint8)


def online(pair, teacher=True, **options):
    scorers = detect.load_scorers(pair if teacher else pair / "student")
    return OnlineDetector(scorers, Sight("cpu"), Hearing("cpu"), seconds=SECONDS, **options)


def pushed(detector, levels):
    """(number of the snippet, event) of every event that was told."""
    return [(i, event) for i, level in enumerate(levels) for event in detector.push(grey(level))]


def test_events_are_told_as_they_end(pair):
    levels = np.full(40, 30)
    levels[12:20] = 220
    detector = online(pair, teacher=False)
    ((at, event),) = pushed(detector, levels)
    assert event.name == "explosion" and overlap((event.start, event.end), 12 * SECONDS, 20 * SECONDS) >= 0.5
    assert at == round(event.end / SECONDS)  # told by the first snippet that is no part of it
    assert detector.by == "student" and detector.flush() == []
    ((later, same),) = pushed(online(pair, teacher=False, delay=3), levels)
    assert later == round(same.end / SECONDS) + 3 and overlap((same.start, same.end), 12 * SECONDS, 20 * SECONDS) >= 0.5


def test_a_long_event_is_told_in_parts_and_the_last_by_flush(pair):
    detector = online(pair, teacher=False, longest=1.0)
    events = [event for _, event in pushed(detector, np.full(23, 220))] + detector.flush()
    assert len(events) >= 4 and all(a.end == pytest.approx(b.start) for a, b in zip(events, events[1:], strict=False))
    assert all(e.end - e.start == pytest.approx(1.0) for e in events[:-1]) and events[-1].end == pytest.approx(23 * 0.2)
    assert detector.flush() == []


def test_the_loop_of_the_docs_loses_no_event(pair, tmp_path, capsys, monkeypatch):
    """Nor one that goes on as the snippets end."""
    (tmp_path / "runs").symlink_to(pair)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("avadclip_fast.media.encoders.ClipVisual", lambda: Sight("cpu"))
    monkeypatch.setattr("avadclip_fast.media.wav2clip.Wav2Clip", lambda path: Hearing("cpu"))
    (code,) = [code for _, code, _ in examples(ROOT / "docs" / "videos.md") if "OnlineDetector" in code]
    for levels in ([30] * 8 + [220] * 4, [30] * 8 + [220] * 4 + [30] * 8):
        exec(code, {"snippets": [(grey(level), None) for level in levels]})  # noqa: S102
        (line,) = capsys.readouterr().out.splitlines()
        assert " explosion " in line


def test_the_student_takes_over_after_a_pause(pair):
    detector = online(pair)
    by = []
    for i in range(70):
        detector.push(grey(30), LOUD if i < 10 or i >= 60 else np.zeros_like(LOUD))
        by.append(detector.by)
    pause = round(detect.PAUSE / SECONDS)
    assert set(by[: 10 + pause - 1]) == {"teacher"} and set(by[10 + pause : 60]) == {"student"}
    assert set(by[60:]) == {"teacher"}
    detector.push(grey(30), None)  # no sound any more is silence too
    assert detector.by == "teacher"


@pytest.mark.parametrize("lost", [(), (3, 7)], ids=["all heard", "some sound lost"])
def test_the_teacher_scores_what_sounds_as_detect_does(pair, lost):
    """The newest score is the last one of a video that ends there; a snippet that came without sound has zeros."""
    detector = online(pair)
    levels = np.random.default_rng(0).integers(20, 220, 15)
    for i, level in enumerate(levels):
        detector.push(grey(level), None if i in lost else LOUD)
    seen = Sight("cpu")(torch.stack([torch.full((3, 32, 32), int(x), dtype=torch.uint8) for x in levels])).numpy()
    heard = np.stack([Hearing("cpu")(LOUD[None])[0].numpy()] * 15)
    heard[list(lost)] = 0
    scores = detect.score(detector.scorers[0], seen, heard, "cpu").probabilities
    assert detector.score == pytest.approx(1 - scores[-1, 0], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snippet_that_came_without_sound_is_silence_to_a_standardised_teacher(pair, dtype):
    """As no sound at all is: the mean of what it heard in training, not zeros."""
    scorers = detect.load_scorers(pair / "teacher")
    model = scorers[0].model
    model.standardize["audio"] = Standardize(WIDTH)
    model.standardize["audio"].fit(torch.full((WIDTH,), 3.0), torch.ones(WIDTH))
    model.to(dtype)
    detector = OnlineDetector(scorers, Sight("cpu"), Hearing("cpu"), seconds=SECONDS)
    detector.push(grey(30), LOUD)
    detector.push(grey(30), None)
    assert not model._input("audio", torch.from_numpy(detector._heard[-1])[None, None].to(dtype), None).any()


def test_a_teacher_sees_what_sounds_alone(pair):
    """As in `detect`, whose parts of a video are scored each on its own: what came before the sound has no say."""
    detector = online(pair)
    levels = np.random.default_rng(0).integers(20, 220, 12)
    for i, level in enumerate(levels):
        detector.push(grey(level), LOUD if i >= 8 else np.zeros_like(LOUD))
    images = torch.stack([torch.full((3, 32, 32), int(x), dtype=torch.uint8) for x in levels[8:]])
    heard = np.stack([Hearing("cpu")(LOUD[None])[0].numpy()] * 4)
    scores = detect.score(detector.scorers[0], Sight("cpu")(images).numpy(), heard, "cpu").probabilities
    assert detector.by == "teacher" and detector.score == pytest.approx(1 - scores[-1, 0], abs=1e-5)


def test_what_waits_is_scored_in_sight_of_all_that_came(pair):
    """With a delay as long as a video, a stream gives the events that `detect` does."""
    detector = online(pair, teacher=False, delay=20, threshold=0.0)
    levels = np.random.default_rng(0).integers(20, 220, 15)
    assert pushed(detector, levels) == []
    (event,) = detector.flush()
    images = torch.stack([torch.full((3, 32, 32), int(x), dtype=torch.uint8) for x in levels])
    scored = detect.score(detector.scorers[0], Sight("cpu")(images).numpy(), None, "cpu").probabilities
    expected = detect.event_of(0.0, 15 * SECONDS, detector.scorers[0].model.classes, scored)
    assert event.name == expected.name
    assert (event.start, event.end, *event[3:]) == pytest.approx((0.0, 15 * SECONDS, *expected[3:]), abs=1e-5)


@pytest.mark.parametrize("delay", [0, 10, 31])
def test_whoever_scores_has_its_own_threshold(pair, delay):
    """A teacher that never alarms, and a student that always does: it takes over what waits and did not sound."""
    heads = Head(threshold=1.1), Head(threshold=0.0)
    both = zip(detect.load_scorers(pair), heads, strict=True)
    scorers = [scorer._replace(calibration=Calibration(align=head)) for scorer, head in both]
    detector = OnlineDetector(scorers, Sight("cpu"), Hearing("cpu"), seconds=SECONDS, delay=delay, longest=60)
    for i in range(32):
        assert detector.push(grey(30), LOUD if i < 5 else np.zeros_like(LOUD)) == []
    (event,) = detector.flush()
    first = 5 + round(detect.PAUSE / SECONDS) - 1  # the student's
    assert event.start == pytest.approx(max(first - delay, 5) * SECONDS) and event.end == pytest.approx(32 * SECONDS)


def test_a_pause_is_told_by_the_clock(pair):
    """Where a slow source or reader leaves snippets out, a second a snippet."""
    detector, by = online(pair), []
    for i in range(12):
        detector.push(grey(30), LOUD if i < 3 else None, float(i))
        by.append(detector.by)
    pause = int(detect.PAUSE)
    assert by == ["teacher"] * (3 + pause) + ["student"] * (9 - pause)


def test_a_pause_is_no_gap(pair):
    detector = online(pair)
    detector.push(grey(220), LOUD, 0.0)
    late = detect.PAUSE + SECONDS - 0.1  # after the end of the snippet before, less than a pause
    assert detector.push(grey(220), LOUD, late) == [] and len(detector._seen) == 2
    detector.push(grey(220), LOUD, late + detect.PAUSE + SECONDS + 0.1)
    assert len(detector._seen) == 1


def test_a_gap_begins_afresh_and_memory_is_bounded(pair):
    detector = online(pair, window=8)
    for i in range(40):
        detector.push(grey(220), LOUD, i * SECONDS)
    assert len(detector._seen) == len(detector._heard) == 8 and len(detector._open) <= 10 / SECONDS
    told = detector.push(grey(30), LOUD, 100.0)
    assert [round(e.end, 3) for e in told] == [8.0] and len(detector._seen) == 1


def test_what_does_not_fit_is_refused(pair):
    scorers = detect.load_scorers(pair)
    wide = Sight("cpu")
    wide.width = 768
    with pytest.raises(DataError, match="768 numbers a snippet, the model takes 64"):
        OnlineDetector(scorers, wide, seconds=SECONDS)
    with pytest.raises(DataError, match="window must be from 1 to the model's length of 32 snippets; got 33"):
        online(pair, window=33)
    with pytest.raises(DataError, match="less than the window"):
        online(pair, window=4, delay=4)
    with pytest.raises(DataError, match="seconds must be above 0; got 0.0: a LiveSource knows it with its first"):
        OnlineDetector(scorers, Sight("cpu"), seconds=LiveSource("a.mkv").seconds)


def test_frames_and_sound_of_another_form_are_refused(pair):
    """Samples as cameras and OpenCV give them would be scored as something else; BGR turned by a view is taken."""
    detector = online(pair)
    for audio in ((LOUD * 32767).astype(np.int16), np.stack([LOUD, LOUD], 1)):
        with pytest.raises(DataError, match=r"audio must be \(n,\) float in \[-1, 1\]; got .*: divide int16"):
            detector.push(grey(30), audio)
    for frame in (grey(30)[..., 0], grey(30) / 255, np.full((48, 64, 4), 30, np.uint8)):
        with pytest.raises(DataError, match=r"a frame must be \(H, W, 3\) uint8 RGB; got \(48, 64"):
            detector.push(frame, LOUD)
    detector.push(grey(30)[..., ::-1], LOUD)
    assert len(detector._seen) == 1


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_sound_of_another_rate_is_refused(pair, rate):
    """It would be cut to its first third, slowed down. Times tell that a snippet is longer."""
    detector = online(pair)
    long = np.resize(LOUD, round(SECONDS * rate))
    with pytest.raises(DataError, match=rf"audio has {len(long)} samples, and a snippet of 0.2 s has 3200 at 16000 Hz"):
        detector.push(grey(30), long)
    detector.push(grey(30), long, 0.0)
    detector.push(grey(30), np.resize(LOUD, 2 * len(LOUD)))
    assert len(detector._heard) == 2 and np.array_equal(*detector._heard)


@pytest.mark.parametrize("failing", ["visual", "audio", "model"])
@pytest.mark.parametrize("time", [5 * SECONDS, 100.0], ids=["next", "after a gap"])
def test_a_snippet_that_fails_leaves_nothing(pair, monkeypatch, failing, time):
    """Its sight would go with the sound of another, and of the events that a gap ends nobody would hear."""
    detector, other = online(pair, threshold=0.0, delay=2), online(pair, threshold=0.0, delay=2)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    for i, level in enumerate((30, 120, 220, 30, 120)):
        assert detector.push(grey(level), LOUD * i / 5) == other.push(grey(level), LOUD * i / 5)
    teacher = detector.scorers[0].model
    where = {"visual": (Sight, "__call__"), "audio": (Hearing, "__call__"), "model": (teacher, "infer")}
    with monkeypatch.context() as patch:
        patch.setattr(*where[failing], fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            detector.push(grey(220), LOUD, time)
    for level in (220, 30, 120):
        assert detector.push(grey(level), LOUD, time) == other.push(grey(level), LOUD, time)
        time += SECONDS
    assert detector.score == other.score and detector.flush() == other.flush()


def test_times_that_fall_back_are_refused(pair):
    """An event would end before it began, and never last `longest`: as of a camera whose clock is set back."""
    detector = online(pair, teacher=False, threshold=0.0)
    assert detector.push(grey(220), None, 1000.0) == []
    for at in (0.0, 999.9, float("nan")):
        with pytest.raises(DataError, match=rf"times must increase; got {at} after 1000.0: call flush\(\)"):
            detector.push(grey(220), None, at)
    (event,) = detector.flush()
    assert (event.start, event.end) == (1000.0, 1000.0 + SECONDS)
    assert detector.push(grey(220), None, 0.0) == []
    assert [one.start for one in detector.flush()] == [0.0]


def narrow_wav2clip():
    """With random weights, as wide as the models are here."""
    encoder = Wav2Clip("random")
    encoder.transform.sequential[3], encoder.width = torch.nn.Linear(512, WIDTH), WIDTH
    return encoder


def test_wav2clip_is_standardised_by_the_window(pair):
    """Given the same snippets, the last is embedded as it is within the whole."""
    encoder = narrow_wav2clip()
    detector = OnlineDetector(detect.load_scorers(pair), Sight("cpu"), encoder, seconds=SECONDS)
    windows = np.random.default_rng(0).normal(0, 0.1, (5, len(LOUD))).astype(np.float32)
    windows *= np.array([1, 3, 0.2, 2, 1], np.float32)[:, None]
    for samples in windows:
        detector.push(grey(30), samples)
    # 1e-3: its statistics weigh by n, the whole's by n - 1
    torch.testing.assert_close(torch.from_numpy(detector._heard[-1]), encoder(windows)[-1], rtol=1e-3, atol=1e-3)


def test_sound_before_the_window_has_no_part_in_its_standard(pair):
    encoder, scorers = narrow_wav2clip(), detect.load_scorers(pair)

    def last(sounds):
        detector = OnlineDetector(scorers, Sight("cpu"), encoder, seconds=SECONDS, window=4)
        for samples in sounds:
            detector.push(grey(30), samples)
        return detector._heard[-1]

    quiet = np.random.default_rng(0).normal(0, 0.01, len(LOUD)).astype(np.float32)
    np.testing.assert_array_equal(last([LOUD, None, None, None, quiet]), last([quiet]))


# --- sources ---


@pytest.fixture
def server():
    """serve(bodies) -> address: each connection is given the next body, slowly if told; then it is refused."""
    running = []

    def serve(bodies, rate=None):
        left = list(bodies)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if not left:
                    return self.send_error(404)
                self.send_response(200)
                self.end_headers()  # no length: FFmpeg cannot know where it ends
                body = left.pop(0)
                try:
                    for start in range(0, len(body), 1880):
                        self.wfile.write(body[start : start + 1880])
                        if rate:
                            time.sleep(1880 / rate)
                except OSError:
                    pass  # the reader has gone

            def log_message(self, *_):
                pass

        one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        one.daemon_threads = True
        threading.Thread(target=one.serve_forever, daemon=True).start()
        running.append(one)
        return f"http://127.0.0.1:{one.server_port}/live.ts"

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


def test_a_file_is_read_whole_however_slowly_it_is_fetched(tmp_path):
    path = make_video(tmp_path / "a.mkv", frames=100, audio=2, tone=(0.64, 1.28))
    live = LiveSource(path)
    snippets = []
    for snippet in live:
        time.sleep(0.02)
        snippets.append(snippet)
    assert [round(s.time / 0.64) for s in snippets] == list(range(7)) and live.seconds == pytest.approx(0.64)
    assert [round(float(s.image.mean())) // 8 for s in snippets[:3]] == [0, 8, 16]  # frame i is a grey of 4 * i
    assert [bool(np.abs(s.sound).max() > 0.1) for s in snippets[:4]] == [False, True, False, False]
    assert (live.frames, live.dropped, live.reconnects) == (100, 0, 0) and not live.live


def test_a_file_that_tells_no_duration_is_a_file(tmp_path):
    """As browsers record: nothing of it is dropped, and where it ends it is over."""
    live = LiveSource(make_video(tmp_path / "a.mkv", frames=200, options={"live": "1"}), every=4, retries=0)
    snippets = []
    for snippet in live:
        time.sleep(0.01)
        snippets.append(snippet)
    assert len(snippets) == 50 and (live.frames, live.dropped, live.reconnects) == (200, 0, 0) and not live.live


@pytest.mark.parametrize("rate, threads", [(1, "SLICE"), (5, "AUTO")])
def test_few_frames_a_second_are_heard_on_many_processors(tmp_path, monkeypatch, rate, threads):
    """Each thread that decodes a frame of its own gives it a frame later, and the sound is a buffer of seconds."""
    path = make_video(tmp_path / "a.mp4", frames=40 * rate, rate=rate, audio=1, tone=(20, 30))
    of_one, opened = live_module.video_stream, []

    def of_many(*given):
        opened.append(of_one(*given))
        opened[0].codec_context.thread_count = 16
        return opened[0]

    monkeypatch.setattr(live_module, "video_stream", of_many)
    heard = {snippet.time: np.abs(snippet.sound).max() > 0.1 for snippet in LiveSource(path, fps=1)}
    assert [time for time in heard if heard[time]] == pytest.approx(range(20, 30)) and len(heard) == 40
    assert opened[0].thread_type.name == threads  # those of a file are as many as its sound has room for


def test_sound_that_is_far_behind_its_frames_in_a_file_is_heard(tmp_path):
    """As in VOB and MPG of a still scene, whose frames take few bytes."""
    path = make_video(
        tmp_path / "a.vob", frames=300, audio=1, tone=(0, 12), grey=lambda i: 100, codec="mpeg2video", sound_codec="mp2"
    )
    assert all(np.abs(snippet.sound[: 16_000 // 4]).max() > 0.1 for snippet in LiveSource(path))


def test_frames_that_wait_for_sound_that_has_ended_take_bounded_memory(tmp_path, monkeypatch):
    """Of 4K, five seconds of frames are 3 GB."""
    path = make_video(tmp_path / "a.mkv", frames=250, audio=1, tone=(0, 1), sound_ends=1.0)
    monkeypatch.setattr(live_module, "IMAGES", 20 * 48 * 64 * 3)
    made, most = LiveSource._made, []
    monkeypatch.setattr(
        LiveSource, "_made", lambda live, waiting, *rest: most.append(len(waiting)) or made(live, waiting, *rest)
    )
    snippets = list(LiveSource(path, every=1))
    assert len(snippets) == 250 and max(most) < 21 + 2 * live_module.THREADS  # whose last frames come at once
    assert [np.abs(s.sound).max() > 0.1 for s in snippets] == [True] * 25 + [False] * 225


def without_rate(path, frames):
    """A video as browsers record them, of frames at odd times and without a rate. Returns its path, and the times."""
    times = np.cumsum(np.random.default_rng(0).integers(20, 61, frames)) / 1000
    data = make_video(path, frames=frames, times=times, codec="libvpx").read_bytes()
    at = data.index(b"\x23\xe3\x83\x84")  # the rate, 4 bytes: void instead
    path.write_bytes(data[:at] + b"\xec\x86" + bytes(6) + data[at + 8 :])
    return path, times


def test_the_ticks_of_a_clock_are_no_frame_rate(tmp_path):
    """FFmpeg guesses 1000 a second."""
    path, times = without_rate(tmp_path / "a.webm", 300)
    live = LiveSource(path)
    frames = [snippet.frames for snippet in live]
    assert live.seconds == pytest.approx(16 / 25) and len(frames) == int(times[-1] / 0.64) + 1 and sum(frames) == 300


def test_a_stream_whose_time_stamps_begin_anew_goes_on(tmp_path):
    path = joined(tmp_path / "a.ts", 3, frames=100, audio=1, tone=(1.0, 1.6), sound_ends=4.5)
    snippets = list(LiveSource(path, every=5))
    np.testing.assert_allclose([s.time for s in snippets], np.arange(60) * 0.2, atol=1e-3)
    clock = decode.Clock()
    list(decode.snippet_frames(path, every=5, clock=clock))
    windows = decode.read_sound(path, clock).windows(np.array([s.time for s in snippets]), 0.2)[0:60]
    heard = [int(np.abs(snippet.sound).max() > 0.1) for snippet in snippets]
    assert all(sum(heard[k + 5 : k + 8]) == 3 and sum(heard[k : k + 20]) <= 5 for k in (0, 20, 40))
    # 1e-4: int16; but for the two frames of sound at a joint, of which either may win
    assert sum(np.abs(s.sound - w).max() > 1e-4 for s, w in zip(snippets, windows, strict=True)) <= 4


def test_sound_waits_for_the_frames_to_jump():
    clock = Clock(25)
    sound = Placed(5.0, clock)
    block = np.ones(640, np.float32)
    sound.add(7.0, block)  # before the first frame
    assert len(sound.samples) == 0

    def frame(at):
        clock(SimpleNamespace(time=at))
        sound.settle()

    frame(7.0)
    assert sound.end == pytest.approx(0.04) and sound.take(0.0, 640).all()
    for i in range(1, 50):
        frame(7.0 + 0.04 * i)
        sound.add(7.0 + 0.04 * i, block)
    sound.add(0.0, 2 * block)  # it jumps first
    assert sound.end == pytest.approx(2.0)
    frame(0.0)  # at 2.0 s
    assert sound.end == pytest.approx(2.04) and (sound.take(2.0, 640) == 2).all()
    sound.add(7.0 + 2.04, 3 * block)  # from before the jump, late
    assert sound.end == pytest.approx(2.08) and (sound.take(2.04, 640) == 3).all()


def test_sound_with_a_damaged_time_stamp_does_not_silence_what_follows():
    """As of a camera that loses packets: hours ahead, it would leave no room for sound until a new connection."""
    clock = Clock(25)
    sound = Placed(5.0, clock)
    block = np.ones(640, np.float32)

    def frame(at):
        clock(SimpleNamespace(time=at))
        sound.settle()

    for i in range(50):
        frame(0.04 * i)
        sound.add(0.04 * i + 90_000.0 * (20 <= i < 25), block)
    assert sound.end == pytest.approx(2.0) and sound.take(1.0, 16_000).all() and not sound.take(0.8, 3200).any()
    sound.add(3600.0, 2 * block)  # a gap in both, in which sound is first
    assert sound.end == pytest.approx(2.0)
    frame(3600.0)
    assert sound.end == pytest.approx(3600.04) and (sound.take(3600.0, 640) == 2).all()


def test_a_slow_fetcher_of_a_live_stream_loses_snippets_not_time(tmp_path, server):
    body = make_video(tmp_path / "a.ts", frames=100, audio=1).read_bytes()
    live = LiveSource(server([body]), every=1, retries=0)
    fetched, most = [], 0
    with pytest.raises(MediaError, match="not back after 0 tries"):
        for snippet in live:
            most = max(most, live._queue.qsize())
            time.sleep(0.1)
            fetched.append(snippet)
    assert live.live and live.dropped > 0 and most <= WAITING
    assert live.frames == live.dropped + sum(snippet.frames for snippet in fetched) >= 90  # a few die with the line
    assert fetched[-1].time >= 90 * 0.04  # the newest are never what is dropped


def test_what_a_server_sends_at_once_waits_for_its_time(tmp_path, server):
    """As the segments of HLS: whoever fetches as fast as time passes loses nothing of them."""
    body = make_video(tmp_path / "a.ts", frames=100, audio=1).read_bytes()
    live = LiveSource(server([body]), every=4, retries=0)
    fetched = 0
    with pytest.raises(MediaError, match="not back after 0 tries"):
        for snippet in live:
            time.sleep(0.05)
            fetched += snippet.frames
    assert live.live and fetched >= 90  # a few die with the line


@pytest.mark.parametrize(("segment", "wait"), [(10, 0.0), (1, 0.0), (1, 0.5)], ids=["segments", "frames", "slow"])
def test_what_comes_later_than_the_first_has_as_much_time(segment, wait, monkeypatch):
    """Segments whose delay has grown since the first, as by a clock's drift, are not dropped as they come.

    segment: snippets that come at once. wait: seconds for which whoever fetches holds up the reader, until one is due
    """
    now, late, dues = 0.0, 1.5, []
    live = LiveSource("udp://camera", retries=0)
    live.live = True
    monkeypatch.setattr(live_module, "time", SimpleNamespace(monotonic=lambda: now))

    def snippets(offset):
        nonlocal now
        offset()
        for i in range(1000):
            first = i - i % segment
            now = max(now, 0.2 * first + (late if i >= segment else 0.0))
            yield live_module.Snippet(0.2 * i, grey(0), None, 5, 0.2)

    def put(item, due=None):
        nonlocal now
        if isinstance(item, live_module.Snippet):
            dues.append((item.time + late - 0.2 * (round(item.time / 0.2) % segment), due))
            now = max(now, min(due, now + wait))

    monkeypatch.setattr(live, "_snippets", snippets)
    monkeypatch.setattr(live, "_put", put)
    live._read()
    came, due = np.array(dues[segment:]).T
    place = np.arange(len(due)) % segment  # in its segment
    assert (due - came >= 0.198 * place - 1e-6).all()  # those before it are scored meanwhile, as fast as time passes
    assert (due - came <= 0.2 * (segment - 1) + 1e-6).all()  # and no later, however long that takes


def test_a_lost_connection_is_made_again(tmp_path, server):
    body = make_video(tmp_path / "a.ts", frames=64, audio=1).read_bytes()
    live = LiveSource(server([body, body], rate=2e6), every=16, retries=1)
    times = []
    with pytest.raises(MediaError, match="not back after 1 tries"):
        for snippet in live:
            times.append(snippet.time)
    # of a line that breaks, the last snippet is not whole
    assert 6 <= len(times) <= 8 and live.reconnects == 2 and 120 <= live.frames <= 128
    assert (np.diff(times) > 0.5).all()  # they go on, and never run backwards
    with pytest.raises(MediaError, match="was read already: make another"):
        next(iter(live))


def test_a_camera_may_be_away_for_days(tmp_path, server, monkeypatch):
    """As many tries as are asked for: the pauses between them end to grow."""
    monkeypatch.setattr(live_module, "LONGEST_PAUSE", 0.0)
    address, opened = server([make_video(tmp_path / "a.ts", frames=64).read_bytes()]), live_module.opened

    def away(source, live=False):
        if watched.reconnects:
            raise MediaError(f"{source}: away")
        return opened(source, live=live)

    monkeypatch.setattr(live_module, "opened", away)
    watched = LiveSource(address, retries=1100)
    with pytest.raises(MediaError, match="away; not back after 1100 tries"):
        list(watched)


def test_what_connecting_takes_is_part_of_the_time(tmp_path, server, monkeypatch):
    body = make_video(tmp_path / "a.ts", frames=64).read_bytes()
    live = LiveSource(server([body, body], rate=2e6), every=16, retries=1)
    opened = live_module.opened

    def late(*given, **named):
        time.sleep(3.0 if live.reconnects == 1 else 0)
        return opened(*given, **named)

    monkeypatch.setattr(live_module, "opened", late)
    times = []
    with pytest.raises(MediaError, match="not back after 1 tries"):
        for snippet in live:
            times.append(snippet.time)
    assert not [at for at in times if 2.0 < at < 3.0] and times[-1] > 3.0


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_snippets_of_a_millisecond_clock_have_as_many_frames(tmp_path, suffix):
    path = make_video(tmp_path / f"a{suffix}", frames=160, rate=30)
    assert [snippet.frames for snippet in LiveSource(path, every=16)] == [16] * 10
    assert [snippet.frames for snippet in LiveSource(path, fps=30)] == [1] * 160


def test_sources_that_are_none(tmp_path, server):
    for source, wrong in (
        (server([]), "not a readable video"),
        (tmp_path / "none.mp4", "no such file"),
        ("file:///etc/passwd", "file:// is not read"),
        ("ftp://x/y.mp4", "ftp:// is not read"),
        ("concat:a.mp4|b.mp4", "no such file"),
    ):
        with pytest.raises(MediaError, match=wrong):
            next(iter(LiveSource(source)))


def test_the_login_of_a_camera_is_told_nobody(pair, tmp_path, capsys, server):
    """Not where it is refused, nor with its events, which are kept in logs."""
    assert str(MediaError("rtsp://me:sec@ret#@camera/1: lost (a@b)")) == "rtsp://***@camera/1: lost (a@b)"
    for plain in ("http://camera:80/a@b and a@b: lost", "udp://@239.0.0.1:1234: lost"):
        assert str(MediaError(plain)) == plain
    source = server([film(tmp_path / "a.ts", [(12, 20, 220)]).read_bytes()]).replace("//", "//me:secret@")
    camera = "rtsp://me:secret@127.0.0.1:1/a"
    with pytest.raises(MediaError) as refused:
        next(iter(LiveSource(camera)))
    assert "secret" not in "".join(traceback.format_exception(refused.value))  # as a program's log has it
    command = "stream", source, "-m", pair / "student", "--every", "5", "--retries", "0", "-q", *NAMED
    assert call(*command) == 2  # lost at its end
    said = capsys.readouterr()
    shown = source.replace("me:secret", "***")
    assert {json.loads(line)["source"] for line in said.out.splitlines()} == {shown}
    assert f"error: {shown}: " in said.err and "secret" not in said.err


def test_a_source_that_sends_nothing_is_told(monkeypatch):
    monkeypatch.setattr(decode, "WAIT", 0.5)
    for source in ("udp://127.0.0.1:0", "UDP://127.0.0.1:0"):
        with pytest.raises(MediaError, match=f"^{source}: not a readable video: timed out after 0.5 s$"):
            next(iter(LiveSource(source)))


def test_bad_files_are_told_in_a_line(pair, tmp_path, capsys):
    films = bad_videos(tmp_path / "bad")
    for name, wrong in {**BAD, "none.mp4": "no such file", ".": "a folder, not a video"}.items():
        assert call("stream", films / name, "-m", pair, "-q", *NAMED) == 2
        *counts, told = capsys.readouterr().err.splitlines()
        assert told.startswith("error: ") and re.search(wrong, told), told
        assert len(counts) == 2 * (name in ("cut.mp4", "half.mkv"))  # half was watched: the threshold, what was read
    make_video(films / "one.mkv", frames=1, width=35, height=51)  # a single frame of odd sizes is a video
    assert call("stream", films / "one.mkv", "-m", pair, "-q", *NAMED) == 0
    assert "1 frames, 0 dropped" in capsys.readouterr().err


def test_a_playlist_leads_to_no_file(tmp_path, server):
    """What a server sends cannot make this machine read its own files."""
    film = make_video(tmp_path / "a.ts", frames=50)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{film}\n#EXT-X-ENDLIST\n".encode()
    with pytest.raises(MediaError):
        list(LiveSource(server([playlist] * 4), retries=0))
    (tmp_path / "list.m3u8").write_bytes(playlist)
    with pytest.raises(MediaError):
        list(LiveSource(tmp_path / "list.m3u8"))
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with socket.socket(type=socket.SOCK_DGRAM) as sender:

        def send():
            for _ in range(10):
                sender.sendto(playlist, ("127.0.0.1", port))
                time.sleep(0.1)

        (sending := threading.Thread(target=send)).start()
        with pytest.raises(MediaError, match="not a"):  # and not "lost after 48 frames"
            list(LiveSource(f"udp://127.0.0.1:{port}/list.m3u8?timeout=500000", retries=0))
        sending.join()


def test_one_iterator_reads(tmp_path):
    """A second one, after a look at the first snippet, would be given half of the snippets twice and others never."""
    live = LiveSource(make_video(tmp_path / "a.mkv", frames=100), every=5)
    snippets = iter(live)
    assert next(snippets).time == 0
    with pytest.raises(MediaError, match="was read already: .*, or keep the iterator"):
        list(live)
    assert len(list(snippets)) == 19 and live.frames == 100


def test_it_ends_when_asked(tmp_path, server):
    body = make_video(tmp_path / "a.ts", frames=250).read_bytes()
    asked = threading.Event()
    live = LiveSource(server([body], rate=2e4), until=asked.is_set)
    seen = 0
    for _ in live:
        seen += 1
        asked.set()
    assert seen == 1


def test_ring_keeps_the_last_seconds():
    ring = Ring(1.0)
    ring.add(5.0, np.full(8000, 1, np.float32))
    ring.add(5.75, np.full(8000, 2, np.float32))  # a quarter of a second is missing
    assert ring.end == pytest.approx(6.25) and len(ring.samples) == 16_000
    assert ring.take(5.4, 8000)[[0, 1599, 1601, 5599, 5601, 7999]].tolist() == [1, 1, 0, 0, 2, 2]
    assert not ring.take(0.0, 100).any() and not ring.take(9.0, 100).any()
    ring.add(5.75, np.full(16_000, 3, np.float32))  # half of it is there already
    assert ring.end == pytest.approx(6.75) and ring.take(6.25, 8000).tolist() == [3] * 8000


def test_an_event_ends_with_the_last_frame(pair, tmp_path, capsys):
    """Three frames are left of the last snippet; of one that is alone, too."""
    for name, frames, rate, ends in (("a", 153, 25, 6.12), ("b", 3, 10, 0.3)):
        make_video(tmp_path / f"{name}.mkv", frames=frames, rate=rate, grey=lambda i: 220)
        options = ["--every", "5", "--longest", "60", "--threshold", "0", "-q", *NAMED]
        assert call("stream", tmp_path / f"{name}.mkv", "-m", pair / "student", *options) == 0
        (line,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert line["end"] == pytest.approx(ends, abs=2e-3)


def test_lines_are_not_glued_to_the_progress_bar(pair, tmp_path, monkeypatch):
    """As a terminal shows both: what is told begins at the start of a line."""
    film(tmp_path / "a.mkv", [(12, 20, 220)])
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    assert call("stream", tmp_path / "a.mkv", "-m", pair / "student", "--every", "5", *NAMED) == 0
    shown = terminal.getvalue()
    assert re.search(r'[\r\n]\{"source": .+\}\n', shown) and re.search(r"[\r\n]150 frames, 0 dropped", shown)


def test_a_frame_rate_that_is_not_declared_is_told_once(pair, tmp_path, capsys):
    path, _ = without_rate(tmp_path / "a.webm", 40)
    make_video(tmp_path / "declared.webm", frames=40, codec="libvpx")
    note = "declares no frame rate, and 25 a second are assumed: 5 frames last 0.20 s (--fps sets snippets per second)"
    options = "-m", pair / "student", "-q", *NAMED
    for source, how, count in (
        (path, ("--every", "5"), 1),
        (path, ("--fps", "5"), 0),
        (tmp_path / "declared.webm", ("--every", "5"), 0),
    ):
        assert call("stream", source, *how, *options) == 0
        assert capsys.readouterr().err.count(f"note: {source}: {note}\n") == count


def test_stream_command(pair, tmp_path, capsys):
    film(tmp_path / "a.mkv", [(12, 20, 220)], audio=1, tone=(0, 6))
    assert call("stream", tmp_path / "a.mkv", "-m", pair, "--every", "5", *NAMED) == 0
    said = capsys.readouterr()
    (line,) = map(json.loads, said.out.splitlines())  # nothing else on standard output
    assert line["class"] == "explosion" and line["source"].endswith("a.mkv") and "clock" not in line
    assert overlap((line["start"], line["end"]), 2.4, 4) >= 0.5
    assert "scored by the teacher" in said.err and "150 frames, 0 dropped; connected again 0 times" in said.err
    assert "no such file" in mistake(capsys, "stream", tmp_path / "none.mkv", "-m", pair, "-q", *NAMED)
    assert "gopher:// is not read" in mistake(capsys, "stream", "gopher://x", "-m", pair, "-q", *NAMED)


@pytest.mark.parametrize("source", ["-", "/dev/stdin", "/dev/fd/0"])
def test_standard_input_is_watched_to_its_end(source, pair, tmp_path, capsys, monkeypatch):
    """As a camera is, which has no duration, but without looking for more of it afterwards."""
    monkeypatch.setattr(live_module, "WAITING", 50)  # all snippets: none is dropped on a machine that is busy
    command = "stream", source, "-m", pair / "student", "--every", "5", "--retries", "1", "-q", *NAMED
    before = os.dup(0)
    path = film(tmp_path / "a.ts", [(12, 20, 220)], frames=125)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as fed:
        try:
            os.dup2(fed.stdout.fileno(), 0)
            assert call(*command) == 0
            said = capsys.readouterr()
            assert mistake(capsys, *command).startswith(f"error: {source}: ")  # nothing is left
        finally:
            os.dup2(before, 0)
            os.close(before)
    (line,) = map(json.loads, said.out.splitlines())
    assert line["source"] == source and line["class"] == "explosion" and "clock" in line
    assert said.err.endswith("125 frames, 0 dropped; connected again 0 times\n")


def test_standard_input_that_another_process_made_non_blocking_is_waited_for(tmp_path):
    path = make_video(tmp_path / "a.ts", frames=50)
    before, (received, sent) = os.dup(0), os.pipe()
    os.set_blocking(received, False)

    def feed():
        with open(sent, "wb") as pipe:
            pipe.write(path.read_bytes())

    try:
        os.dup2(received, 0)
        threading.Timer(0.5, feed).start()
        assert sum(snippet.frames for snippet in LiveSource("-", every=5)) == 50
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(received)


def test_a_terminal_is_no_standard_input_to_watch(pair, capsys, monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda file: True)
    said = mistake(capsys, "stream", "-", "-m", pair / "student", "-q", *NAMED)
    assert "standard input is a terminal; pipe a video into it" in said


def test_an_event_goes_through_a_pipe_at_once(pair, tmp_path, monkeypatch):
    """Not when some kilobytes of events have come together, which may be days later."""
    film(tmp_path / "a.mkv", [(12, 20, 220)])
    pipe = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(pipe)))
    assert call("stream", tmp_path / "a.mkv", "-m", pair / "student", "--every", "5", "-q", *NAMED) == 0
    assert json.loads(pipe.getvalue())["class"] == "explosion"


def test_the_clock_of_a_live_stream_is_that_of_its_first_frame(pair, tmp_path, capsys, server, monkeypatch):
    """Not of its first snippet, which comes when it has ended: here one of four seconds, sent in two."""
    body, opened, before = film(tmp_path / "a.ts", [], frames=150).read_bytes(), live_module.opened, []

    @contextlib.contextmanager
    def noted(*given, **named):
        with opened(*given, **named) as container:
            before.append(datetime.now(UTC))
            yield container

    monkeypatch.setattr(live_module, "opened", noted)
    options = ["--fps", "0.25", "--threshold", "0", "--longest", "60", "--retries", "0", "-q", *NAMED]
    assert call("stream", server([body], rate=len(body) / 3), "-m", pair / "student", *options) == 2  # lost at its end
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["start"] == 0 and -0.001 <= (datetime.fromisoformat(line["clock"]) - before[0]).total_seconds() < 1


def test_the_clock_of_a_stream_is_that_of_the_system_as_it_is_set_later(tmp_path, monkeypatch):
    """As on a small computer without a clock of its own, which asks a server for the time after it has booted."""
    source = LiveSource(make_video(tmp_path / "a.mkv"))
    assert source.began is None and list(source)
    before, hours = source.began, timedelta(hours=5)
    monkeypatch.setattr(live_module, "datetime", SimpleNamespace(now=lambda zone: datetime.now(zone) + hours))
    assert abs(source.began - before - hours) < timedelta(seconds=1)


def test_what_goes_on_as_a_camera_is_lost_is_told(pair, tmp_path, capsys, server, monkeypatch):
    """Before the last try to reach it again, and not by the end of the command, which may be days later."""
    body, opened, said = film(tmp_path / "a.ts", [(20, 30, 220)]).read_bytes(), live_module.opened, []

    def noted(*given, **named):
        said.append(capsys.readouterr().out)
        return opened(*given, **named)

    monkeypatch.setattr(live_module, "opened", noted)
    monkeypatch.setattr(detect, "PAUSE", 0.2)
    options = ["--every", "5", "--longest", "60", "--retries", "3", "-q", *NAMED]
    assert call("stream", server([body]), "-m", pair / "student", *options) == 2
    (line,) = map(json.loads, "".join(said).splitlines())
    assert overlap((line["start"], line["end"]), 4, 6) >= 0.5 and capsys.readouterr().out == ""


@pytest.mark.parametrize("by", [Impatient, Terminated])
def test_an_interrupted_stream_prints_the_open_event_and_says_so(pair, tmp_path, capsys, by):
    film(tmp_path / "b.mkv", [(4, 14, 220), (14, 80, 255)], frames=400)
    options = ["--visual-encoder", f"test_detect:{by.__name__}", "--every", "5", "--longest", "100", "-q"]
    assert call("stream", tmp_path / "b.mkv", "-m", pair / "student", *options) == 128 + by.number
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err.endswith(f"error: stopped by {by.number.name}; the events so far are printed\n")
