"""Features of whole lists: a training set in memory or in one packed file, test videos one by one."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, LabelError
from .features import chunk, load_features, pool, with_motion
from .labels import encode
from .lists import Row
from .packed import Field, checksum, open_packed, write_packed

Progress = Callable[[Iterable], Iterable]  # wraps what is iterated, as tqdm does


class Batch(NamedTuple):
    """B videos of T snippets; rows past `lengths` are zero."""

    visual: Tensor  # (B, T, D) float32, or (B, T, 2 D) with motion
    audio: Tensor | None  # (B, T, D) float32
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B, C) float32, multi-hot

    def to(self, device: str | torch.device) -> "Batch":
        audio = None if self.audio is None else self.audio.to(device, non_blocking=True)
        visual, lengths, labels = (x.to(device, non_blocking=True) for x in (self.visual, self.lengths, self.labels))
        return Batch(visual, audio, lengths, labels)

    def float(self) -> "Batch":
        """With streams in float32."""
        return self._replace(visual=self.visual.float(), audio=None if self.audio is None else self.audio.float())

    def pin_memory(self) -> "Batch":
        """In memory that a GPU copies from while the host goes on."""
        # What is cut short is no one piece of memory, and a copy of it would wait.
        return Batch(*(None if x is None else x.contiguous().pin_memory() for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class FeatureSet:
    """A training set pooled to T snippets a row: in memory, or mapped from a packed file."""

    visual: Tensor  # (N, T, D), or (N, T, 2 D) with motion
    audio: Tensor | None  # (N, T, D)
    lengths: Tensor  # (N,) int64
    labels: Tensor  # (N, C) float32, multi-hot
    index: Tensor | None = None  # (M,) int64: the rows that the set consists of; all of them by default
    mapped: bool = False  # whether the streams lie in a file, of which a step reads its rows
    checksum: str | None = None  # of the packed file that they are from

    @classmethod
    def load(
        cls,
        rows: Sequence[Row],
        codes: dict[str, str],
        length: int,
        width: int = 512,
        audio: bool = True,
        motion: bool = False,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        workers: int = 4,
    ) -> "FeatureSet":
        """Reads and pools the features of `rows`.

        codes: code -> class name, the first being normal. length: T. audio: whether to read the sound.
        motion: whether sight is to have its motion beside it, (N, T, 2 D), as `with_motion` gives it.
        dtype: what they are kept in; float16 halves the memory, and loses nothing of files that are float16 and no
        longer than T. progress: wraps the iteration over rows. workers: threads that read.
        Raises DataError (LabelError for a label) of the first bad row; labels are looked at before any file is read.
        """
        if not rows:
            raise DataError("no videos to load: the list, or this part of it, is empty")
        labels = np.stack([_encode(row, codes) for row in rows])
        visual = torch.zeros(len(rows), length, (1 + motion) * width, dtype=dtype)
        heard = torch.zeros(len(rows), length, width, dtype=dtype) if audio else None
        lengths = torch.zeros(len(rows), dtype=torch.int64)

        def fill(i: int) -> None:
            seen, sound, lengths[i] = _pooled(rows[i], length, width, audio, motion, torch.finfo(dtype).max)
            visual[i] = torch.from_numpy(seen)
            if heard is not None:
                heard[i] = torch.from_numpy(sound)

        with ThreadPoolExecutor(workers) as threads:
            done = threads.map(fill, range(len(rows)))
            for _ in progress(rows) if progress else rows:
                next(done)
        return cls(visual, heard, lengths, torch.from_numpy(labels))

    @classmethod
    def open(
        cls,
        path: str | Path,
        codes: dict[str, str],
        length: int,
        width: int = 512,
        audio: bool = True,
        motion: bool = False,
    ) -> tuple["FeatureSet", list[Row]]:
        """A set that `pack` has written, mapped from its file, and the rows of its list.

        Arguments as for `load`. Returns (FeatureSet, list of Row).
        Raises DataError: not such a file, or one packed with another length or width, without sound or motion where
        they are wanted; LabelError for a label.
        """
        tensors, info = open_packed(path)
        found = list(tensors["visual"].shape[1:])
        if found != [length, (1 + motion) * width]:
            if found == [length, (2 - motion) * width]:
                without, again = ("without", "with") if motion else ("with", "without")
                raise DataError(f"{path}: packed {without} motion; pack it again {again} --motion")
            shape = " x ".join(map(str, found))
            raise DataError(
                f"{path}: packed as {shape}, {length} x {(1 + motion) * width} is wanted; pack it again with --length"
            )
        if audio and "audio" not in tensors:
            raise DataError(f"{path}: packed without sound, which is wanted; pack it again with --audio")
        rows = [Row(Path(v), Path(a) if a else None, label, i + 2) for i, (v, a, label) in enumerate(info["rows"])]
        labels = torch.from_numpy(np.stack([_encode(row, codes) for row in rows]))
        heard = tensors["audio"] if audio else None
        streams = tensors["visual"], heard, tensors["lengths"]
        return cls(*streams, labels, mapped=True, checksum=checksum(path)), rows

    def __len__(self) -> int:
        return len(self.lengths if self.index is None else self.index)

    def subset(self, index: Tensor) -> "FeatureSet":
        """The rows of `index` (M,) int64, without a copy."""
        return replace(self, index=index if self.index is None else self.index[index])

    def batch(self, index: Tensor) -> Batch:
        """The rows of `index` (B,) int64, in float32."""
        return self.stored(index).float()

    def stored(self, index: Tensor) -> Batch:
        """The rows of `index` (B,) int64, in the dtype that the set is kept in."""
        index = index.to(self.lengths.device, non_blocking=True)
        if self.index is not None:
            index = self.index[index]
        audio = None if self.audio is None else self.audio[index]
        return Batch(self.visual[index], audio, self.lengths[index], self.labels[index])

    def valid(self) -> Tensor:
        """The valid snippets of each sample, (M,) int64."""
        return self.lengths if self.index is None else self.lengths[self.index]

    @property
    def stream_bytes(self) -> int:
        """Bytes of the streams that the set draws on, all rows of them."""
        return sum(x.nbytes for x in (self.visual, self.audio) if x is not None)

    def batches(self, size: int = 256) -> Iterator[Batch]:
        """The whole set in order, `size` rows at a time."""
        return (self.batch(index) for index in torch.arange(len(self)).split(size))

    def fingerprint(self) -> str:
        """Of what the set holds, in order and to the bit; of a packed file by its checksum."""
        digest = hashlib.sha256()
        if self.checksum is not None:
            index = torch.arange(len(self)) if self.index is None else self.index.cpu()
            for held in (index, self.labels.cpu(), torch.tensor(self.audio is not None)):
                digest.update(held.numpy().tobytes())
            return hashlib.sha256(self.checksum.encode() + digest.digest()).hexdigest()
        for batch in self.batches():
            for x in batch:
                if x is not None:
                    digest.update(x.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> "FeatureSet":
        """The whole set on a device, where batches are then gathered."""
        audio, index = (None if x is None else x.to(device) for x in (self.audio, self.index))
        visual, lengths, labels = (x.to(device) for x in (self.visual, self.lengths, self.labels))
        return FeatureSet(visual, audio, lengths, labels, index, checksum=self.checksum)


def pack(
    path: str | Path,
    rows: Sequence[Row],
    length: int,
    width: int = 512,
    audio: bool = True,
    motion: bool = False,
    dtype: str = "float16",
    progress: Progress | None = None,
    workers: int = 4,
) -> None:
    """Pools the features of `rows` once, into one file that `FeatureSet.open` maps; goes on where a killed call was.

    Labels are kept as they are written, and become columns when classes are known. Arguments as for `FeatureSet.load`;
    dtype "float16" or "float32". Raises DataError.
    """
    if not rows:
        raise DataError("no videos to pack: the list is empty")
    limit = float(np.finfo(dtype).max)
    fields = {"visual": Field(dtype, (length, (1 + motion) * width))}
    fields |= {"audio": Field(dtype, (length, width))} if audio else {}
    fields["lengths"] = Field("int64", ())
    info = {"rows": [[str(row.visual), str(row.audio or ""), row.label] for row in rows]}
    with ThreadPoolExecutor(workers) as threads:

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            some = threads.map(lambda row: _pooled(row, length, width, audio, motion, limit), rows[start:stop])
            visual, heard, lengths = zip(*some, strict=True)
            arrays = {"visual": np.stack(visual), "lengths": np.array(lengths)}
            return arrays | ({"audio": np.stack(heard)} if audio else {})

        write_packed(path, fields, len(rows), fill, info, progress=progress)


def _pooled(
    row: Row, length: int, width: int, audio: bool, motion: bool, limit: float
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Both streams of a row at T = length, and its valid snippets. limit: the largest number that can be kept."""
    visual, heard = load_row(row, width, audio, motion)
    for file, x in ((row.visual, visual), (row.audio, heard)):
        if x is None or limit >= np.finfo(x.dtype).max:
            continue
        if (largest := np.abs(x).max(initial=0)) > limit:
            raise DataError(f"{file} holds {largest:g}, and float16 nothing beyond {limit:g}; keep float32 (--float32)")
    seen, valid = pool(visual, length)
    return seen, None if heard is None else pool(heard, length)[0], valid


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), (count,) int64, of the three arguments alone: a resumed run finds it again."""
    return torch.from_numpy(np.random.default_rng([seed % 2**64, epoch]).permutation(count))


class TestVideo(NamedTuple):
    """A video of n snippets in K chunks of T, each to be scored on its own."""

    name: str  # of the visual file, without its suffix
    visual: np.ndarray  # (K, T, D) float32; (K, T, 2 D) with motion
    audio: np.ndarray | None  # (K, T, D) float32
    lengths: np.ndarray  # (K,) int64, valid rows of each chunk
    snippets: int


def test_videos(
    rows: Iterable[Row], length: int, width: int = 512, audio: bool = True, motion: bool = False
) -> Iterator[TestVideo]:
    """The videos of a test list in order, each read when it is asked for. Raises DataError of a bad one."""
    for row in rows:
        visual, heard = load_row(row, width, audio, motion)
        chunks, lengths = chunk(visual, length)
        yield TestVideo(
            row.visual.stem, chunks, None if heard is None else chunk(heard, length)[0], lengths, len(visual)
        )


# By their names, pytest would collect both where a test module imports them.
test_videos.__test__ = TestVideo.__test__ = False  # type: ignore[attr-defined]


def load_row(row: Row, width: int, audio: bool, motion: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Both streams of a row, (n, D) float32 each; sight with its motion (n, 2 D).

    Raises DataError, also where their lengths differ.
    """
    seen = load_features(row.visual, width)
    seen = with_motion(seen) if motion else seen
    if not audio:
        return seen, None
    if row.audio is None:
        raise DataError(f"{row.visual} (list line {row.line}): the list names no sound for it; add it as audio_path")
    heard = load_features(row.audio, width)
    if len(seen) != len(heard):
        raise DataError(unequal(row, len(seen), len(heard)))
    return seen, heard


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
