"""Decoding, crops, sound, encoders: on videos made here, and on the real clips where they are at hand."""

import contextlib
import errno
import hashlib
import http.client
import io
import os
import sys
from fractions import Fraction
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from malice import Call
from PIL import Image
from standins import Hearing
from videos import damage, joined, make_video

from avadclip_fast.media import MediaError, crops, decode, encoders, errors, fetch
from avadclip_fast.media.features import Sampling, snippet_seconds, video_features
from avadclip_fast.media.live import LiveSource
from avadclip_fast.media.wav2clip import Wav2Clip
from avadclip_fast.models.text import TextWeightsError, tokenize

av = pytest.importorskip("av")


def times_of(path, **options):
    return [frame.time for frame in decode.snippet_frames(path, **options)]


def test_one_frame_a_whole_snippet_with_its_time(tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=50, rate=25)
    frames = list(decode.snippet_frames(path, every=16))
    assert [round(f.time * 25) for f in frames] == [0, 16, 32]  # the two frames after 48 are no snippet
    assert frames[0].image.shape == (48, 64, 3)
    # frame i is a grey of 4 * i: the frames are the ones that they claim to be; 6: what compression takes
    assert all(abs(f.image.mean() - 4 * n) < 6 for f, n in zip(frames, (0, 16, 32), strict=True))
    assert [round(t, 3) for t in times_of(path, fps=5)] == [round(0.2 * i, 3) for i in range(10)]


def test_a_shorter_video_is_one_snippet(tmp_path):
    assert times_of(make_video(tmp_path / "one.mp4", frames=1)) == [0.0]
    assert times_of(make_video(tmp_path / "odd.mp4", frames=5, width=34, height=50)) == [0.0]


@pytest.mark.parametrize(
    "sampling, message",
    [
        ({"every": 0}, "every must be 1 frame .* got 0"),
        ({"fps": 0}, "fps must be .* above 0; got 0"),
        ({"fps": np.nan}, "nan"),
    ],
)
def test_snippets_of_no_length_are_refused(sampling, message):
    for read in (lambda: times_of("a.mp4", **sampling), lambda: LiveSource("a.mp4", **sampling)):
        with pytest.raises(MediaError, match=message):
            read()


def test_a_cut_video_gives_the_same_frames_up_to_the_cut(tmp_path):
    whole = list(decode.snippet_frames(make_video(tmp_path / "whole.mp4", frames=64, audio=1), every=4))
    cut = list(decode.snippet_frames(make_video(tmp_path / "cut.mp4", frames=32, audio=1), every=4))
    assert len(whole) == 16 and len(cut) == 8
    assert all(
        a.time == b.time and abs(a.image.astype(int) - b.image).max() <= 6 for a, b in zip(cut, whole[:8], strict=True)
    )


@pytest.mark.parametrize("channels, rate", [(1, 44_100), (2, 48_000), (6, 48_000), (7, 48_000)])
def test_sound_stands_where_it_was(tmp_path, channels, rate):
    # silence, and a tone from 1 s to 1.5 s
    path = make_video(tmp_path / "a.mkv", frames=75, rate=25, audio=channels, sample_rate=rate, tone=(1.0, 1.5))
    sound = decode.read_sound(path)
    assert len(sound.samples) / decode.RATE == pytest.approx(3.0, abs=0.04)  # 0.04: a frame
    loud = np.flatnonzero(np.abs(sound.samples.astype(np.int32)) > 1000) / decode.RATE
    assert loud[0] == pytest.approx(1.0, abs=0.04) and loud[-1] == pytest.approx(1.5, abs=0.04)
    windows = sound.windows(np.arange(6) * 0.5, 0.5)
    assert windows[:].shape == (6, 8000) and windows.heard().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("form", ["u8", "s16", "s32", "flt", "dbl", "u8p", "s16p", "fltp"])
def test_samples_of_any_form_are_the_mean_of_their_channels(form):
    wave = np.array([[0.5, -0.5, 0.0, 0.25], [0.0, -0.5, 0.5, -0.75]])  # [channels, n]
    kinds = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}
    kind = np.dtype(kinds[form.removesuffix("p")])
    scale = 1.0 if kind.kind == "f" else 2.0 ** (8 * kind.itemsize - 1)
    stored = (wave * scale + scale * (kind.kind == "u")).astype(kind)
    stored = stored if form.endswith("p") else stored.T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(stored), format=form, layout="stereo")
    np.testing.assert_allclose(decode.to_mono(frame), wave.mean(0), atol=1e-7)


def test_sound_that_begins_a_little_later_is_not_early(tmp_path):
    """By less than what counts as a gap within it."""
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video, sound = out.add_stream("mpeg4", rate=25), out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), 9000, np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 960, Fraction(1, 16_000)
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    samples = decode.read_sound(tmp_path / "a.mkv").samples
    assert len(samples) == pytest.approx(16_960, abs=100) and np.flatnonzero(samples)[0] == pytest.approx(960, abs=20)


def test_a_snippet_is_as_long_as_most_are():
    times = np.array([0, 0.64, 1.28, 1.92, 9.0])
    assert snippet_seconds(times, Sampling(), 30.0) == pytest.approx(0.64)  # as the frames came, not 16 / 30 s
    assert snippet_seconds(times[:1], Sampling(), 25.0) == pytest.approx(0.64)
    assert snippet_seconds(times[:1], Sampling(fps=2), 25.0) == 0.5


def test_windows_past_the_end_are_silent(tmp_path):
    path = make_video(tmp_path / "a.mkv", frames=75, rate=25, audio=1, tone=(0.0, 1.0), sound_ends=1.0)
    windows = decode.read_sound(path).windows(np.array([0.0, 0.9, 1.5, 40.0]), 0.5)
    assert windows.heard().tolist() == [True, True, False, False] and not windows[2:].any()
    assert decode.read_sound(make_video(tmp_path / "mute.mp4", frames=8)) is None


def test_bad_files_say_what_they_are(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n")
    whole = make_video(tmp_path / "whole.mp4", frames=60).read_bytes()
    (tmp_path / "short.mp4").write_bytes(whole[: len(whole) // 2])
    make_video(tmp_path / "sound.mkv", frames=0, audio=1, tone=(0, 1))
    wrong = {
        "empty.mp4": "the file is empty", "text.mp4": "text.mp4: not a video$", "list.mp4": "not a video",
        "short.mp4": "cut short: its index is missing", "sound.mkv": "no video stream", "none.mp4": "no such file",
        ".": "a folder, not a video", "loop.mp4": "no such file", "pipe.mp4": "not a file",
    }  # fmt: skip
    os.symlink("loop.mp4", tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, reason in wrong.items():
        with pytest.raises(MediaError, match=reason) as caught:
            list(decode.snippet_frames(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="http:// is not read"):
        list(decode.snippet_frames("http://127.0.0.1/a.mp4"))
    with pytest.raises(MediaError, match="ftp:// is not read"), decode.opened("ftp://127.0.0.1/a.mp4", live=True):
        pass


def test_a_frame_takes_no_memory_beyond_any_video_s(tmp_path, monkeypatch):
    """Of one color, frames of gigabytes are files of a megabyte, and each thread decodes one."""
    monkeypatch.setattr(decode, "PIXELS", 100_000)
    assert len(times_of(make_video(tmp_path / "a.mkv"))) == 2
    with pytest.raises(MediaError, match="b.mkv: a frame has 640 x 480 pixels; up to 100000 are read"):
        times_of(make_video(tmp_path / "b.mkv", width=640, height=480))
    pictures = [io.BytesIO(), io.BytesIO()]
    for picture, size in zip(pictures, ((64, 48), (640, 480)), strict=True):
        Image.new("RGB", size).save(picture, "PNG")
    with av.open(str(tmp_path / "c.mov"), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for i in range(32):
            packet = av.Packet(pictures[i > 15].getvalue())  # larger than declared
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
            out.mux(packet)
    clock = decode.Clock()
    assert [frame.image.shape for frame in decode.snippet_frames(tmp_path / "c.mov", clock=clock)] == [(48, 64, 3)]
    assert clock.damaged >= 15


def test_cut_short_in_the_middle_of_the_frames(tmp_path):
    path = make_video(tmp_path / "a.mkv", frames=200, noise=True)
    short = tmp_path / "short.mp4"  # the index in front, the frames cut short
    make_video(short, frames=200, noise=True, options={"movflags": "faststart"})
    data = short.read_bytes()
    short.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="cut short|damaged"):
        list(decode.snippet_frames(short))
    assert len(times_of(path)) == 12


@pytest.mark.parametrize("sound", [{}, {"audio": 1, "tone": (0, 4)}], ids=["mute", "sound"])
@pytest.mark.parametrize(
    "form, codec", [("mkv", "mpeg4"), ("webm", "libvpx"), ("flv", "flv"), ("avi", "mpeg4"), ("mov", "mpeg4")]
)
def test_half_a_file_is_told_whatever_it_is(tmp_path, form, codec, sound):
    sound = sound and {**sound, "sample_rate": 48_000 if form == "webm" else 44_100}
    sound = sound and {**sound, "sound_codec": {"webm": "libopus", "avi": "mp2"}.get(form, "aac")}
    options = {"movflags": "faststart"} if form == "mov" else {}
    path = make_video(tmp_path / f"a.{form}", frames=100, noise=True, codec=codec, options=options, **sound)
    assert len(times_of(path)) == 6
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match=r"cut short: [12]\.\d s of 4\.\d s are there"):
        times_of(path)


WHOLE = {  # that end, by their frames alone, before what their header declares
    "long sound": ("mkv", {"audio": 1, "tone": (0, 8), "sound_ends": 8.0}),
    "a long last frame": ("mkv", {"times": [0, 0.04, 0.08, 1.5, 3.0, 4.0]}),
    "few frames": ("mkv", {"times": [0, 1, 2, 3], "audio": 1, "tone": (0, 4)}),
    "one frame": ("mkv", {"frames": 1}),
    "a late start": ("mkv", {"times": [60 + i / 25 for i in range(50)]}),
    "no duration": ("mkv", {"options": {"live": "1"}, "audio": 1, "tone": (0, 2), "sound_codec": "mp2"}),
    "empty chunks": ("avi", {"rate": 1000, "times": [i / 25 for i in range(50)]}),
    "b-frames": ("avi", {"codec": "libx264"}),
    "b-frames in flv": ("flv", {"codec": "libx264"}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_not_called_cut_short(tmp_path, name):
    form, options = WHOLE[name]
    frames = options.get("frames", len(options.get("times", range(50))))
    path = make_video(tmp_path / f"a.{form}", **{**options, "frames": frames})
    assert len(times_of(path, every=1)) == frames


@pytest.mark.parametrize("form, codec", [("mp4", "mpeg4"), ("flv", "flv"), ("ts", "mpeg4")])
def test_a_damaged_stretch_loses_its_frames_alone(tmp_path, form, codec):
    """The frames after it keep their times."""
    path = damage(make_video(tmp_path / f"a.{form}", frames=100, noise=True, codec=codec))
    clock = decode.Clock()
    times = [frame.time for frame in decode.snippet_frames(path, every=1, clock=clock)]
    assert 90 <= len(times) <= 100 - clock.damaged and (clock.damaged > 0) == (form == "mp4")
    np.testing.assert_allclose(times, np.round(np.array(times) * 25) / 25, atol=2e-3)
    assert times[-1] == pytest.approx(3.96, abs=2e-3)


def test_frames_of_varying_length_are_told_by_their_times(tmp_path):
    """40 frames of 1/50 s, then 20 of 1/10 s."""
    times = np.concatenate([np.arange(40) * 0.02, 0.8 + np.arange(20) * 0.1])
    make_video(tmp_path / "a.mkv", frames=len(times), rate=50, times=times)
    for options, taken in (({"every": 10}, range(0, 60, 10)), ({"fps": 2}, [0, 25, 42, 47, 52, 57])):
        found = list(decode.snippet_frames(tmp_path / "a.mkv", **options))
        np.testing.assert_allclose([frame.time for frame in found], times[list(taken)], atol=1e-3)
        assert all(abs(f.image.mean() - 4 * i) < 6 for f, i in zip(found, taken, strict=True))


def test_the_longest_time_without_a_frame_is_known(tmp_path):
    """Of each snippet: since the first frame of the one before it."""
    times = np.array([0.0, 0.1, 0.2, 0.5, 0.6, 7.6, 7.7, 7.8, 17.8, 17.9])
    make_video(tmp_path / "a.mkv", frames=len(times), times=times)
    for options, waits in (({"every": 2}, [0, 0.1, 0.3, 7.0, 10.0]), ({"fps": 2}, [0, 0.3, 7.0, 10.0])):
        found = list(decode.snippet_frames(tmp_path / "a.mkv", **options))
        np.testing.assert_allclose([frame.wait for frame in found], waits, atol=1e-3)


def test_sound_stays_with_sight_where_time_stamps_begin_anew(tmp_path):
    """Three recordings of 4 s, joined; their sound is half a second longer, which must not add up."""
    path = joined(tmp_path / "a.ts", 3, frames=100, audio=1, tone=(1.0, 1.6), sound_ends=4.5)
    clock = decode.Clock()
    frames = list(decode.snippet_frames(path, every=5, clock=clock))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(60) * 0.2, atol=1e-3)
    # of each recording, frame i is a grey of 4 * i % 256
    assert [round(frames[k].image.mean() / 4) for k in (1, 21, 41)] == [5, 5, 5]
    heard = decode.read_sound(path, clock).windows(np.arange(60) * 0.2, 0.2).heard()
    for k in (0, 20, 40):  # 4 and 8: a frame of AAC fades in and out
        assert heard[k + 5 : k + 8].all() and set(np.flatnonzero(heard[k : k + 20])) <= {4, 5, 6, 7, 8}
    found = video_features(path, Sampling(every=5), Mean(), Hearing("cpu"))
    np.testing.assert_array_equal(found.heard, heard)


class At:
    """A frame, as far as a clock looks at it."""

    def __init__(self, time):
        self.time = time


def test_a_clock_goes_on_where_time_stamps_fall_back():
    wrap = 2**33 / 90_000  # seconds until the time stamps of MPEG-TS begin anew
    for times, expected in (
        ([7.0, 7.04, 7.08], [0, 0.04, 0.08]),
        ([wrap - 0.04, 0.0, 0.04, 0.08], [0, 0.04, 0.08, 0.12]),
        ([5.0, 5.04, 0.0, 5.12, 5.16], [0, 0.04, 0.08, 0.12, 0.16]),  # one stamp is damaged
        ([0.0, 0.08, 0.04, 0.12], [0, 0.08, 0.08, 0.12]),  # disorder
        ([None, None, 3.0, 3.04, None], [0, 0.04, 0.08, 0.12, 0.16]),
        ([0.0, 0.04, 9.0, 9.04, 0.0], [0, 0.04, 9.0, 9.04, 9.08]),  # a gap, and then a jump
        ([0.0, 0.04, 1.7e9, 1.7e9 + 0.04, 1.7e9 + 0.2], [0, 0.04, 0.08, 0.12, 0.28]),  # a clock is set
        ([0.0, 0.04, 9e12, 0.12, 0.16], [0, 0.04, 0.08, 0.12, 0.16]),  # one stamp is damaged
        # a jump, and then one to what was there before
        ([0.0, 9.0, 0.0, 7.04, 7.08, 7.16], [0, 9.0, 9.04, 9.08, 9.12, 9.2]),
    ):
        clock = decode.Clock(25)
        np.testing.assert_allclose([clock(At(time)) for time in times], expected, atol=1e-6)


def test_an_edit_list_shows_less_than_the_file_holds(tmp_path):
    """What players leave out is not cut short; what is cut short is told all the same."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=25, options={"g": "200"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        rng = np.random.default_rng(0)
        for i in range(150):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), np.uint8), format="rgb24")
            frame.pts = i - 100
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert len(times_of(path, every=5)) == 10
    data = path.read_bytes()
    path.write_bytes(data[: 4 * len(data) // 5])
    with pytest.raises(MediaError, match="cut short|damaged"):
        times_of(path)


def test_a_single_snippet_lasts_as_long_as_the_streams_rate_has_it(tmp_path):
    for rate in (10, 50):
        path = make_video(tmp_path / f"{rate}.mkv", frames=20, rate=rate, audio=1, tone=(0, 2))
        assert video_features(path, Sampling(every=16), Mean(), None).seconds == pytest.approx(16 / rate)


def test_a_rotated_video_is_turned_as_players_show_it(tmp_path):
    """Bright on the right, to be shown with that side down: a quarter turn clockwise, which players count as -90."""
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(-90)
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, 32:] = 250
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    (frame,) = decode.snippet_frames(tmp_path / "a.mp4")
    assert frame.image.shape == (64, 48, 3)
    assert frame.image[40:].mean() > 200 and frame.image[:24].mean() < 50


def test_holes_in_the_sound_are_silent_and_take_no_space(tmp_path):
    """A time stamp an hour later, as broken recorders write them, is an hour of silence."""
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video = out.add_stream("mpeg4", rate=1)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(video.encode(None))
        for at in (0, 3600):
            frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), 9000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, 16_000 * at, Fraction(1, 16_000)
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    sound = decode.read_sound(tmp_path / "a.mkv")
    assert len(sound.samples) == pytest.approx(3601 * 16_000, abs=100)
    windows = sound.windows(np.array([0.0, 1.5, 1800.0, 3599.0, 3600.0]), 1.0)
    assert windows.heard().tolist() == [True, False, False, False, True]


def test_sound_with_a_damaged_time_stamp_does_not_silence_what_follows(tmp_path, monkeypatch):
    """Nor take the file for as long as it says, of which a temporary file may not be made."""
    clock, loud = decode.Clock(), np.full(1600, 0.5, np.float32)
    list(decode.snippet_frames(make_video(tmp_path / "a.mkv", audio=1), clock=clock))
    blocks = [(0.0, loud), (0.1, loud), (1e15, loud), (0.4, loud)]
    monkeypatch.setattr(decode, "sound_blocks", lambda *_: iter(blocks))
    windows = decode.read_sound(tmp_path / "a.mkv", clock).windows(np.arange(6) / 10, 0.1)
    assert windows.heard().tolist() == [True, True, False, False, True, False]


def test_without_pyav_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r'pip install "avadclip_fast\[media\]"'):
        list(decode.snippet_frames(tmp_path / "a.mp4"))


def test_a_pyav_that_cannot_be_loaded_is_not_called_missing(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            raise ImportError(f"lib{name}.so: failed to map segment from shared object")

    monkeypatch.delitem(sys.modules, "av")
    monkeypatch.setattr(sys, "meta_path", [Broken()])
    with pytest.raises(MediaError, match=r"PyAV, which cannot be imported: libav.so: failed to map segment"):
        errors.import_av()


def test_a_video_is_not_called_damaged_where_threads_are_short():
    """As in a container with limits: no decoder can be started, and each packet fails."""
    short = av.error.BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable", "avcodec_open2")
    decoder = SimpleNamespace(is_open=False)
    stream = SimpleNamespace(codec_context=decoder, average_rate=25, guessed_rate=None, frames=0)
    times = {"pts": 0, "dts": 0, "duration": 1, "time_base": Fraction(1, 25)}
    packet = SimpleNamespace(stream=stream, decode=mock.Mock(side_effect=short), **times)
    container = SimpleNamespace(format=SimpleNamespace(name="avi"), demux=lambda: [packet])
    with pytest.raises(MediaError, match=r"a.avi: threads or memory are short: Resource temporarily unavailable"):
        list(decode.frames("a.avi", stream, container))
    decoder.is_open, clock = True, decode.Clock()
    with pytest.raises(MediaError, match=r"a.avi: holds no frame that can be decoded"):
        list(decode.frames("a.avi", stream, container, clock))
    assert clock.damaged == 1


def test_ten_crops():
    # at 340 x 256 already, so that resizing changes nothing
    image = np.random.default_rng(0).integers(0, 256, (256, 340, 3), np.uint8)
    ten = crops.cut(image, 10).numpy().transpose(0, 2, 3, 1)
    at = [(16, 58), (0, 0), (0, 116), (32, 0), (32, 116)]  # centre and corners: top, left
    for i, (top, left) in enumerate(at):
        part = image[top : top + 224, left : left + 224]
        assert (ten[i] == part).all() and (ten[5 + i] == part[:, ::-1]).all()
    assert torch.equal(crops.cut(image, 1), crops.cut(image, 10)[:1])
    assert torch.equal(crops.cut(image, 5), crops.cut(image, 10)[:5])
    assert crops.cut(image, 10, side=448).shape == (10, 3, 448, 448)
    with pytest.raises(ValueError, match="clip"):
        crops.cut(image, 5, "clip")


def test_clip_preprocessing_is_open_clips():
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8).repeat(3, 0).repeat(3, 1)
    theirs = image_transform(224, is_train=False)(Image.fromarray(image))
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    ours = (crops.cut(image, 1, "clip")[0] / 255 - mean) / std
    # 2 of 255 levels, over the smallest std: PIL rounds between its two passes
    assert (ours - theirs).abs().max() <= 2 / 255 / 0.26


def test_wav2clip_agrees_with_the_release(shared):
    sys.path.insert(0, str(shared / "parity"))
    import recipe

    golden = np.load(shared / "parity" / "golden_wav2clip.npz")
    model = Wav2Clip("random")
    state = model.state_dict()
    for prefix, seed in (("encoder.", 3), ("transform.", 4)):
        for name, tensor in state.items():
            if name.startswith(prefix) and tensor.is_floating_point():
                tensor.copy_(recipe.value(name.removeprefix(prefix), tensor.shape, seed))
    expected = torch.from_numpy(golden["embedding"])
    error = (model(golden["wave"]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5  # float32 through 20 layers, in another order of sums
    stored = {str(key).split(" ")[0] for key in golden["keys"]}
    assert stored == set(state) - {"encoder.spectrogram.window"}


def test_wav2clip_checkpoint(tmp_path):
    model = Wav2Clip("random")
    names = {"encoder.": "audio_encoder.", "transform.": "audio_transform."}
    state = {
        next(new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)): v
        for k, v in model.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pt")
    sound = np.random.default_rng(0).uniform(-1, 1, (3, 8000)).astype(np.float32)
    assert torch.equal(Wav2Clip(tmp_path / "a.pt")(sound), model(sound))
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(MediaError, match="not Wav2CLIP's weights"):
        Wav2Clip(tmp_path / "b.pt")
    for held in ({1: torch.zeros(1)}, {"state_dict": 5}, [1], {"encoder.conv1.weight": "text"}):
        torch.save(held, tmp_path / "b.pt")
        with pytest.raises(MediaError, match="not Wav2CLIP's weights"):
            Wav2Clip(tmp_path / "b.pt")
    torch.save({"x": Call(exec, "raise SystemExit")}, tmp_path / "c.pt")
    with pytest.raises(MediaError, match="without running code"):
        Wav2Clip(tmp_path / "c.pt")
    (tmp_path / "d.pt").write_text("hi")  # torch's own message is "105"
    with pytest.raises(MediaError, match="d.pt: not a PyTorch weights file"):
        Wav2Clip(tmp_path / "d.pt")
    with pytest.raises(MediaError, match=f"download {encoders.WAV2CLIP} and give its path as --audio-weights"):
        encoders.audio_encoder("wav2clip", None, "cpu")


def test_fetched_weights_are_pinned(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(b"data"))
    right, url = hashlib.sha256(b"data").hexdigest(), "https://example.org/w.pt"
    for _ in range(2):
        assert fetch.fetch(f"{url}#sha256={right}").read_bytes() == b"data"
    assert asked == [url]  # once
    (kept,) = (tmp_path / "avadclip_fast").iterdir()
    kept.write_bytes(b"dat")  # damaged since
    assert fetch.fetch(f"{url}#sha256={right}").read_bytes() == b"data" and len(asked) == 2
    with pytest.raises(MediaError, match="nothing was kept"):
        fetch.fetch(f"{url}#sha256={'0' * 64}")
    assert len(list((tmp_path / "avadclip_fast").iterdir())) == 1
    lost = mock.Mock(**{"read.side_effect": http.client.IncompleteRead(b"da")})
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: contextlib.nullcontext(lost))
    with pytest.raises(MediaError, match=r"w.pt: cannot be fetched: IncompleteRead"):
        fetch.fetch(f"{url}#sha256={'0' * 64}")
    for bad in (url, f"http://example.org/w.pt#sha256={right}", f"file:///w.pt#sha256={right}", tmp_path / "none.pt"):
        with pytest.raises(MediaError):
            fetch.fetch(bad)


def test_weights_are_fetched_where_there_is_no_home(tmp_path, monkeypatch):
    """As in containers: of a user without a name, or whose home cannot be written to."""
    source = f"https://example.org/w.pt#sha256={hashlib.sha256(b'data').hexdigest()}"
    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"data"))
    monkeypatch.setattr(fetch.Path, "home", mock.Mock(side_effect=RuntimeError("Could not determine home directory.")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(MediaError, match=r"w.pt: no home folder to keep it in; set XDG_CACHE_HOME"):
        fetch.fetch(source)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MediaError, match=r"w.pt: cannot be fetched: .*file/avadclip_fast'; download it elsewhere"):
        fetch.fetch(source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.fetch(source).read_bytes() == b"data"


class Mean:
    """A stand-in encoder: the mean colour, repeated."""

    size, width = 32, 512

    def __init__(self, device="cpu"):
        self.device = device

    def __call__(self, images):
        return images.float().mean((1, 2, 3))[:, None].expand(-1, 512) / 255


def test_encoders_by_name():
    made = encoders.visual_encoder("test_media:Mean", "openai", "cpu")
    rows = encoders.encoded("visual", made, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 2)
    assert made.device == "cpu" and rows.shape == (2, 512) and rows.dtype == np.float32
    for name in ("nothing", "no.such:thing", "test_media:none"):
        with pytest.raises(MediaError, match=name.split(":")[0]):
            encoders.visual_encoder(name, "openai", "cpu")
    with pytest.raises(MediaError, match="no rate"):
        encoders.audio_encoder("test_media:Mean", None, "cpu")
    with pytest.raises(MediaError, match="gave shape"):
        encoders.encoded("visual", made, torch.zeros(2, 3, 32, 32), 3)
    with pytest.raises(MediaError, match="NaN"):
        encoders.encoded("visual", made, torch.full((2, 3, 32, 32), torch.nan), 2)


def test_the_folder_at_hand_is_looked_in_last_and_for_named_encoders_alone(tmp_path, monkeypatch):
    """A file beside the videos must not be taken for a library."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(encoders, "ClipVisual", lambda *_: Mean())
    encoders.Encoders(audio="none", path=str(tmp_path)).load()
    assert str(tmp_path) not in sys.path
    (tmp_path / "beside_videos.py").write_text("from test_media import Mean\n")
    encoders.Encoders("beside_videos:Mean", audio="none", path=str(tmp_path)).load()
    assert sys.path[-1] == str(tmp_path)


def test_clip_with_random_weights(tmp_path, caplog, monkeypatch):
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, pretrained

    tower = encoders.visual_encoder("clip", "random", "cpu")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    rows = tower(images)
    assert rows.shape == (2, 512) and rows.dtype == torch.float32 and rows.isfinite().all()
    theirs = tower.tower((images / 255 - torch.tensor(OPENAI_DATASET_MEAN)[:, None, None])
                         / torch.tensor(OPENAI_DATASET_STD)[:, None, None])  # fmt: skip
    torch.testing.assert_close(rows, theirs, atol=1e-4, rtol=1e-4)
    # alone or in a batch: float32, in another order of sums
    torch.testing.assert_close(tower(images[1:]), rows[1:], atol=1e-4, rtol=1e-4)
    torch.save({"visual.proj": Call(exec, "raise SystemExit")}, tmp_path / "evil.pt")
    torch.save({1: torch.zeros(1), "visual.proj": "text"}, tmp_path / "odd.pt")
    torch.save({"state_dict": 5}, tmp_path / "five.pt")
    for path, wrong in (
        (tmp_path / "odd.pt", "not CLIP's ViT-B/16"),
        (tmp_path / "five.pt", "not CLIP's ViT-B/16"),
        (tmp_path / "evil.pt", "cannot be read as CLIP's weights"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(MediaError, match=wrong):
            tower._load(path)
    torch.save({f"visual.{name}": x.half() for name, x in tower.tower.state_dict().items()}, tmp_path / "visual.pt")
    monkeypatch.setattr(pretrained, "download_pretrained_from_url", lambda url: str(tmp_path / "visual.pt"))
    loaded = encoders.visual_encoder("clip", "openai", "cpu")
    assert torch.equal(loaded.tower.proj, tower.tower.proj.half().float())
    assert not caplog.records  # no word of random weights, least of all where they come from a file


def test_an_open_clip_that_cannot_be_loaded_says_why(monkeypatch):
    """As beside a torchvision of another torch."""

    class Broken:
        def find_spec(self, name, *_):
            raise RuntimeError(f"operator {name}::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken()])
    for error, load in ((MediaError, encoders.ClipVisual), (TextWeightsError, lambda: tokenize(["normal"]))):
        with pytest.raises(error, match=r"pip install open_clip_torch \(operator open_clip::nms does not exist\)"):
            load()


def test_clip_without_a_network(monkeypatch):
    from open_clip import pretrained

    monkeypatch.setattr(pretrained, "download_pretrained_from_url", None)
    with pytest.raises(MediaError, match="could not be fetched .*ViT-B-16.pt into ~/.cache/clip.* as --visual-weights"):
        encoders.visual_encoder("clip", "openai", "cpu")
