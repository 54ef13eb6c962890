"""The features of one video: what `extract` writes, and what `detect` scores."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .crops import cut
from .decode import Clock, Progress, read_sound, snippet_frames
from .encoders import BATCH, AudioEncoder, VisualEncoder, encoded


@dataclass(frozen=True)
class Sampling:
    """How a video is cut into snippets, and what of a frame is seen."""

    every: int = 16  # frames a snippet
    fps: float | None = None  # snippets a second, in place of `every`
    crops: int = 1
    geometry: str = "crops"


@dataclass
class VideoFeatures:
    """Of n snippets."""

    visual: np.ndarray  # (crops, n, D)
    audio: np.ndarray | None  # (n, D); None: no audio stream
    times: np.ndarray  # (n,) seconds from the first frame
    seconds: float  # of one snippet
    heard: np.ndarray  # (n,) bool: whether there is anything to hear


def video_features(
    source: str | Path,
    sampling: Sampling,
    visual: VisualEncoder,
    audio: AudioEncoder | None,
    progress: Progress | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> VideoFeatures:
    """Decodes and encodes one file. Memory does not grow with its length but for the features.

    A snippet's window of sound starts with its frame and is as long as a snippet. audio: None leaves the sound out.
    dtype: of both features. progress: is called with 0 while the sound is read and encoded; what it raises ends the
    work. Raises MediaError.
    """
    clock = Clock()
    rows = bytearray()  # grows in place: a list of arrays would be there twice when it is joined
    pending: list[torch.Tensor] = []
    starts: list[float] = []

    def encode() -> None:
        if pending:
            images = torch.cat(pending)  # [n·crops, 3, S, S]
            rows.extend(encoded("visual", visual, images, len(images)).astype(dtype, copy=False).tobytes())
            pending.clear()

    for frame in snippet_frames(source, sampling.every, sampling.fps, progress, clock):
        starts.append(frame.time)
        pending.append(cut(frame.image, sampling.crops, sampling.geometry, visual.size))
        if len(pending) * sampling.crops >= BATCH:
            encode()
    encode()
    times = np.array(starts)
    seconds = snippet_seconds(times, sampling, clock.rate)
    seen = np.frombuffer(rows, dtype).reshape(len(times), sampling.crops, -1).transpose(1, 0, 2)  # [crops, n, D]
    sound = None if audio is None else read_sound(source, clock, progress)
    if audio is None or sound is None:
        return VideoFeatures(seen, None, times, seconds, np.zeros(len(times), bool))
    windows = sound.windows(times, seconds, progress)
    embedded = encoded("audio", audio, windows, len(times)).astype(dtype, copy=False)
    return VideoFeatures(seen, embedded, times, seconds, windows.heard())


def key_frames(source: str | Path, sampling: Sampling, snippets: Collection[int]) -> dict[int, np.ndarray]:
    """Snippet -> image (H, W, 3) uint8 of some snippets of a video. Raises MediaError."""
    images = {}
    for i, frame in enumerate(snippet_frames(source, sampling.every, sampling.fps)):
        if i in snippets:
            images[i] = frame.image
        if len(images) == len(snippets):
            break
    return images


def snippet_seconds(times: np.ndarray, sampling: Sampling, rate: float) -> float:
    """The usual distance of two snippets: their median, which a few odd time stamps do not move.

    rate: frames a second, which tells how long a single snippet is.
    """
    if sampling.fps is not None:
        return 1 / sampling.fps
    return float(np.median(np.diff(times))) if len(times) > 1 else sampling.every / rate
