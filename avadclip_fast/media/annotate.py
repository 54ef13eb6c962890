"""Annotated copies of videos, with the score curve and the name of the current event drawn in."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.atomic import atomic_write
from ..data.errors import printable
from .decode import JUMP, Clock, Progress, decoded, frames, opened, upright, video_stream
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
) -> str:
    """Writes a Matroska copy of a video with annotated, re-encoded frames and the original audio stream.

    Audio that Matroska does not take (G.711 of .mov files, AMR, some ADPCM) is re-encoded as FLAC.

    edges: (n + 1,) snippet boundaries in seconds
    scores, thresholds: (n,) in 0..1, or NaN where there is no footage
    names: event name per snippet, "" for none
    progress: called with 1 for each frame
    Returns "", or why the copy lacks sound or a part of it, in a line that names the source. Raises MediaError.
    """
    av = import_av()
    with (
        opened(source) as given, opened(source) as again,
        atomic_write(Path(target)) as file, av.open(file, "w", format="matroska") as made,
    ):  # fmt: skip
        seen = video_stream(given, source)
        heard = again.streams.audio[0] if again.streams.audio else None
        clock = Clock()
        track = Track(again, heard, made, clock)
        out: Any = None
        strip, last = np.zeros(0), -1  # the curve, and the time stamp of the last frame
        for time, frame in frames(source, seen, given, clock):
            image = upright(frame)
            if out is None:
                height, width = (max(2, size // 2 * 2) for size in image.shape[:2])  # encoders require even sizes
                out = _video(made, height, width, seen, frame)
                strip = _strip(width, min(max(16, height // 8), height // 2), edges, scores, thresholds)
            image = image[: image.shape[0] // 2 * 2 or None, : image.shape[1] // 2 * 2 or None]
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
    return f"{source}: {track.lost}" if track.lost else ""


def _video(made: Any, height: int, width: int, seen: Any, frame: Any) -> Any:
    """Adds a stream of frames of this size to `made`, with the rate and shape of pixels of the stream `seen`.

    frame: its first, which may be turned
    """
    codec = "libx264" if "libx264" in import_av().codecs_available else "mpeg4"
    out = made.add_stream(codec, rate=seen.average_rate or 25)
    out.width, out.height, out.pix_fmt = width, height, "yuv420p"
    out.codec_context.time_base = Fraction(1, TICKS)
    if shape := seen.sample_aspect_ratio:
        turned = round(frame.rotation / 90) % 2
        out.codec_context.sample_aspect_ratio = 1 / shape if turned else shape
    return out


class Track:
    """Copies the audio stream `heard` to `made`, from the first frame on, retimed to the clock of the frames.

    Re-encodes audio that the container does not take. Attribute: `lost`, why sound is missing, or "".
    """

    def __init__(self, container: Any, heard: Any, made: Any, clock: Clock):
        self.packets: Iterator[Any] = iter(())
        self.copied, self.lost = None, ""
        if heard is not None and _taken(heard):
            self.copied, self.packets = made.add_stream_from_template(heard), container.demux(heard)
        elif heard is not None:
            self._recode(heard, container, made)
        self.waiting = next(self.packets, None)
        self.made, self.clock, self.end = made, clock, -np.inf

    def _recode(self, heard: Any, container: Any, made: Any) -> None:
        av, codec = import_av(), "its codec" if heard.codec_context is None else heard.codec_context.name
        try:
            if heard.codec_context is None:
                raise ValueError("no decoder")
            trial = av.CodecContext.create("flac", "w")  # a stream once added to `made` cannot be taken back
            trial.sample_rate, trial.layout, trial.format = heard.rate, heard.layout, "s16"
            trial.open()
        except (ValueError, av.error.FFmpegError) as error:
            self.lost = f"the annotated copy has no sound: {codec} cannot be re-encoded ({error})"
            return
        self.copied = made.add_stream("flac", rate=heard.rate, layout=heard.layout)
        self.packets = self._recoded(container.demux(heard), self.copied)

    def _recoded(self, packets: Iterator[Any], encoder: Any) -> Iterator[Any]:
        try:
            for packet in packets:
                for frame in decoded(packet):
                    yield from encoder.encode(frame)
            yield from encoder.encode(None)
        except (ValueError, import_av().error.FFmpegError) as error:  # such as another rate from here on
            self.lost = f"the sound of the annotated copy ends early: it cannot be re-encoded ({error})"

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


def _taken(heard: Any) -> bool:
    """Whether Matroska takes the packets of this audio stream as they are."""
    av = import_av()
    try:
        with av.open(io.BytesIO(), "w", format="matroska") as trial:
            trial.add_stream_from_template(heard)
            trial.start_encoding()
    except (ValueError, av.error.FFmpegError):
        return False
    return True


def _strip(width: int, height: int, edges: np.ndarray, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The curve over the whole video, (height, width, 3) uint8, drawn once, with holes where scores are NaN."""
    strip = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(strip)
    x = (edges - edges[0]) / (edges[-1] - edges[0]) * (width - 1)
    for values, colour, thick in ((thresholds, GREY, 1), (scores, BLUE, 2)):
        y = (1 - values) * max(0, height - 3) + min(1, height - 1)
        known = np.flatnonzero(np.isfinite(values))
        for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            points = [point for i in part for point in ((x[i], y[i]), (x[i + 1], y[i]))]
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
    text, size = f"{printable(name)} {score:.2f}", height // 18
    needed = 6 * thick + draw.textlength(text, ImageFont.load_default(max(10, size)))
    font = ImageFont.load_default(max(10, int(size * min(1, width / needed))))
    draw.text((3 * thick, 2 * thick), text, RED, font, stroke_width=1, stroke_fill="black")
    return np.asarray(picture)
