"""The header of a `.npy` file, read without trusting it."""

import os
import tokenize
from pathlib import Path
from typing import IO

import numpy as np

from .errors import DataError

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_header(file: IO[bytes], path: str | Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype; leaves `file` at the data. Raises DataError naming `path`."""
    try:
        return _READERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise DataError(f"{path}: not a .npy file, or cut short; write it with numpy.save") from error


def bytes_left(file: IO[bytes]) -> int:
    """How many bytes follow the place where `file` stands."""
    return os.fstat(file.fileno()).st_size - file.tell()
