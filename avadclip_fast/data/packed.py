"""One large file of tensors that share their first dimension: written row by row, resumed after a kill, mapped to read.

The format is safetensors. Its metadata holds a JSON `info` and, once the file is whole, the SHA-256 of all bytes after
the header. Until then the file is called NAME.part, with a journal of the rows that are in it beside it.
"""

import fcntl
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import atomic_write
from .errors import DataError

PACKED = ".safetensors"  # how the name of such a file ends
_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64"}
_PLAIN = "0" * 64  # stands in the header for the checksum, until that is known
_READ = 1 << 24  # bytes at a time


class Field(NamedTuple):
    """A tensor of the file: its dtype, and the shape of one of its rows."""

    dtype: str  # "float32", "float16" or "int64"
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def write_packed(
    path: str | Path,
    fields: dict[str, Field],
    rows: int,
    fill: Callable[[int, int], dict[str, np.ndarray]],
    info: dict,
    block: int = 64,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> None:
    """Writes a file of `rows` rows; what an earlier call with the same arguments had written is kept.

    fill: (start, stop) -> name -> array (stop - start, *shape), asked for `block` rows at a time, in order.
    info: anything JSON can hold; a file begun with other fields, rows or info is begun anew.
    Raises DataError where the disk is full or closed to us, or where another process writes the same file.
    """
    path = Path(path)
    part, journal = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    header = _header(fields, rows, info, _PLAIN)
    size = len(header) + rows * sum(field.row_bytes for field in fields.values())
    begun = hashlib.sha256(header).hexdigest()
    try:
        with open(part, "r+b" if part.exists() else "x+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{path}: another process is writing it; wait for that one, or end it") from error
            done = _done(journal, begun) if os.fstat(file.fileno()).st_size == size else 0
            if done == 0:
                file.truncate(0)
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now, not after hours
                os.pwrite(file.fileno(), header, 0)
            starts = range(done, rows, block)
            for start in progress(starts) if progress else starts:
                stop = min(start + block, rows)
                _write_rows(file.fileno(), len(header), fields, rows, start, stop, fill(start, stop))
                os.fdatasync(file.fileno())
                with atomic_write(journal, "w") as note:
                    json.dump({"begun": begun, "rows": stop}, note)
            os.pwrite(file.fileno(), _header(fields, rows, info, _digest(file, len(header))), 0)
            os.fsync(file.fileno())
            journal.unlink(missing_ok=True)  # before it could tell of a file that is no longer called so
            os.replace(part, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}; what is there stays, and is gone on with"
        ) from error


def open_packed(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a packed file, mapped rather than read, and its info. Raises DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})["info"])
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as packed features: {error}") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: a safetensors file, but not of packed features: it has no info") from error


def check_packed(path: str | Path) -> None:
    """Reads the whole file and holds it against its checksum. Raises DataError."""
    open_packed(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if _digest(file, 8 + length) != checksum(path):
            raise DataError(f"{path}: its bytes are not those that were written (SHA-256 differs); pack it again")


def checksum(path: str | Path) -> str | None:
    """What the header of a packed file gives as the SHA-256 of the rest."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("sha256")


def _header(fields: dict[str, Field], rows: int, info: dict, checksum: str) -> bytes:
    entries: dict = {"__metadata__": {"info": json.dumps(info, sort_keys=True), "sha256": checksum}}
    at = 0
    for name, field in fields.items():
        end = at + rows * field.row_bytes
        shape = [rows, *field.shape]
        entries[name] = {"dtype": _NAMES[field.dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text


def _write_rows(file: int, at: int, fields: dict[str, Field], rows: int, start: int, stop: int, arrays: dict) -> None:
    for name, field in fields.items():
        array = np.ascontiguousarray(arrays[name], dtype=field.dtype)
        if array.shape != (stop - start, *field.shape):
            raise ValueError(f"{name}: rows {start} to {stop} have shape {array.shape}, a row is {field.shape}")
        left, offset = array.data.cast("B"), at + start * field.row_bytes
        while left:
            written = os.pwrite(file, left, offset)
            left, offset = left[written:], offset + written
        at += rows * field.row_bytes


def _done(journal: Path, begun: str) -> int:
    """Rows that a call with the same header has written, 0 where there was none."""
    try:
        note = json.loads(journal.read_text())
        return note["rows"] if note["begun"] == begun else 0
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0


def _digest(file, start: int) -> str:
    digest = hashlib.sha256()
    file.seek(start)
    while part := file.read(_READ):
        digest.update(part)
    return digest.hexdigest()
