"""Features of whole lists: training sets in memory or in a packed file, and test videos one at a time."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError, LabelError
from .features import chunk, load_features, pool, with_motion
from .labels import encode
from .lists import Row, check_rows, unlike, video_of
from .packed import Field, checksum, open_packed, write_packed

READERS = 4  # threads that read feature files
PACKED_DTYPES = ("float16", "float32")

Rows = Tensor | np.ndarray | Sequence[int]  # numbers of rows, as a tensor int64
Progress = Callable[[Iterable], Iterable]  # wraps an iterable, like tqdm


class Batch(NamedTuple):
    """B videos of T snippets; rows t >= lengths[b] are zero."""

    visual: Tensor  # (B, T, D) float32, or (B, T, 2 D) with motion
    audio: Tensor | None  # (B, T, D) float32
    lengths: Tensor  # (B,) int64
    labels: Tensor  # (B, C) float32, multi-hot

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]

    def float(self) -> "Batch":
        """Casts the streams to float32."""
        return self._replace(visual=self.visual.float(), audio=None if self.audio is None else self.audio.float())

    def pin_memory(self) -> "Batch":
        """Copies the batch to pinned memory, for asynchronous transfers to a GPU."""
        # Sliced tensors are not contiguous, and copying them would synchronise.
        return Batch(*(None if x is None else x.contiguous().pin_memory() for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class FeatureSet:
    """A training set pooled to T snippets per row, in memory or memory-mapped from a packed file.

    Raises ValueError if its tensors differ in N.
    """

    visual: Tensor  # (N, T, D), or (N, T, 2 D) with motion
    audio: Tensor | None  # (N, T, D)
    lengths: Tensor  # (N,) int64
    labels: Tensor  # (N, C) float32, multi-hot
    index: Tensor | None = None  # (M,) int64, the rows in the set; all by default
    mapped: bool = False  # whether the streams are memory-mapped
    checksum: str | None = None  # of the packed file they come from
    video: Tensor | None = None  # (N,) int64, the same for the crops of a video; by default no two rows are of one

    def __post_init__(self) -> None:
        for name in ("audio", "lengths", "labels", "video"):
            x = getattr(self, name)
            if x is not None and len(x) != len(self.visual):
                raise ValueError(f"a FeatureSet has as many {name} as visual rows, {len(self.visual)}; got {len(x)}")

    @classmethod
    def load(
        cls,
        rows: Sequence[Row],
        codes: dict[str, str],
        length: int,
        width: int = 512,
        audio: bool = True,
        motion: bool = False,
        progress: Progress | None = None,
    ) -> "FeatureSet":
        """Reads and pools the features of `rows`.

        codes: code -> class name, normal first
        length: T; width: D
        audio: whether to read audio features
        motion: whether to append motion to the visual features, (N, T, 2 D), see `with_motion`
        progress: wraps the iteration over rows
        Raises DataError for the first invalid row, LabelError for a label; checks labels before reading any file.
        """
        check_rows(rows)
        if not rows:
            raise DataError("no videos to load: the list, or this part of it, is empty")
        labels = _encoded(rows, codes)
        visual = torch.zeros(len(rows), length, (1 + motion) * width, device="cpu")  # whatever the default device
        heard = torch.zeros(len(rows), length, width, device="cpu") if audio else None
        lengths = torch.zeros(len(rows), dtype=torch.int64, device="cpu")

        def fill(i: int) -> None:
            seen, sound, lengths[i] = _pooled(rows[i], length, width, audio, motion)
            visual[i] = torch.from_numpy(seen)
            if heard is not None:
                heard[i] = torch.from_numpy(sound)

        with ThreadPoolExecutor(READERS) as threads:
            done = threads.map(fill, range(len(rows)))
            for _ in progress(rows) if progress else rows:
                next(done)
        return cls(visual, heard, lengths, torch.from_numpy(labels), video=_numbered(rows))

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
        """Memory-maps a set written by `pack`.

        Arguments as for `load`.
        Returns (FeatureSet, list of Row).
        Raises DataError if the file is not a packed set, or was packed with another length, width or motion setting, or
        without the audio requested; LabelError for a label.
        """
        rows, labels = packed_rows(path, codes)
        tensors, _ = open_packed(path)
        _check_wanted(path, tensors, length, width, audio, motion)
        heard = tensors["audio"] if audio else None
        streams = tensors["visual"], heard, tensors["lengths"]
        video = _numbered(rows)
        return cls(*streams, torch.from_numpy(labels), mapped=True, checksum=checksum(path), video=video), rows

    def __len__(self) -> int:
        return len(self.lengths if self.index is None else self.index)

    def subset(self, index: Rows) -> "FeatureSet":
        """The rows of `index` (M,), without copying. Raises ValueError on a mask and on anything but a vector of whole
        numbers, like `batch` and `stored`.
        """
        index = self._numbers(index)
        return replace(self, index=index if self.index is None else self.index[index])

    def batch(self, index: Rows) -> Batch:
        """The rows of `index` (B,), in float32."""
        return self.stored(index).float()

    def stored(self, index: Rows) -> Batch:
        """The rows of `index` (B,), in the stored dtype."""
        index = self._numbers(index)
        if self.index is not None:
            index = self.index[index]
        audio = None if self.audio is None else self.audio[index]
        return Batch(self.visual[index], audio, self.lengths[index], self.labels[index])

    def _numbers(self, index: Rows) -> Tensor:
        if not isinstance(index, Tensor):
            index = torch.as_tensor(index, device="cpu")  # whatever the default device
            index = index if index.numel() else index.long()  # an empty list has torch's float32
        if index.dtype == torch.bool:
            raise ValueError("rows are chosen by their numbers, not by a mask: give mask.nonzero()[:, 0]")
        if index.ndim != 1 or index.is_floating_point() or index.is_complex():
            raise ValueError(f"rows are chosen by a vector of whole numbers, got {index.dtype} {list(index.shape)}")
        return index.to(self.lengths.device, torch.int64, non_blocking=True)  # torch takes uint8 for a mask

    def valid(self) -> Tensor:
        """Number of valid snippets per sample, (M,) int64."""
        return self.lengths if self.index is None else self.lengths[self.index]

    def videos(self) -> int:
        """Number of videos; all crops of a video count once."""
        if self.video is None:
            return len(self)
        return len((self.video if self.index is None else self.video[self.index]).unique())

    @property
    def stream_bytes(self) -> int:
        """Bytes of the underlying streams, including rows not in the set."""
        return sum(x.nbytes for x in (self.visual, self.audio) if x is not None)

    def batches(self) -> Iterator[Batch]:
        """The whole set in order, 256 rows at a time."""
        return (self.batch(index) for index in torch.arange(len(self), device="cpu").split(256))

    def fingerprint(self) -> str:
        """SHA-256 of the exact contents in order; uses the checksum of a packed file instead of its bytes."""
        digest = hashlib.sha256()
        if self.checksum is not None:
            index = torch.arange(len(self), device="cpu") if self.index is None else self.index.cpu()
            for held in (index, self.labels.cpu(), torch.tensor(self.audio is not None, device="cpu")):
                digest.update(held.numpy().tobytes())
            return hashlib.sha256(self.checksum.encode() + digest.digest()).hexdigest()
        for batch in self.batches():
            for x in batch:
                if x is not None:
                    digest.update(x.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> "FeatureSet":
        """Copies the whole set to a device, where batches are then gathered."""
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors, mapped=False)


def pack(
    path: str | Path,
    rows: Sequence[Row],
    length: int,
    width: int = 512,
    audio: bool = True,
    motion: bool = False,
    dtype: str = "float16",
    progress: Progress | None = None,
) -> None:
    """Pools the features of `rows` into one file for `FeatureSet.open`, resuming a killed call.

    Labels are stored as text and encoded on opening, when the classes are known.

    Arguments as for `FeatureSet.load`; dtype is "float16" or "float32"
    Raises DataError.
    """
    check_rows(rows)
    if not rows:
        raise DataError("no videos to pack: the list is empty")
    if dtype not in PACKED_DTYPES:
        raise DataError(f"packed features are {' or '.join(PACKED_DTYPES)}; got dtype={dtype!r}")
    _check_crops(rows)  # before hours of packing; `packed_rows` would refuse the file
    limit = float(np.finfo(dtype).max)
    fields = {"visual": Field(dtype, (length, (1 + motion) * width))}
    fields |= {"audio": Field(dtype, (length, width))} if audio else {}
    fields["lengths"] = Field("int64", ())
    # absolute, so that a video is recognised from any working directory
    paths = [(os.path.abspath(row.visual), os.path.abspath(row.audio) if row.audio else "") for row in rows]
    info = {"rows": [[*both, row.label] for both, row in zip(paths, rows, strict=True)]}
    with ThreadPoolExecutor(READERS) as threads:

        def fill(start: int, stop: int) -> dict[str, np.ndarray]:
            some = threads.map(lambda row: _pooled(row, length, width, audio, motion, limit), rows[start:stop])
            visual, heard, lengths = zip(*some, strict=True)
            arrays = {"visual": np.stack(visual), "lengths": np.array(lengths)}
            return arrays | ({"audio": np.stack(heard)} if audio else {})

        write_packed(path, fields, len(rows), fill, info, progress=progress)


def _pooled(
    row: Row, length: int, width: int, audio: bool, motion: bool, limit: float = math.inf
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Both streams of a row pooled to `length`, and its valid snippets. limit: largest value that can be stored."""
    visual, heard = load_row(row, width, audio, motion)
    for file, x in ((row.visual, visual), (row.audio, heard)):
        if x is None or limit >= np.finfo(x.dtype).max:
            continue
        if (largest := np.abs(x).max(initial=0)) > limit:
            raise DataError(f"{file} holds {largest:g}, and float16 nothing beyond {limit:g}; keep float32 (--float32)")
    seen, valid = pool(visual, length)
    return seen, None if heard is None else pool(heard, length)[0], valid


def _numbered(rows: Sequence[Row]) -> Tensor:
    """Returns the number of each row's video, (N,) int64."""
    numbers: dict[Path, int] = {}
    return torch.tensor([numbers.setdefault(video_of(row), len(numbers)) for row in rows], device="cpu")


def packed_rows(path: str | Path, codes: dict[str, str]) -> tuple[list[Row], np.ndarray]:
    """The list rows that a packed set was made from, and their labels (N, C). Raises DataError, LabelError."""
    tensors, info = open_packed(path)
    if not _is_packed_list(tensors, info):
        raise DataError(f"{path}: not a packed list; make one with `avadclip-fast pack`, or give the list itself")
    rows = [Row(Path(v), Path(a) if a else None, label, i + 2) for i, (v, a, label) in enumerate(info["rows"])]
    return rows, _encoded(rows, codes)


def _check_wanted(
    path: str | Path, tensors: dict[str, Tensor], length: int, width: int, audio: bool, motion: bool
) -> None:
    """Raises DataError if a packed list is damaged, or was packed otherwise than is wanted."""
    rows, found = tensors["visual"].shape[1:]
    wanted = (1 + motion) * width
    if found == (2 - motion) * width:
        without, again = ("without", "with") if motion else ("with", "without")
        raise DataError(f"{path}: packed {without} motion; pack it again {again} --motion")
    if found != wanted:
        differ = f"width {found}, expected {wanted}"
        raise DataError(f"{path}: packed features have {differ}; were they made by another encoder?")
    if rows != length:
        raise DataError(
            f"{path}: packed as {rows} x {found}, {length} x {wanted} is wanted; "
            f"train with --length {rows}, or pack it again with --length {length}"
        )
    if audio and "audio" not in tensors:
        raise DataError(f"{path}: packed without sound, which is required; pack it again with --audio")
    if not ((tensors["lengths"] >= 1) & (tensors["lengths"] <= length)).all():
        raise DataError(f"{path}: damaged, for a video has not 1 to {length} snippets; pack it again")


def _is_packed_list(tensors: dict[str, Tensor], info: object) -> bool:
    """Whether the content of a packed file is as `pack` writes it."""
    rows = info.get("rows") if isinstance(info, dict) else None
    if not isinstance(rows, list) or not rows or not {"visual", "lengths"} <= tensors.keys():
        return False
    visual, lengths = tensors["visual"], tensors["lengths"]
    streams = [visual, tensors.get("audio", visual)]
    named = all(isinstance(row, list) and [*map(type, row)] == [str] * 3 and Path(row[0]).name for row in rows)
    alike = all(x.ndim == 3 and x.shape[:2] == (len(rows), visual.shape[1]) and x.is_floating_point() for x in streams)
    counted = lengths.shape == (len(rows),) and lengths.dtype == torch.int64
    return named and alike and counted


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), (count,) int64, fixed by the arguments so that a resumed run repeats it."""
    return torch.from_numpy(np.random.default_rng([int(seed) % 2**64, epoch]).permutation(count))


class TestVideo(NamedTuple):
    """A video of n snippets in K chunks of T, each scored independently."""

    name: str  # of the visual file, without suffix
    visual: np.ndarray  # (K, T, D) float32; (K, T, 2 D) with motion
    audio: np.ndarray | None  # (K, T, D) float32
    lengths: np.ndarray  # (K,) int64, valid rows of each chunk
    snippets: int


def test_videos(
    rows: Iterable[Row], length: int, width: int = 512, audio: bool = True, motion: bool = False
) -> Iterator[TestVideo]:
    """Yields the videos of a test list in order, reading each on demand. Raises DataError for an invalid one."""
    check_rows(rows)
    for row in rows:
        visual, heard = load_row(row, width, audio, motion)
        chunks, lengths = chunk(visual, length)
        yield TestVideo(
            row.visual.stem, chunks, None if heard is None else chunk(heard, length)[0], lengths, len(visual)
        )


# Because of their names, pytest would collect both in any test module that imports them.
test_videos.__test__ = TestVideo.__test__ = False  # type: ignore[attr-defined]


def load_row(row: Row, width: int, audio: bool, motion: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Both streams of a row, (n, D) float32 each, or (n, 2 D) for visual features with motion.

    Raises DataError, also if their lengths differ.
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
    """Error message for a row whose streams differ in length."""
    return (
        f"{row.visual} has {visual} snippets, {row.audio} has {audio} (list line {row.line}); "
        "extract both with the same snippet length, and check that they are of one video"
    )


def _encoded(rows: Sequence[Row], codes: dict[str, str]) -> np.ndarray:
    """Returns the labels of rows, (N, C). Raises LabelError."""
    labels = []
    for row in rows:
        try:
            labels.append(encode(row.label, codes))
        except LabelError as error:
            raise LabelError(f"{row.visual} (list line {row.line}): {error}") from error
    _check_crops(rows)
    return np.stack(labels)


def _check_crops(rows: Sequence[Row]) -> None:
    """Raises LabelError if crops of one video are labelled differently."""
    for row, problem in unlike(rows):
        raise LabelError(f"{row.visual} (list line {row.line}): {problem}")
