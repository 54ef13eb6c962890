"""Features of whole lists: a training set held in memory, test videos one by one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, LabelError
from .features import chunk, load_features, pool
from .labels import encode
from .lists import Row

Progress = Callable[[Iterable], Iterable]  # wraps what is iterated, as tqdm does


class Batch(NamedTuple):
    """B videos of T snippets; rows past `lengths` are zero."""

    visual: Tensor  # (B, T, D) float32
    audio: Tensor | None  # (B, T, D) float32
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B, C) float32, multi-hot

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))


@dataclass(frozen=True)
class FeatureSet:
    """A training set in memory, pooled to T snippets a row."""

    visual: Tensor  # (N, T, D)
    audio: Tensor | None  # (N, T, D)
    lengths: Tensor  # (N,) int64
    labels: Tensor  # (N, C) float32, multi-hot

    @classmethod
    def load(
        cls,
        rows: Sequence[Row],
        codes: dict[str, str],
        length: int,
        width: int = 512,
        audio: bool = True,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        workers: int = 4,
    ) -> "FeatureSet":
        """Reads and pools the features of `rows`.

        codes: code -> class name, the first being normal. length: T. audio: whether to read the sound.
        dtype: what they are kept in; float16 halves the memory, and loses nothing of files that are float16 and no
        longer than T. progress: wraps the iteration over rows. workers: threads that read.
        Raises DataError (LabelError for a label) of the first bad row; labels are looked at before any file is read.
        """
        if not rows:
            raise DataError("no videos to load: the list, or this part of it, is empty")
        labels = np.stack([_encode(row, codes) for row in rows])
        visual = torch.zeros(len(rows), length, width, dtype=dtype)
        heard = torch.zeros_like(visual) if audio else None
        lengths = torch.zeros(len(rows), dtype=torch.int64)

        def fill(i: int) -> None:
            streams = load_row(rows[i], width, audio)
            for kept, features in zip((visual, heard), streams, strict=True):
                if kept is not None:
                    pooled, lengths[i] = pool(features, length)
                    kept[i] = torch.from_numpy(pooled)

        with ThreadPoolExecutor(workers) as threads:
            done = threads.map(fill, range(len(rows)))
            for _ in progress(rows) if progress else rows:
                next(done)
        return cls(visual, heard, lengths, torch.from_numpy(labels))

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, index: Tensor) -> Batch:
        """The rows of `index` (B,) int64, in float32."""
        index = index.to(self.lengths.device)
        audio = None if self.audio is None else self.audio[index].float()
        return Batch(self.visual[index].float(), audio, self.lengths[index], self.labels[index])

    def to(self, device: str | torch.device) -> "FeatureSet":
        """The whole set on a device, where batches are then gathered."""
        audio = None if self.audio is None else self.audio.to(device)
        return FeatureSet(self.visual.to(device), audio, self.lengths.to(device), self.labels.to(device))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), (count,) int64, of the three arguments alone: a resumed run finds it again."""
    return torch.from_numpy(np.random.default_rng([seed % 2**64, epoch]).permutation(count))


def batches(order: Tensor, size: int, drop_last: bool = False) -> Iterator[Tensor]:
    """Cuts an order into index tensors of `size`; the last may be shorter, or is dropped."""
    for index in order.split(size):
        if len(index) == size or not drop_last:
            yield index


class TestVideo(NamedTuple):
    """A video of n snippets in K chunks of T, each to be scored on its own."""

    name: str  # of the visual file, without its suffix
    label: str
    visual: np.ndarray  # (K, T, D) float32
    audio: np.ndarray | None  # (K, T, D) float32
    lengths: np.ndarray  # (K,) int64, valid rows of each chunk
    snippets: int


def test_videos(rows: Iterable[Row], length: int, width: int = 512, audio: bool = True) -> Iterator[TestVideo]:
    """The videos of a test list in order, each read when it is asked for. Raises DataError of a bad one."""
    for row in rows:
        visual, heard = load_row(row, width, audio)
        chunks, lengths = chunk(visual, length)
        yield TestVideo(
            row.visual.stem, row.label, chunks, None if heard is None else chunk(heard, length)[0], lengths, len(visual)
        )


# By their names, pytest would collect both where a test module imports them.
test_videos.__test__ = TestVideo.__test__ = False


def load_row(row: Row, width: int, audio: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Both streams of a row, (n, D) float32 each. Raises DataError, also where their lengths differ."""
    if not audio:
        return load_features(row.visual, width), None
    if row.audio is None:
        raise DataError(f"{row.visual} (list line {row.line}): the list names no sound for it; add it as audio_path")
    visual, heard = load_features(row.visual, width), load_features(row.audio, width)
    if len(visual) != len(heard):
        raise DataError(unequal(row, len(visual), len(heard)))
    return visual, heard


def unequal(row: Row, visual: int, audio: int) -> str:
    """Says that the two streams of a row have unequal lengths, and what to do."""
    return (
        f"{row.visual} has {visual} snippets, {row.audio} has {audio} (list line {row.line}); "
        "extract both with the same snippet length, and check that they are of one video"
    )


def _encode(row: Row, codes: dict[str, str]) -> np.ndarray:
    try:
        return encode(row.label, codes)
    except LabelError as error:
        raise LabelError(f"{row.visual} (list line {row.line}): {error}") from error
