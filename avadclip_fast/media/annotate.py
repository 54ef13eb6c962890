"""Annotated copies of videos, with the score curve and the name of the current event drawn in."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.atomic import atomic_write
from .decode import JUMP, Clock, Progress, frames, opened, upright, video_stream
from .errors import import_av

TICKS = 1000  # per second: millisecond timestamps for any frame rate
BLUE, RED, GREY = (86, 180, 233), (213, 94, 0), (160, 160, 160)


def annotate(
    source: str | Path,
    target: str | Path,
    edges: np.ndarray,
    scores: np.ndarray,
    thresholds: np.ndarray,
    names: list[str],
    progress: Progress | None = None,
) -> None:
    """Writes a Matroska copy of a video with annotated, re-encoded frames and the original audio stream.

    edges: (n + 1,) snippet boundaries in seconds
    scores, thresholds: (n,) in 0..1
    names: event name per snippet, "" for none
    progress: called with 1 for each frame
    Raises MediaError.
    """
    av = import_av()
    with (
        opened(source) as given, opened(source) as again,
        atomic_write(Path(target)) as file, av.open(file, "w", format="matroska") as made,
    ):  # fmt: skip
        seen = video_stream(given, source)
        heard = again.streams.audio[0] if again.streams.audio else None
        copied = made.add_stream_from_template(heard) if heard is not None else None
        clock = Clock()
        track = Track(again, heard, copied, made, clock)
        out: Any = None
        strip, last = np.zeros(0), -1
        for time, frame in frames(source, seen, given, clock):
            image = upright(frame, frame.to_ndarray(format="rgb24"))
            image = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]  # encoders require even sizes
            if out is None:
                height, width = image.shape[:2]
                codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
                out = made.add_stream(codec, rate=seen.average_rate or 25)
                out.width, out.height, out.pix_fmt = width, height, "yuv420p"
                out.codec_context.time_base = Fraction(1, TICKS)
                strip = _strip(width, max(16, height // 8), edges, scores, thresholds)
            if image.shape != (height, width, 3):  # the frame size may change within a stream
                image = np.asarray(Image.fromarray(image).resize((width, height)))
            snippet = int(np.clip(np.searchsorted(edges, time, "right") - 1, 0, len(scores) - 1))
            shown = _drawn(image, strip, edges, time, scores[snippet], names[snippet])
            encoded = av.VideoFrame.from_ndarray(shown, format="rgb24")
            last = max(last + 1, round(time * TICKS))
            encoded.pts, encoded.time_base = last, Fraction(1, TICKS)
            made.mux(out.encode(encoded))
            track.write(time)  # interleaved, as players expect
            if progress is not None:
                progress(1)
        made.mux(out.encode(None))
        track.write(np.inf)


class Track:
    """Copies audio packets to the stream `copied`, from the first frame on, retimed to the clock of the frames."""

    def __init__(self, container: Any, heard: Any, copied: Any, made: Any, clock: Clock):
        self.packets: Iterator[Any] = iter(()) if heard is None else container.demux(heard)
        self.waiting = next(self.packets, None)
        self.copied, self.made, self.clock, self.end = copied, made, clock, -np.inf

    def write(self, until: float) -> None:
        """Writes the packets before the time `until`, up to which frames have been written."""
        while self.waiting is not None:
            packet = self.waiting
            if packet.pts is not None:
                raw = float(packet.pts * packet.time_base)
                at = self.clock.place(raw)
                if at > until or (at < self.end - JUMP and until < np.inf):
                    return  # later, or after a timestamp jump that the frames have not reached
                if at >= max(self.end, 0.0):  # else before the first frame, or a duplicate
                    self.end = at
                    shift = round((at - raw) / packet.time_base)
                    packet.pts += shift
                    packet.dts = packet.pts if packet.dts is None else packet.dts + shift
                    packet.stream = self.copied
                    self.made.mux(packet)
            self.waiting = next(self.packets, None)


def _strip(width: int, height: int, edges: np.ndarray, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The curve over the whole video, (height, width, 3) uint8, drawn once."""
    strip = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(strip)
    x = (edges - edges[0]) / (edges[-1] - edges[0]) * (width - 1)
    for values, colour, thick in ((thresholds, GREY, 1), (scores, BLUE, 2)):
        y = (1 - values) * (height - 3) + 1
        points = [point for i in range(len(values)) for point in ((x[i], y[i]), (x[i + 1], y[i]))]
        draw.line(points, fill=colour, width=thick)
    return np.asarray(strip)


def _drawn(image: np.ndarray, strip: np.ndarray, edges: np.ndarray, time: float, score: float, name: str) -> np.ndarray:
    height, width = image.shape[:2]
    image = image.copy()
    bottom = image[height - len(strip) :]
    bottom[:] = strip
    at = int((time - edges[0]) / (edges[-1] - edges[0]) * (width - 1))
    bottom[:, np.clip([at, at + 1], 0, width - 1)] = 255
    if not name:
        return image
    thick = max(2, height // 120)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width - 1, height - 1 - len(strip)), outline=RED, width=thick)
    font = ImageFont.load_default(max(10, height // 18))
    draw.text((3 * thick, 2 * thick), f"{name} {score:.2f}", RED, font, stroke_width=1, stroke_fill="black")
    return np.asarray(picture)
