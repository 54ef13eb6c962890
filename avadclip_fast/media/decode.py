"""Decoding with PyAV: one frame a snippet with its time, and the sound as 16 kHz mono on the same clock.

Times are those of the frames and of the audio packets, in seconds from the first frame; what containers claim about
duration or frame count tells only whether a file was cut short: it is often wrong.
"""

import bisect
import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import MediaError, import_av

RATE = 16_000  # Hz
SILENCE = 1e-3  # root mean square, -60 dB of full scale: below it a window holds nothing to hear
WAIT = 10.0  # seconds that a live stream may say nothing
AT_ONCE = 2**22  # samples of sound in memory: 17 MB
JUMP = 1.0  # seconds by which time stamps fall back where they begin anew; less is disorder
GAP = 0.1  # seconds by which a packet's time may differ from the samples so far before silence is put between
SCHEMES = ("rtsp", "rtsps", "http", "https", "udp", "srt")
Progress = Callable[[int], None]  # is called with the number of frames decoded since


class Frame(NamedTuple):
    """The frame that stands for a snippet."""

    time: float  # seconds from the first frame
    image: np.ndarray  # (H, W, 3) uint8 RGB, upright


@contextlib.contextmanager
def opened(source: str | Path, live: bool = False) -> Iterator[Any]:
    """The PyAV container of a file, or of a URL of SCHEMES where `live`. Raises MediaError."""
    av = import_av()
    scheme, form = str(source).partition("://")[0].lower() if "://" in str(source) else "", None
    wait = WAIT if scheme else None
    target: Any
    options: dict[str, str]
    with contextlib.ExitStack() as stack:
        try:
            if scheme:
                if not live or scheme not in SCHEMES:
                    known = ", ".join(SCHEMES) if live else "files only; `avadclip-fast stream` takes URLs"
                    raise MediaError(f"{source}: {scheme}:// is not read ({known})")
                target, options = str(source), {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}
            else:
                path = Path(source)
                if not path.exists():
                    raise MediaError(f"{path}: no such file")
                if path.is_dir():
                    raise MediaError(f"{path}: a folder, not a video")
                if path.is_char_device():
                    target, options, form = str(path), {}, "v4l2"
                elif not live and not path.is_file():
                    raise MediaError(f"{path}: not a file")  # a pipe would be waited for
                elif path.is_file() and path.stat().st_size == 0:
                    raise MediaError(f"{path}: the file is empty")
                else:
                    # An open file, so that no name is taken for a protocol; what a playlist names is not followed.
                    target, options = stack.enter_context(open(path, "rb")), {"protocol_whitelist": "none"}
            container = stack.enter_context(av.open(target, format=form, options=options, timeout=wait))
        except MediaError:
            raise
        except OSError as error:  # FFmpeg's errors are of this kind too
            raise MediaError(f"{source}: not a readable video: {error.strerror or error}") from error
        except (av.error.FFmpegError, ValueError) as error:
            raise MediaError(f"{source}: not a readable video: {error}") from error
        yield container


def video_stream(container: Any, source: str | Path) -> Any:
    """The first video stream that is not a cover picture. Raises MediaError."""
    for stream in container.streams.video:
        if "attached_pic" not in str(stream.disposition).lower():
            stream.thread_type = "AUTO"
            return stream
    raise MediaError(f"{source}: holds no video stream")


class Clock:
    """The time of each frame of a stream, in seconds from the first; it never runs backwards.

    Where time stamps fall back by more than JUMP, as they do where recordings were joined, in a stream that is played
    again, or when the 33 bits of MPEG-TS are full after 26.5 hours, time goes on by one frame.
    """

    def __init__(self, rate: float = 25.0):
        self.rate = rate  # frames a second, as far as the container knows
        self.shifts: list[float] = []  # from the container's time to this, rising: one more at each jump
        self.now = 0.0  # of the last frame
        self.seen = 0  # frames

    def __call__(self, frame: Any) -> float:
        onward = self.now + 1 / self.rate if self.seen else 0.0  # where the frame is if nothing tells
        if frame.time is not None and not self.shifts:
            self.shifts.append(onward - frame.time)
        time = onward if frame.time is None else self.place(frame.time)
        if time < self.now - JUMP:
            self.shifts.append(onward - frame.time)
            time = onward
        self.now = max(self.now, time)
        self.seen += 1
        return self.now

    def place(self, at: float) -> float:
        """The container's time `at` on this clock, by the shift that brings it nearest to now.

        So sound is placed as the frames around it are, though it may jump some packets before or after them.
        """
        if not self.shifts:
            return at
        wanted = self.now - at
        i = bisect.bisect(self.shifts, wanted)
        return at + min(self.shifts[max(i - 1, 0) : i + 1], key=lambda shift: abs(shift - wanted))


def rate_of(stream: Any) -> float:
    """Frames a second, on average; 25 where the container does not know."""
    return float(stream.average_rate or stream.guessed_rate or 25)


class Beat:
    """Whether a frame is the first at or after a multiple of `seconds`; of the frames in order."""

    def __init__(self, seconds: float):
        self.seconds, self.due = seconds, 0

    def __call__(self, time: float) -> bool:
        beats = time / self.seconds + 1e-6
        if beats < self.due:
            return False
        self.due = int(beats) + 1
        return True


def frames(source: str | Path, stream: Any, container: Any, clock: Clock | None = None) -> Iterator[tuple[float, Any]]:
    """Decoded frames in order, each with its time by `clock`, a new one; it learns the stream's rate."""
    av, clock = import_av(), clock or Clock()
    clock.rate = rate_of(stream)
    try:
        for frame in container.decode(stream):
            yield clock(frame), frame
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{source}: damaged or cut short after {clock.seen} frames: {error.strerror}") from error
    check_whole(source, stream, clock.seen)


def check_whole(source: str | Path, stream: Any, seen: int) -> None:
    """Raises MediaError where a file held no frame, or far fewer than its index tells of. seen: frames."""
    if seen == 0:
        raise MediaError(f"{source}: holds no frame that can be decoded")
    expected = float(stream.frames)
    if stream.duration and stream.average_rate:  # an edit list shows less than the index holds
        expected = min(expected, float(stream.duration * stream.time_base * stream.average_rate))
    if seen < 0.9 * expected:
        raise MediaError(f"{source}: cut short: {seen} frames of {expected:.0f} are there")


def upright(frame: Any, image: np.ndarray) -> np.ndarray:
    """Turned as a player shows it."""
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90) % 4)) if frame.rotation else image


def snippet_frames(
    source: str | Path,
    every: int = 16,
    fps: float | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Iterator[Frame]:
    """The first frame of each whole snippet of `every` frames (a shorter video is one snippet).

    fps: snippets by time instead: the first frame at or after each multiple of 1 / fps. clock: a new one, which then
    knows the stream's rate, and how its time stamps jumped: for `read_sound`.
    Raises MediaError: no such file, no video, nothing decodable, cut short.
    """
    with opened(source) as container:
        stream = video_stream(container, source)
        held: Frame | None = None
        count = 0
        beat = None if fps is None else Beat(1 / fps)
        for time, frame in frames(source, stream, container, clock):
            if progress is not None:
                progress(1)
            if beat is not None:
                if beat(time):
                    yield Frame(time, upright(frame, frame.to_ndarray(format="rgb24")))
                continue
            if count % every == 0:
                held = Frame(time, upright(frame, frame.to_ndarray(format="rgb24")))
            count += 1
            if count % every == 0 and held is not None:
                yield held
        if held is not None and count < every:
            yield held


@dataclass
class Sound:
    """The sound of a video: int16 samples (n,) at RATE in a temporary file, the first at time 0 of the video."""

    samples: np.ndarray
    mapped: mmap.mmap | None = None  # what the samples lie in

    def windows(self, times: np.ndarray, seconds: float, progress: Progress | None = None) -> "Windows":
        """One window of `seconds` from each time on. progress: as of `Windows`."""
        starts = np.round(np.asarray(times) * RATE).astype(np.int64)
        return Windows(self.samples, starts, round(seconds * RATE), self.mapped, progress)


@dataclass
class Windows:
    """Windows of sound, (N, size) float32 in [-1, 1] when sliced: windows[a:b]; zeros where there is no sound.

    They are read when they are asked for, so that hours of sound need little memory.
    """

    samples: np.ndarray  # (n,) int16
    starts: np.ndarray  # (N,) int64
    size: int
    mapped: mmap.mmap | None = None  # what the samples lie in
    progress: Progress | None = None  # is called with 0 whenever some are read, and may raise

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, part: slice) -> np.ndarray:
        if self.progress is not None:
            self.progress(0)
        starts = self.starts[part]
        out = np.zeros((len(starts), self.size), np.float32)
        for row, start in zip(out, starts, strict=True):
            first, last = max(start, 0), min(start + self.size, len(self.samples))
            if first < last:
                row[first - start : last - start] = self.samples[first:last]
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)  # else all that was read stays this process's memory
        out /= 32768
        return out

    def heard(self, chunk: int | None = None) -> np.ndarray:
        """(N,) bool: whether there is anything to hear in each window. chunk: windows at once."""
        chunk = chunk or max(1, AT_ONCE // max(1, self.size))
        loud = [np.zeros(0, bool)]
        for start in range(0, len(self), chunk):
            loud.append(audible(self[start : start + chunk]))
        return np.concatenate(loud)


def audible(windows: np.ndarray) -> np.ndarray:
    """windows (N, samples) -> (N,) bool: whether there is anything to hear in each."""
    return np.sqrt((windows**2).mean(1)) > SILENCE


def read_sound(source: str | Path, clock: Clock | None = None, progress: Progress | None = None) -> Sound | None:
    """The first audio stream of a file, channels averaged, at RATE; None where there is none. Raises MediaError.

    clock: that which `snippet_frames` has read the whole file with, so that the sound stays with the frames where time
    stamps jump back; without, none is taken to do. progress: is called with 0 as it goes on, and may raise.
    """
    shifts = clock.shifts if clock is not None else [-first_time(source)]
    # hours of sound are some GB: on disk, and gone when nothing uses them any more
    with opened(source) as container, tempfile.TemporaryFile() as file:
        if not container.streams.audio:
            return None
        written = 0
        for time, block in sound_blocks(source, container, shifts):
            if progress is not None:
                progress(0)
            gap = round(time * RATE) - written
            if gap > (GAP * RATE if written else 0):
                file.seek(2 * gap, os.SEEK_CUR)  # a hole: zeros that take no space, however long
                written += gap
            elif gap < (-GAP * RATE if written else 0):
                block = block[-gap:]  # from before the first frame, or there already
            file.write((block * 32768).round().clip(-32768, 32767).astype(np.int16).tobytes())
            written += len(block)
        file.flush()
        if not written:
            return Sound(np.zeros(0, np.int16))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Sound(np.frombuffer(mapped, np.int16), mapped)


def first_time(source: str | Path) -> float:
    """The time of the first frame on the container's clock. Raises MediaError."""
    with opened(source) as container:
        av, stream = import_av(), video_stream(container, source)
        try:
            return next((frame.time or 0.0 for frame in container.decode(stream)), 0.0)
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{source}: damaged: {error.strerror}") from error


def sound_blocks(source: str | Path, container: Any, shifts: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
    """(time, samples (n,) float32 mono at RATE) of the first audio stream, in order; damaged packets are left out.

    shifts: of the `Clock` of the frames, whose packets tell which of them holds where.
    """
    clock, mono, audio = Clock(), Mono(), container.streams.audio[0]
    clock.shifts = list(shifts)
    streams = [audio, video_stream(container, source)] if len(shifts) > 1 else [audio]
    for packet in container.demux(*streams):
        if packet.stream is audio:
            for frame in decoded(packet):
                yield from ((clock.place(at), block) for at, block in mono(frame))
        elif packet.pts is not None:
            clock.now = clock.place(float(packet.pts * packet.time_base))
    yield from ((clock.place(at), block) for at, block in mono.rest())


def decoded(packet: Any) -> list[Any]:
    """The frames of a packet; none of a damaged one."""
    try:
        return packet.decode()
    except import_av().error.FFmpegError:
        return []


class Mono:
    """Frames of sound into (time, samples (n,) float32 mono at RATE), whatever rate and channels each of them has."""

    def __init__(self) -> None:
        self.resampler: Any = None
        # of the run of sound at hand; sent: samples given so far
        self.rate = self.sent = 0
        self.time = self.ends = 0.0

    def __call__(self, frame: Any) -> Iterator[tuple[float, np.ndarray]]:
        av = import_av()
        mono = to_mono(frame)
        at = frame.time if frame.time is not None else self.ends
        if self.resampler is None or frame.sample_rate != self.rate or abs(at - self.ends) > GAP:
            yield from self.rest()
            self.resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
            self.rate, self.time, self.sent, self.ends = frame.sample_rate, at, 0, at
        self.ends += mono.size / self.rate
        flat = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
        flat.sample_rate = self.rate
        yield from self._resampled(flat)

    def rest(self) -> Iterator[tuple[float, np.ndarray]]:
        """What the resampler still holds."""
        if self.resampler is not None:
            yield from self._resampled(None)
            self.resampler = None

    def _resampled(self, frame: Any) -> Iterator[tuple[float, np.ndarray]]:
        for out in self.resampler.resample(frame):
            block = out.to_ndarray().reshape(-1)
            yield self.time + self.sent / RATE, block
            self.sent += len(block)


def to_mono(frame: Any) -> np.ndarray:
    """(n,) float32 in [-1, 1], the mean of any number of channels: FFmpeg refuses layouts that it has no name for."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T  # [channels, n]
    mono = array.astype(np.float32).mean(0)
    if array.dtype.kind == "f":
        return mono
    half = np.float32(2.0 ** (8 * array.dtype.itemsize - 1))
    return (mono - half) / half if array.dtype.kind == "u" else mono / half
