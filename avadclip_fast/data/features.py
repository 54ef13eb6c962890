"""Feature files (`.npy`, one row a snippet), and the two ways of fitting a video to a fixed length."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .. import ops
from .atomic import atomic_write
from .errors import DataError
from .npy import bytes_left, read_header

_DTYPES = (np.float16, np.float32, np.float64)
MOTION_ROWS = 9  # odd


def load_features(path: str | Path, width: int | None = None) -> np.ndarray:
    """Features of a video from a `.npy` file of float16, float32 or float64.

    width: the D that is expected, if any.
    Returns (n, D) float32, n >= 1, finite, C-contiguous.
    Raises DataError: no such file, not `.npy`, cut short, an object array (never unpickled), another dtype or number
    of dimensions, no rows, another width, NaN or infinity.
    """
    with _open(path, width) as (file, shape, fortran, dtype):
        stored = np.fromfile(file, dtype, math.prod(shape))
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is reported as such
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
    """n of a feature file, from its header alone. Raises DataError as `load_features`, values aside."""
    with _open(path, width) as (_, shape, _, _):
        return shape[0]


@contextmanager
def _open(path: str | Path, width: int | None) -> Iterator[tuple[IO[bytes], tuple[int, int], bool, np.dtype]]:
    """The file standing at its data, and a header that is known to be good and backed by enough bytes."""
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
            raise DataError(f"{path}: shape {shape}; expected two dimensions, snippets x width")
        if min(shape) < 1:
            raise DataError(f"{path}: empty, shape {shape}; extract this video again, or take it off the list")
        if width is not None and shape[1] != width:
            raise DataError(f"{path}: width {shape[1]}, expected {width}; were these features made by another encoder?")
        if bytes_left(file) < math.prod(shape) * dtype.itemsize:
            raise DataError(f"{path}: cut short: fewer bytes than its shape {shape} takes; copy or extract it again")
        yield file, shape, fortran, dtype


def with_motion(features: np.ndarray, start: int = 0, end: int | None = None) -> np.ndarray:
    """Sight, and beside it how it moves: [x | m], to be taken before `pool`, whose rows are too far apart.

    The motion of row t is m_t = |x_t - x_{t-1}| in every dimension (row 0 has that of row 1), first the median of three
    rows, since a cut is no motion, then the mean of the MOTION_ROWS rows about t; the ends are repeated.

    features: (n, D) float32 of a whole video; start, end: the rows that are wanted, all of them by default.
    Returns (end - start, 2 D) float32.
    """
    end = len(features) if end is None else end
    half = MOTION_ROWS // 2
    first = max(0, start - half - 2)  # as far as a row's motion reaches
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
    """Fits a video to `length` rows for training: averages if it is longer, pads with zeros if it is shorter.

    Row i of a longer video is the mean of rows b[i] to b[i+1], b = int(linspace(0, n, length + 1)); an empty range
    takes its first row.

    features: (n, D) float32
    Returns (length, D) float32 and the number of valid rows, min(n, length).
    """
    n = len(features)
    if n <= length:
        return _padded(features, length), n
    return ops.uniform_pool(torch.from_numpy(features), torch.tensor([n]), length)[0].numpy(), length


def chunk(features: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a video into K = ceil(n / length) chunks for testing, the last one padded with zeros.

    features: (n, D) float32
    Returns (K, length, D) float32 and the valid rows of each chunk, (K,) int64, all >= 1.
    """
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
    """Writes (n, D) float16 or float32 features to a `.npy` file, atomically. Raises DataError on other arrays."""
    if array.ndim != 2 or array.dtype not in _DTYPES or not array.size:
        raise DataError(f"{path}: features must be non-empty (snippets, width) floats, got {array.dtype} {array.shape}")
    with atomic_write(path) as file:
        np.save(file, array, allow_pickle=False)
