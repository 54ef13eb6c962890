"""Decoding with PyAV: one timed frame per snippet, and audio as 16 kHz mono on the same clock.

Times come from frames and audio packets, in seconds from the first frame. The duration and frame count of a container
are often wrong and serve only to detect truncated files. Damaged packets are skipped and counted.
"""

import bisect
import contextlib
import errno
import io
import math
import mmap
import os
import select
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import MediaError, import_av

RATE = 16_000  # Hz
SILENCE = 1e-3  # root mean square, -60 dB of full scale; quieter windows count as silent
WAIT = 10.0  # read timeout of a live stream in seconds
OUTLASTS = 3600.0  # seconds by which sound may outlast the last frame, more than any snippet has
AT_ONCE = 2**22  # audio samples in memory: 17 MB
JUMP = 1.0  # backward step in seconds that means a timestamp reset; smaller ones are disorder
LONGEST_GAP = 365 * 86_400.0  # seconds, of footage; more is another clock, or damage
GAP = 0.1  # difference in seconds between a packet's time and the samples so far above which silence is inserted
ROUNDED = 1.001e-3  # seconds by which two time stamps in whole milliseconds, as in MKV, may be too close together
ASSUMED = 25.0  # frames per second, where a container declares no rate
PIXELS = 150_000_000  # of a frame, of which every thread holds some: 16K has 133 million, a small file may have more
CLOCK = 1000  # ticks per second, the least of any container's clock that is no frame rate: of WebM; 90,000 of MPEG-TS
SCHEMES: dict[str, dict[str, str]] = {  # of live sources, with options of FFmpeg
    "rtsp": {"rtsp_transport": "tcp"},
    "rtsps": {"rtsp_transport": "tcp"},
    "http": {},
    "https": {},
    # What is sent there may be a playlist. To those of http, FFmpeg itself opens no files.
    "udp": {"protocol_whitelist": "udp"},
    "srt": {"protocol_whitelist": "srt"},
}
SHORT = (errno.EAGAIN, errno.ENOMEM)  # of threads, or of memory for their stacks, as in a container with limits
STDIN = "-"  # a live source, as in `ffmpeg ... -f mpegts - | avadclip-fast stream -`
FILES_ONLY = "files only; `avadclip-fast stream` takes URLs"
Progress = Callable[[int], None]  # called with the number of frames decoded since the last call


class Frame(NamedTuple):
    """The representative frame of a snippet."""

    time: float  # seconds from the first frame
    image: np.ndarray  # (H, W, 3) uint8 RGB, upright
    wait: float = 0.0  # longest time between two successive frames since the last snippet's first, in seconds


@contextlib.contextmanager
def opened(source: str | Path, live: bool = False) -> Iterator[Any]:
    """Opens a file, or if `live` also a URL of SCHEMES or STDIN, as a PyAV container. Raises MediaError."""
    av = import_av()
    with contextlib.ExitStack() as stack:
        try:
            target, how = _target(source, live)
            if not isinstance(target, str):
                stack.enter_context(target)
            container = stack.enter_context(av.open(target, **how))
        except MediaError:
            raise
        except (OSError, av.error.FFmpegError, ValueError) as error:
            unknown = isinstance(error, av.error.InvalidDataError)
            reason = _unknown(source) if unknown else f"not a readable video: {said(error)}"
            # The message of FFmpeg's error holds the address, with its login, for the log of a program to tell.
            raise MediaError(f"{source}: {reason}") from (None if "://" in str(source) else error)
        yield container


def _target(source: str | Path, live: bool) -> tuple[Any, dict[str, Any]]:
    """What av.open takes for a source, a name or an open file, and how. Raises MediaError, OSError."""
    if scheme := str(source).partition("://")[0].lower() if "://" in str(source) else "":
        if not live or scheme not in SCHEMES:
            known = ", ".join(SCHEMES) if live else FILES_ONLY
            raise MediaError(f"{source}: {scheme}:// is not read ({known})")
        address = scheme + str(source)[len(scheme) :]  # FFmpeg knows them in small letters alone
        return address, {"timeout": WAIT, "options": SCHEMES[scheme]}
    alone = {"options": {"protocol_whitelist": "none"}}  # playlists are not followed
    if live and str(source) == STDIN:
        if os.isatty(0):
            raise MediaError(f"{source}: standard input is a terminal; pipe a video into it, or name a source")
        # Without a buffer, which would wait until it is full; not sys.stdin's, which Python locks as it exits.
        return _Waiting(0, closefd=False), alone
    path = Path(source)
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if path.is_dir():
        raise MediaError(f"{path}: a folder, not a video")
    if path.is_char_device():
        return str(path), {"format": "v4l2"}
    if not live and not path.is_file():
        raise MediaError(f"{path}: not a file")  # opening a pipe would block
    if path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    # An open file, so that FFmpeg does not parse its name as a protocol; of a pipe, without a buffer, as above.
    return open(path, "rb", buffering=-1 if path.is_file() else 0), alone


class _Waiting(io.FileIO):
    """An open pipe that is waited for also if another process that shares it made it non-blocking."""

    def read(self, size: int | None = -1) -> bytes:
        while (found := super().read(size)) is None:
            select.select([self], [], [])
        return found


def said(error: Exception) -> str:
    """Returns FFmpeg's message, or that a source timed out, for which FFmpeg says "Immediate exit requested"."""
    if isinstance(error, import_av().error.ExitError):
        return f"timed out after {WAIT:g} s"
    return getattr(error, "strerror", None) or str(error)


def _unknown(source: str | Path) -> str:
    """Returns what is wrong with a source that FFmpeg does not recognize: half an MP4 lacks the index at its end."""
    if Path(source).is_file():
        with open(source, "rb") as file:
            if file.read(8)[4:] == b"ftyp":
                return "cut short: its index is missing"
    return "not a video"


def video_stream(container: Any, source: str | Path) -> Any:
    """Returns the first video stream that is not cover art. Raises MediaError."""
    for stream in container.streams.video:
        if "attached_pic" not in str(stream.disposition).lower():
            if stream.codec_context is not None and stream.width * stream.height > PIXELS:
                size = f"{stream.width} x {stream.height}"
                raise MediaError(f"{source}: a frame has {size} pixels; up to {PIXELS} are read")
            stream.thread_type = "AUTO"
            stream.options = {"max_pixels": str(PIXELS)}  # frames larger than declared count as damaged
            return stream
    raise MediaError(f"{source}: holds no video stream")


class Clock:
    """Maps frames to monotonic times in seconds from the first frame.

    If timestamps fall back by more than JUMP, as in joined recordings, looped streams, or when the 33 bits of MPEG-TS
    wrap after 26.5 hours, time advances by one frame; also if they go on after LONGEST_GAP, as where a camera that
    counts from 1970 sets its clock, or one is damaged.
    """

    def __init__(self, rate: float = ASSUMED):
        self.rate = rate  # frames per second, according to the container
        self.shifts: list[float] = []  # offsets from container time to clock time, ascending, one more per jump
        self.now = 0.0  # time of the last frame
        self.seen = 0  # frames
        self.damaged = 0  # packets that could not be decoded, each a frame

    def __call__(self, frame: Any) -> float:
        onward = self.now + 1 / self.rate if self.seen else 0.0  # time of a frame without a usable timestamp
        if frame.time is not None and not self.shifts:
            self.shifts.append(onward - frame.time)
        time = onward if frame.time is None else self.place(frame.time)
        if not self.now - JUMP <= time <= self.now + LONGEST_GAP:
            bisect.insort(self.shifts, onward - frame.time)
            time = onward
        self.now = max(self.now, time)
        self.seen += 1
        return self.now

    def place(self, at: float) -> float:
        """Maps a container time to this clock with the offset that brings it closest to now.

        This aligns audio with the frames around it, although its timestamps may jump a few packets earlier or later.
        """
        if not self.shifts:
            return at
        wanted = self.now - at
        i = bisect.bisect(self.shifts, wanted)
        return at + min(self.shifts[max(i - 1, 0) : i + 1], key=lambda shift: abs(shift - wanted))


def rate_of(stream: Any) -> float | None:
    """Average frames per second; None if the container does not say, or FFmpeg guesses the ticks of its clock."""
    guess = stream.guessed_rate
    rate = stream.average_rate or (guess if guess and guess < CLOCK else None)
    return float(rate) if rate else None


class Beat:
    """Tells, for frames in order, whether each is the first at or after a multiple of `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self.due = seconds, 0
        self.early = min(ROUNDED, seconds / 4)

    def __call__(self, time: float) -> bool:
        beats = (time + self.early) / self.seconds
        if beats < self.due:
            return False
        self.due = int(beats) + 1
        return True


def frames(source: str | Path, stream: Any, container: Any, clock: Clock | None = None) -> Iterator[tuple[float, Any]]:
    """Yields (time, decoded frame) in order, with times from `clock`, whose rate is set from the stream.

    clock: an unused one, which also counts frames that cannot be decoded; None creates one
    Raises MediaError if the file is truncated, or no frame can be decoded.
    """
    av, clock, reach = import_av(), clock or Clock(), Reach(container, stream)
    clock.rate = rate_of(stream) or ASSUMED
    try:
        for packet in container.demux():
            reach(packet)
            if packet.stream is stream:
                for frame in decoded(packet, clock):
                    yield clock(frame), frame
    except (av.error.FFmpegError, OSError) as error:
        short = error.errno in SHORT
        what = "threads or memory are short" if short else f"damaged or cut short after {clock.seen} frames"
        raise MediaError(f"{source}: {what}: {error.strerror}") from error
    reach.check(source, clock.seen)


class Reach:
    """Compares where a file's packets end with the end that its header declares, to detect a truncated file.

    MKV, WebM and FLV declare the end of all streams, the indexes of AVI and MP4 that of the video. For other
    containers, FFmpeg gives the end of the data present.
    """

    def __init__(self, container: Any, stream: Any):
        self.of = stream  # the stream whose end is declared, or None for all
        self.declared = 0.0  # seconds, or 0 if unknown
        form = container.format.name
        if form in ("matroska,webm", "flv"):
            self.of, self.declared = None, (container.duration or 0) / 1e6
        elif stream.frames and form == "avi":  # its duration would be an estimate from the size of the file
            self.declared = float(stream.frames * stream.time_base)
        elif stream.frames and stream.duration:
            self.declared = float(stream.duration * stream.time_base)
        self.end = self.step = 0.0  # of the packets so far, and the longest time between two ends

    def __call__(self, packet: Any) -> None:
        at = packet.dts if packet.pts is None else packet.pts
        if at is not None and self.of in (None, packet.stream):
            end = float((at + (packet.duration or 0)) * packet.time_base)
            self.step, self.end = max(self.step, end - self.end), max(self.end, end)

    def check(self, source: str | Path, seen: int) -> None:
        """Raises MediaError if there is no frame (seen: decoded frames), or if the packets end far too early.

        Not all containers store the last frame's duration, which may be as long as any before it.
        """
        if seen == 0:
            raise MediaError(f"{source}: holds no frame that can be decoded")
        if self.declared - self.end > max(0.1 * self.declared, 2 * self.step):
            raise MediaError(f"{source}: cut short: {self.end:.1f} s of {self.declared:.1f} s are there")


def upright(frame: Any) -> np.ndarray:
    """Returns a frame's image, (H, W, 3) uint8 RGB, rotated as a player displays it."""
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90) % 4)) if frame.rotation else image


def check_sampling(every: int, fps: float | None) -> None:
    """Raises MediaError unless `every` is at least 1 frame, or `fps`, if given, positive and finite."""
    if fps is None and every < 1:
        raise MediaError(f"every must be 1 frame per snippet or more; got {every}")
    if fps is not None and not 0 < fps < math.inf:
        raise MediaError(f"fps must be a number of snippets per second above 0; got {fps}")


def snippet_frames(
    source: str | Path,
    every: int = 16,
    fps: float | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Iterator[Frame]:
    """Yields the first frame of each complete snippet of `every` frames; a shorter video is one snippet.

    fps: snippets per second instead of `every`: yields the first frame at or after each multiple of 1 / fps
    clock: an unused one, which records the stream's rate and timestamp jumps for `read_sound`
    Raises MediaError if the file is missing, truncated, or has no decodable video, or if `every` or `fps` is invalid.
    """
    check_sampling(every, fps)
    with opened(source) as container:
        stream = video_stream(container, source)
        held: Frame | None = None
        count = 0
        last = wait = 0.0
        beat = None if fps is None else Beat(1 / fps)
        for time, frame in frames(source, stream, container, clock):
            if progress is not None:
                progress(1)
            last, wait = time, max(wait, time - last)
            if beat is not None:
                if beat(time):
                    yield Frame(time, upright(frame), wait)
                    wait = 0.0
                continue
            if count % every == 0:
                held, wait = Frame(time, upright(frame), wait), 0.0
            count += 1
            if count % every == 0 and held is not None:
                yield held
        if held is not None and count < every:
            yield held


@dataclass
class Sound:
    """Audio of a video: (n,) int16 samples at RATE, memory-mapped from a temporary file, starting at time 0."""

    samples: np.ndarray
    mapped: mmap.mmap | None = None  # memory map behind the samples

    def windows(self, times: np.ndarray, seconds: float, progress: Progress | None = None) -> "Windows":
        """Windows of `seconds` starting at each time. progress: as for `Windows`."""
        starts = np.round(np.asarray(times) * RATE).astype(np.int64)
        return Windows(self.samples, starts, round(seconds * RATE), self.mapped, progress)


@dataclass
class Windows:
    """Audio windows; windows[a:b] is (b - a, size) float32 in [-1, 1], zero where there is no audio.

    Windows are read on access, so that hours of audio need little memory.
    """

    samples: np.ndarray  # (n,) int16
    starts: np.ndarray  # (N,) int64
    size: int
    mapped: mmap.mmap | None = None  # memory map behind the samples
    progress: Progress | None = None  # called with 0 on every read, and may raise

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
            self.mapped.madvise(mmap.MADV_DONTNEED)  # else pages read so far count as this process's memory
        out /= 32768
        return out

    def heard(self) -> np.ndarray:
        """Whether each window is audible, (N,) bool."""
        chunk = max(1, AT_ONCE // max(1, self.size))
        loud = [np.zeros(0, bool)]
        for start in range(0, len(self), chunk):
            loud.append(audible(self[start : start + chunk]))
        return np.concatenate(loud)


def audible(windows: np.ndarray) -> np.ndarray:
    """Whether each window is audible: windows (N, samples) -> (N,) bool."""
    return np.sqrt((windows**2).mean(1)) > SILENCE


def read_sound(source: str | Path, clock: Clock | None = None, progress: Progress | None = None) -> Sound | None:
    """Reads the first audio stream of a file as mono at RATE, or returns None without one. Raises MediaError.

    clock: the one with which `snippet_frames` read the whole file, to keep audio and frames aligned across timestamp
    jumps; without it, no jumps are assumed
    progress: called with 0 for each block, and may raise
    """
    shifts = clock.shifts if clock is not None else [-first_time(source)]
    latest = math.inf if clock is None else clock.now + OUTLASTS
    # hours of audio take gigabytes, so they go to an unnamed temporary file
    with opened(source) as container, tempfile.TemporaryFile() as file:
        if not container.streams.audio:
            return None
        written = 0
        for time, block in sound_blocks(source, container, shifts):
            if progress is not None:
                progress(0)
            if time > latest:  # a damaged time stamp, which would leave no room for the sound that follows
                continue
            gap = round(time * RATE) - written
            if gap > (GAP * RATE if written else 0):
                file.seek(2 * gap, os.SEEK_CUR)  # a sparse hole, which reads as zeros and takes no space
                written += gap
            elif gap < (-GAP * RATE if written else 0):
                block = block[-gap:]  # before the first frame, or already written
            file.write((block * 32768).round().clip(-32768, 32767).astype(np.int16).tobytes())
            written += len(block)
        file.flush()
        if not written:
            return Sound(np.zeros(0, np.int16))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Sound(np.frombuffer(mapped, np.int16), mapped)


def first_time(source: str | Path) -> float:
    """Container time of the first frame. Raises MediaError."""
    with opened(source) as container:
        av, stream = import_av(), video_stream(container, source)
        try:
            return next((frame.time or 0.0 for frame in container.decode(stream)), 0.0)
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{source}: damaged: {error.strerror}") from error


def sound_blocks(source: str | Path, container: Any, shifts: Sequence[float]) -> Iterator[tuple[float, np.ndarray]]:
    """Yields (time, samples (n,) float32 mono at RATE) of the first audio stream in order, skipping damaged packets.

    shifts: those of the frames' `Clock`; video packets determine which one applies
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


def decoded(packet: Any, clock: Clock | None = None) -> list[Any]:
    """Decodes a packet to frames; a damaged packet gives none, and is counted by `clock`.

    Raises FFmpegError if there is no decoder for lack of threads or memory, of which no packet is the cause.
    """
    try:
        return packet.decode()
    except import_av().error.FFmpegError as error:
        if error.errno in SHORT and not packet.stream.codec_context.is_open:
            raise
        if clock is not None:
            clock.damaged += 1
        return []


class Mono:
    """Converts audio frames of any rate and channels to (time, samples (n,) float32 mono at RATE)."""

    def __init__(self) -> None:
        self.resampler: Any = None
        # of the current contiguous run; sent: samples yielded so far
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
        """Flushes the resampler."""
        if self.resampler is not None:
            yield from self._resampled(None)
            self.resampler = None

    def _resampled(self, frame: Any) -> Iterator[tuple[float, np.ndarray]]:
        for out in self.resampler.resample(frame):
            block = out.to_ndarray().reshape(-1)
            yield self.time + self.sent / RATE, block
            self.sent += len(block)


def to_mono(frame: Any) -> np.ndarray:
    """Averages channels to (n,) float32 in [-1, 1]; FFmpeg itself rejects channel layouts it has no name for."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T  # [channels, n]
    mono = array.astype(np.float32).mean(0)
    if array.dtype.kind == "f":
        return mono
    half = np.float32(2.0 ** (8 * array.dtype.itemsize - 1))
    return (mono - half) / half if array.dtype.kind == "u" else mono / half
