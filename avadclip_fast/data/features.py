"""Feature files (`.npy`, one row per snippet), and pooling or chunking videos to a fixed length."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .. import ops
from ..ops import _dispatch
from .atomic import atomic_write
from .errors import DataError
from .npy import bytes_left, npy_bytes, read_header

_DTYPES = (np.float16, np.float32, np.float64)
MOTION_ROWS = 9  # odd


def load_features(path: str | Path, width: int | None = None) -> np.ndarray:
    """Reads the features of a video from a `.npy` file of float16, float32 or float64.

    width: the expected D, or None for any
    Returns (n, D) float32, n >= 1, finite, C-contiguous.
    Raises DataError if the file is missing, not `.npy`, truncated or empty, contains objects (never unpickled), NaN or
    infinity, or has another dtype, width or number of dimensions.
    """
    with _open(path, width) as (file, shape, fortran, dtype):
        stored = np.fromfile(file, dtype, math.prod(shape))
    with np.errstate(over="ignore"):  # float64 values beyond float32 become infinite and are reported below
        features = stored.astype(np.float32, copy=False).reshape(shape, order="F" if fortran else "C")
    finite = np.isfinite(features)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(1))
        raise DataError(
            f"{path}: row {bad[0]}, counted from 0, holds NaN or infinity ({len(bad)} of {len(features)} rows do); "
            "extract this video's features again"
        )
    return np.ascontiguousarray(features)


def snippet_count(path: str | Path, width: int | None = None) -> int:
    """Number of rows of a feature file, from its header. Raises DataError as `load_features`, but ignores values."""
    with _open(path, width) as (_, shape, _, _):
        return shape[0]


@contextmanager
def _open(path: str | Path, width: int | None) -> Iterator[tuple[IO[bytes], tuple[int, int], bool, np.dtype]]:
    """Opens a file, validates header and size, and yields it positioned at the data, with shape, order and dtype."""
    try:
        file = open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; relative paths start from the list's folder, or from --root") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        shape, fortran, dtype = read_header(file, path)
        if dtype.hasobject:
            raise DataError(f"{path}: a pickled object array, which is never loaded; save plain float32 rows instead")
        if dtype not in _DTYPES:
            raise DataError(f"{path}: dtype {dtype}; expected float16, float32 or float64")
        if len(shape) != 2:
            crops = "; save every crop as a file of its own, NAME__0.npy ..." if len(shape) == 3 else ""
            raise DataError(f"{path}: shape {shape}; expected two dimensions, snippets x width{crops}")
        if min(shape) < 1:
            raise DataError(f"{path}: empty, shape {shape}; extract this video again, or take it off the list")
        if width is not None and shape[1] != width:
            raise DataError(f"{path}: width {shape[1]}, expected {width}; were these features made by another encoder?")
        if bytes_left(file) < math.prod(shape) * dtype.itemsize:
            raise DataError(f"{path}: cut short: fewer bytes than its shape {shape} takes; copy or extract it again")
        yield file, shape, fortran, dtype


def with_motion(features: np.ndarray, start: int = 0, end: int | None = None) -> np.ndarray:
    """Appends motion to visual features, [x | m]; apply before `pool`, whose rows are too far apart in time.

        m_t = mean over MOTION_ROWS rows around t of median3(|x_t - x_{t-1}|)

    All operations are per dimension. The median of three rows suppresses cuts. Row 0 takes the difference of row 1, and
    edge rows are repeated.

    features: (n, D) float32 of a whole video
    start, end: range of rows to return, all by default
    Returns (end - start, 2 D) float32.
    """
    end = len(features) if end is None else end
    half = MOTION_ROWS // 2
    first = max(0, start - half - 2)  # the first row that affects the motion at start
    x = features[first : end + half + 1]
    change = np.zeros_like(x)
    if len(x) > 1:
        np.abs(np.diff(x, axis=0), out=change[1:])
        change[0] = change[1]
    before, after = (change[np.clip(np.arange(len(x)) + k, 0, len(x) - 1)] for k in (-1, 1))
    steady = np.maximum(np.minimum(before, change), np.minimum(np.maximum(before, change), after))
    around = np.pad(steady, ((half, half), (0, 0)), mode="edge")
    motion = np.lib.stride_tricks.sliding_window_view(around, MOTION_ROWS, axis=0).mean(-1)
    rows = slice(start - first, end - first)
    return np.concatenate([x[rows], motion[rows]], 1)


def pool(features: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """Fits a video to `length` rows for training: averages a longer video, zero-pads a shorter one.

    Row i of a longer video is the mean of rows b[i] to b[i+1], b = int(linspace(0, n, length + 1)); an empty range
    takes its first row (official code of arXiv 2504.04495).

    features: (n, D) float32
    Returns (length, D) float32 and the number of valid rows, min(n, length).
    """
    n = len(features)
    if n <= length:
        return _padded(features, length), n
    backend = "reference" if _dispatch.forced() == "cuda" else None  # that is for the GPU, this on the host
    rows, lengths = torch.from_numpy(features), torch.tensor([n], device="cpu")
    return ops.uniform_pool(rows, lengths, length, backend)[0].numpy(), length


def chunk(features: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a video into K = ceil(n / length) chunks for testing and zero-pads the last one.

    features: (n, D) float32
    Returns (K, length, D) float32 and the number of valid rows per chunk, (K,) int64, all >= 1.
    Raises ValueError on a length below one.
    """
    if length < 1:
        raise ValueError(f"a chunk has one snippet or more; got length={length}")
    n, width = features.shape
    count = -(-n // length)
    lengths = np.full(count, length, np.int64)
    lengths[-1] = n - (count - 1) * length
    return _padded(features, count * length).reshape(count, length, width), lengths


def _padded(features: np.ndarray, rows: int) -> np.ndarray:
    padded = np.zeros((rows, features.shape[1]), np.float32)
    padded[: len(features)] = features
    return padded


def write_features(path: str | Path, array: np.ndarray) -> None:
    """Writes non-empty (n, D) floating-point features to a `.npy` file, atomically. Raises DataError otherwise."""
    if array.ndim != 2 or array.dtype not in _DTYPES or not array.size:
        raise DataError(f"{path}: features must be non-empty (snippets, width) floats, got {array.dtype} {array.shape}")
    with atomic_write(path) as file:
        file.write(npy_bytes(array))
