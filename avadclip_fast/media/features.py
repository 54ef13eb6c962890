"""Features of one video, which `extract` writes and `detect` scores."""

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
    """How videos are cut into snippets and frames are cropped."""

    every: int = 16  # frames per snippet
    fps: float | None = None  # snippets per second, instead of `every`
    crops: int = 1
    geometry: str = "crops"


@dataclass
class VideoFeatures:
    """Features of a video of n snippets."""

    visual: np.ndarray  # (crops, n, D)
    audio: np.ndarray | None  # (n, D), or None without an audio stream
    times: np.ndarray  # (n,) seconds from the first frame
    seconds: float  # duration of a snippet
    heard: np.ndarray  # (n,) bool, whether the snippet has audible sound
    waits: np.ndarray | None = None  # (n,) seconds, see `decode.Frame`; None if there are frames at `times` alone
    end: float = np.inf  # of the last frame, in seconds
    damaged: int = 0  # frames that could not be decoded
    frames: int = 0  # frames that could
    deaf: bool = False  # whether the sound was left out, if there was any


def video_features(
    source: str | Path,
    sampling: Sampling,
    visual: VisualEncoder,
    audio: AudioEncoder | None,
    progress: Progress | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> VideoFeatures:
    """Decodes and encodes one file; only the features' memory grows with its length.

    A snippet's audio window starts at its frame and lasts one snippet.

    audio: None skips the audio
    progress: called with the number of decoded frames, and with 0 during audio; may raise to stop
    dtype: of both features
    Raises MediaError.
    """
    clock = Clock()
    rows = bytearray()  # grows in place; concatenating a list of arrays would need twice the memory
    pending: list[torch.Tensor] = []
    starts: list[float] = []
    waits: list[float] = []

    def encode() -> None:
        if pending:
            images = torch.cat(pending)  # [n·crops, 3, S, S]
            rows.extend(encoded("visual", visual, images, len(images), dtype).tobytes())
            pending.clear()

    for frame in snippet_frames(source, sampling.every, sampling.fps, progress, clock):
        starts.append(frame.time)
        waits.append(frame.wait)
        pending.append(cut(frame.image, sampling.crops, sampling.geometry, visual.size))
        if len(pending) * sampling.crops >= BATCH:
            encode()
    encode()
    times = np.array(starts)
    seconds = snippet_seconds(times, sampling, clock.rate)
    seen = np.frombuffer(rows, dtype).reshape(len(times), sampling.crops, -1).transpose(1, 0, 2)  # [crops, n, D]
    rest = np.array(waits), clock.now + 1 / clock.rate, clock.damaged, clock.seen
    sound = None if audio is None else read_sound(source, clock, progress)
    if audio is None or sound is None:
        return VideoFeatures(seen, None, times, seconds, np.zeros(len(times), bool), *rest, deaf=audio is None)
    windows = sound.windows(times, seconds, progress)
    embedded = encoded("audio", audio, windows, len(times), dtype)
    return VideoFeatures(seen, embedded, times, seconds, windows.heard(), *rest)


def key_frames(
    source: str | Path, sampling: Sampling, snippets: Collection[int], progress: Progress | None = None
) -> dict[int, np.ndarray]:
    """Images of the given snippets of a video: snippet -> (H, W, 3) uint8. Raises MediaError.

    progress: as for `video_features`
    """
    images = {}
    for i, frame in enumerate(snippet_frames(source, sampling.every, sampling.fps, progress)):
        if i in snippets:
            images[i] = frame.image
        if len(images) == len(snippets):
            break
    return images


def snippet_seconds(times: np.ndarray, sampling: Sampling, rate: float) -> float:
    """Duration of a snippet: the median distance between snippets, which is robust to a few odd timestamps.

    rate: frames per second, which determines the duration of a single snippet
    """
    if sampling.fps is not None:
        return 1 / sampling.fps
    return float(np.median(np.diff(times))) if len(times) > 1 else sampling.every / rate
