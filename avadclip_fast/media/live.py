"""Snippets of a live stream, such as a camera or an RTSP or HTTP URL, or of a file read like one.

A thread reads and decodes. Snippets not fetched in time are dropped, so that memory and latency stay bounded.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.errors import without_login
from .decode import (
    ASSUMED,
    GAP,
    JUMP,
    RATE,
    STDIN,
    Beat,
    Clock,
    Mono,
    Reach,
    check_sampling,
    decoded,
    opened,
    rate_of,
    said,
    upright,
    video_stream,
)
from .errors import MediaError, import_av

WAITING = 4  # snippets queued between the reader and the consumer
LAG = 1.0  # seconds that a snippet waits for its audio, which may arrive after its frame
LAG_IN_FILES = 5.0  # of which nobody waits for an alarm: VOB and MPG have two seconds of a still scene before its audio
IMAGES = 2**30  # bytes of images that wait for audio, at most: five seconds of 4K are 3 GB, if each frame is a snippet
HELD = 256  # audio blocks, about 20 to 60 ms each, waiting for a frame to align with
THREADS = 16  # at most, with which FFmpeg decodes as many frames at once, and gives each as many frames later
INHERITED = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # names of what the process was given open
LONGEST_PAUSE = 30.0  # seconds between reconnection attempts
BURST = 60.0  # seconds that a live source may be ahead of its time, as HLS is, which sends segments; more is a jump
FORGET = 0.01  # seconds by which the greatest delay of a source falls in each second without a greater one


class Snippet(NamedTuple):
    """A snippet of a stream."""

    time: float  # seconds from the start of the stream
    image: np.ndarray  # (H, W, 3) uint8 RGB, upright, its first frame
    sound: np.ndarray | None  # (n,) float32 mono at RATE, zero where missing; None without an audio stream
    frames: int  # number of frames it covers
    seconds: float  # its duration; at the end of a file, up to the end of the last frame


class _First(NamedTuple):
    """The first frame of a snippet that waits for its end and its audio."""

    time: float  # by the clock
    image: np.ndarray
    before: int  # number of frames before it


class LiveSource:
    """Iterates over the snippets of a file, a device such as /dev/video0, an rtsp, http, udp or srt URL, or "-", stdin.

    A source that is not a file and has no known duration is *live*: the oldest queued snippets are dropped if the
    consumer falls behind, and a lost connection is re-established, other than stdin. A file is read as fast as it is
    consumed.

    every: frames per snippet; fps: snippets per second, instead of `every`
    retries: consecutive reconnection attempts before giving up
    until: polled twice per second; returning True ends the iteration
    Raises MediaError if `every` or `fps` is invalid, or the source does not exist, is not a video, or is lost for
    good.

    The attributes frames, dropped and reconnects are counts so far. Set once the first snippet is read: `seconds`, the
    duration of a snippet; `assumed`, whether that assumes a frame rate, as the source declares none; `live`; and
    `began`.
    """

    def __init__(
        self,
        source: str | Path,
        every: int = 16,
        fps: float | None = None,
        retries: int = 8,
        until: Callable[[], bool] = lambda: False,
    ):
        check_sampling(every, fps)
        self.source, self.every, self.fps, self.retries, self.until = source, every, fps, retries, until
        self.seconds = 1 / fps if fps is not None else 0.0
        self.frames = self.dropped = self.reconnects = 0
        self.live = self.assumed = False
        self._arrived: float | None = None  # monotonic time of the first frame, time 0
        self._queue: queue.Queue[Snippet | Exception | None] = queue.Queue(WAITING)
        self._begun = False
        self._closed = threading.Event()

    @property
    def began(self) -> datetime | None:
        """UTC time at which the first frame arrived, by the system's clock as it is now: a boot may set it later."""
        if self._arrived is None:
            return None
        return datetime.now(UTC) - timedelta(seconds=time.monotonic() - self._arrived)

    def __iter__(self) -> Iterator[Snippet]:
        if self._begun:
            raise MediaError(f"{self.source} was read already: make another LiveSource of it, or keep the iterator")
        self._begun = True
        thread = threading.Thread(target=self._read, name=f"reading {without_login(str(self.source))}", daemon=True)
        thread.start()
        try:
            while not self.until():
                try:
                    item = self._queue.get(timeout=0.5)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._closed.set()

    def _read(self) -> None:
        last, tries = 0.0, 0
        late = 0.0  # the greatest delay, in seconds, with which snippets came: of a segment, that of its first

        def offset() -> float:
            """Time of a connection's first frame, when it arrives: connecting and waiting for it take time too."""
            if self._arrived is None:
                self._arrived = time.monotonic()
                return 0.0
            # a server may send faster than real time, but times must not decrease
            return max(time.monotonic() - self._arrived, last + self.seconds)

        try:
            while not self._closed.is_set():
                lost = MediaError(f"{self.source}: the stream ended")
                try:
                    for snippet in self._snippets(offset):
                        last, tries, due = snippet.time, 0, None
                        if self.live and self._arrived is not None:
                            late = max(time.monotonic() - self._arrived - last, late - FORGET * snippet.seconds)
                            due = self._arrived + last + min(late, BURST)
                        self._put(snippet, due)
                except MediaError as error:
                    if self._arrived is None or not self._reopens():
                        raise
                    lost = error
                if not self._reopens():
                    break
                if tries == self.retries:
                    raise MediaError(f"{lost}; not back after {tries} tries")
                tries += 1
                self.reconnects += 1
                # 10: past LONGEST_PAUSE. No float holds the power after a night of tries.
                self._closed.wait(min(0.25 * 2 ** min(tries, 10), LONGEST_PAUSE))
            self._put(None)
        except Exception as error:  # raised in the consumer
            self._put(error)

    def _reopens(self) -> bool:
        # The end of a pipe that the process was given, also as /dev/stdin or <(...), is that of what feeds it.
        return self.live and str(self.source) != STDIN and not str(self.source).startswith(INHERITED)

    def _put(self, item: "Snippet | Exception | None", due: float | None = None) -> None:
        """Queues an item. due: monotonic time from which the oldest in a full queue gives way to it, or None: never."""
        while not self._closed.is_set():
            early = 0.5 if due is None else due - time.monotonic()
            wait = min(early, 0.5) if 0 < early < BURST else 0.0
            try:
                return self._queue.put(item, timeout=wait)
            except queue.Full:
                if wait:
                    continue
                try:
                    oldest = self._queue.get_nowait()
                except queue.Empty:
                    continue  # fetched in the meantime
                self.dropped += oldest.frames if isinstance(oldest, Snippet) else 0

    def _snippets(self, offset: Callable[[], float]) -> Iterator[Snippet]:
        """Yields the snippets of one connection. offset: called once, at its first frame, for the time of that."""
        av = import_av()
        with opened(self.source, live=True) as container:
            video = video_stream(container, self.source)
            audio = container.streams.audio[0] if container.streams.audio else None
            self.live = container.duration is None and not os.path.isfile(self.source)
            rate = rate_of(video)
            self.assumed = rate is None and self.fps is None
            lag = LAG if self.live else LAG_IN_FILES
            if rate is not None and THREADS / rate > lag:  # else alarms come late, and sound is gone before its frame
                video.thread_type = "SLICE"
            clock, reach = Clock(rate or ASSUMED), Reach(container, video)
            self.seconds = self.seconds or self.every / clock.rate
            beat, start = Beat(self.seconds), 0.0
            waiting: deque[_First] = deque()
            mono, sound = Mono(), Placed(self.seconds + 2 * lag + WAITING * self.seconds, clock)
            try:
                for packet in container.demux():
                    if self._closed.is_set():
                        return
                    reach(packet)
                    if packet.stream is audio:
                        for block in (block for frame in decoded(packet) for block in mono(frame)):
                            sound.add(*block)
                    if packet.stream is not video:
                        continue
                    for frame in decoded(packet):
                        before = clock.seen
                        if before == 0:
                            start = offset()
                        if beat(clock(frame)):
                            waiting.append(_First(clock.now, upright(frame), before))
                        self.frames += 1
                    sound.settle()
                    while waiting and self._complete(waiting, clock, audio, sound, lag):
                        yield self._made(waiting, clock, start, audio, sound)
            except (av.error.FFmpegError, OSError) as error:
                self.dropped += clock.seen - waiting[0].before if waiting else 0
                raise MediaError(f"{self.source}: lost after {clock.seen} frames: {said(error)}") from error
            for block in mono.rest():
                sound.add(*block)
            while waiting:
                yield self._made(waiting, clock, start, audio, sound)
            reach.check(self.source, clock.seen)

    def _complete(self, waiting: deque[_First], clock: Clock, audio: Any, sound: "Ring", lag: float) -> bool:
        """Whether the first snippet is complete, or its audio is later than `lag` seconds or IMAGES."""
        end = waiting[0].time + self.seconds
        late = clock.now >= end + lag or len(waiting) * waiting[0].image.nbytes > IMAGES
        return clock.now >= end and (audio is None or sound.end >= end or late)

    def _made(self, waiting: deque[_First], clock: Clock, start: float, audio: Any, sound: "Ring") -> Snippet:
        at, image, before = waiting.popleft()
        frames = (waiting[0].before if waiting else clock.seen) - before
        heard = None if audio is None else sound.take(at, round(self.seconds * RATE))
        seconds = self.seconds if waiting else min(self.seconds, clock.now + 1 / clock.rate - at)
        return Snippet(start + at, image, heard, frames, seconds)


class Ring:
    """Ring buffer of a stream's latest audio, (n,) float32 at RATE."""

    def __init__(self, seconds: float):
        self.size = round(seconds * RATE)
        self.samples = np.zeros(0, np.float32)
        self.end = 0.0  # time of the last sample in seconds

    def add(self, at: float, block: np.ndarray) -> None:
        """Appends samples that start at `at`, filling gaps with silence and skipping overlaps."""
        gap = at - self.end
        if len(self.samples) == 0 or gap > self.size / RATE:
            self.samples, self.end, gap = np.zeros(0, np.float32), at, 0.0
        if gap > GAP:
            block = np.concatenate([np.zeros(round(gap * RATE), np.float32), block])
        elif gap < -GAP:
            block = block[round(-gap * RATE) :]
        self.samples = np.concatenate([self.samples, block])[-self.size :]
        self.end += len(block) / RATE

    def take(self, at: float, samples: int) -> np.ndarray:
        """Returns (samples,) starting at `at`, zero where there is no audio."""
        out = np.zeros(samples, np.float32)
        first = round((at - self.end) * RATE) + len(self.samples)  # index into self.samples, possibly negative
        here = self.samples[max(first, 0) : max(first + samples, 0)]
        out[max(-first, 0) : max(-first, 0) + len(here)] = here
        return out


class Placed(Ring):
    """Ring buffer that maps blocks from container time to the clock of the frames.

    Holds blocks that cannot be placed yet: those before the first frame, or after a timestamp jump, backward or beyond
    what the buffer has room for, that the frames have not reached. They may never, if a time stamp is damaged.
    """

    def __init__(self, seconds: float, clock: Clock):
        super().__init__(seconds)
        self.clock = clock
        self.held: deque[tuple[float, np.ndarray]] = deque(maxlen=HELD)

    def add(self, at: float, block: np.ndarray) -> None:
        placed = self.clock.place(at)
        behind = len(self.samples) > 0 and placed < self.end - JUMP
        if self.clock.seen == 0 or behind or placed > self.clock.now + self.size / RATE:
            self.held.append((at, block))
        else:
            super().add(placed, block)

    def settle(self) -> None:
        """Retries the held blocks, after frames."""
        again = list(self.held)
        self.held.clear()
        for one in again:
            self.add(*one)
