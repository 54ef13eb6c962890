"""Small videos made by PyAV, for tests."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 7: "6.1", 16: "hexadecagonal"}


def make_video(
    path: Path, frames=32, rate=25, width=64, height=48, audio=0, sample_rate=16_000, tone=(0.0, 0.0), sound_ends=None,
    noise=False, options=None, grey=None, times=None, codec="mpeg4", sound_codec=None, form=None,
) -> Path:  # fmt: skip
    """Frame i is a grey of 4 * i (or grey(i)); the sound, of `audio` channels, is a tone from tone[0] to tone[1] s.

    times: of the frames, in seconds. codec, sound_codec, form: FFmpeg's names, where the path's suffix does not say.
    """
    import av

    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=form, options=options or {}) as out:
        if frames:
            video = out.add_stream(codec, rate=rate)
            video.width, video.height, video.pix_fmt, video.bit_rate = width, height, "yuv420p", 2_000_000
        if audio:
            sound_codec = sound_codec or ("flac" if path.suffix == ".mkv" else "aac")
            sound = out.add_stream(sound_codec, rate=sample_rate, layout=LAYOUTS[audio])
        if times is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            level = 4 * i % 256 if grey is None else grey(i)
            image = np.full((height, width, 3), level, np.uint8)
            if noise:
                image = rng.integers(0, 256, image.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            out.mux(video.encode(frame))
        if frames:
            out.mux(video.encode(None))
        if audio:
            seconds = sound_ends or max(frames / rate, tone[1])
            t = np.arange(round(seconds * sample_rate)) / sample_rate
            wave = 0.5 * np.sin(2 * np.pi * 440 * t) * ((t >= tone[0]) & (t < tone[1]))
            samples = np.repeat((wave * 32767).astype(np.int16), audio)[None]  # packed: channels follow one another
            size = 1024
            for start in range(0, len(t), size):
                block = np.ascontiguousarray(samples[:, start * audio : (start + size) * audio])
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout=LAYOUTS[audio])
                frame.sample_rate, frame.pts = sample_rate, start
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def joined(path: Path, times: int, **options) -> Path:
    """An MPEG-TS file of several recordings, one after the other: the time stamps of each begin anew."""
    path.write_bytes(make_video(path, **options).read_bytes() * times)
    return path


def damage(path: Path) -> Path:
    """Replaces bytes in the middle of a file by noise."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 15_000] = np.random.default_rng(1).bytes(15_000)
    path.write_bytes(data)
    return path


# Of each file of `bad_videos`, what is told.
BAD = {
    "empty.mp4": "the file is empty",
    "text.mp4": "text.mp4: not a video$",
    "short.mp4": "cut short: its index is missing",  # its index is at the end
    "cut.mp4": "cut short|damaged|lost",  # its index is in front
    "half.mkv": "cut short",  # its duration is in front
    "sound.mkv": "holds no video stream",
    "loop.mp4": "no such file|symbolic links",  # a link to itself
}


def bad_videos(folder: Path) -> Path:
    """A folder of files that are no videos, or only half."""
    folder.mkdir()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 100)
    whole = make_video(folder / "short.mp4", frames=200, noise=True).read_bytes()
    (folder / "short.mp4").write_bytes(whole[: len(whole) // 2])
    whole = make_video(folder / "cut.mp4", frames=200, noise=True, options={"movflags": "faststart"}).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    whole = make_video(folder / "half.mkv", frames=200, noise=True).read_bytes()
    (folder / "half.mkv").write_bytes(whole[: len(whole) // 2])
    make_video(folder / "sound.mkv", frames=0, audio=1, tone=(0, 1))
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "loop").symlink_to(".")  # and a folder in itself
    return folder


def forbid(monkeypatch, folder: Path) -> None:
    """Makes a folder unreadable, to whom file modes say nothing too."""
    scan = os.scandir

    def scandir(path="."):
        if os.path.realpath(path) == os.path.realpath(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
