"""Reading `.npy` headers from untrusted files, and the bytes of files to write."""

import io
import os
import threading
import tokenize
from pathlib import Path
from typing import IO

import numpy as np

from .errors import DataError

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# NumPy parses a header as Python, and CPython 3.11's parser counts its depth for all threads at once: two that parse at
# the same time may fail with a SystemError.
_parsing = threading.RLock()


def read_header(file: IO[bytes], path: str | Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads shape, Fortran order and dtype, leaving `file` at the data. Raises DataError with `path`."""
    try:
        reader = _READERS[np.lib.format.read_magic(file)]
        with _parsing:
            shape, fortran, dtype = reader(file)
    except (
        ValueError, KeyError, IndexError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise DataError(f"{path}: not a .npy file, or cut short; write it with numpy.save") from error
    return tuple(map(int, shape)), fortran, dtype  # NumPy takes True for a size


def bytes_left(file: IO[bytes]) -> int:
    """Number of bytes after the current position of `file`."""
    return os.fstat(file.fileno()).st_size - file.tell()


def npy_bytes(array: np.ndarray) -> memoryview:
    """Returns the content of a `.npy` file, since np.save to a full disk raises an OSError without number or file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getbuffer()
