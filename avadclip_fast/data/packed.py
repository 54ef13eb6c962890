"""Packed files: tensors that share their first dimension, written in blocks of rows, resumable and memory-mapped.

The format is safetensors. The metadata has a JSON `info`, its SHA-256, and, once the file is complete, that of all
bytes after the header. Until then the file is named NAME.part, and NAME.part.json records the number of rows written.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import lock, read_record, write_json
from .errors import DataError
from .tensors import read_tensors

PACKED = ".safetensors"  # suffix of packed files
_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64"}
_MADE = os.O_CREAT | os.O_NOFOLLOW  # in a folder of several users, another's link could lead to a file of this one
_PLAIN = "0" * 64  # placeholder for the checksum in the header
_HEADER_MOST = 100_000_000  # bytes of a header that safetensors reads
_CHANGED = "its bytes are not those that were written (SHA-256 differs); remove it, and make it anew"


class Field(NamedTuple):
    """Dtype and row shape of a tensor in the file."""

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
    """Writes a file of `rows` rows, resuming an interrupted call with the same arguments.

    fill: (start, stop) -> name -> array (stop - start, *shape), called for `block` rows at a time, in order
    info: any JSON value; a partial file with other fields, rows or info is overwritten
    Creates the folder if needed. Raises DataError if the file cannot be written, or could not be read, or another
    process is writing it.
    """
    path = Path(path)
    part, journal = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    header = _header(fields, rows, info, _PLAIN)
    if len(header) - 8 > _HEADER_MOST:  # now, not after hours, when the whole file would be refused
        raise DataError(
            f"{path}: the paths and labels of {rows} rows take {len(header) // 10**6} MB, and a safetensors header has "
            f"{_HEADER_MOST // 10**6} MB at most: pack fewer rows, or give shorter paths, as through a link"
        )
    size = len(header) + rows * sum(field.row_bytes for field in fields.values())
    begun = hashlib.sha256(header).hexdigest()
    try:
        if not path.parent.exists():  # where it is a file, opening says so better than making it a folder would
            path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, path) as file:
            done = _done(journal, begun, rows) if os.fstat(file.fileno()).st_size == size else 0
            if done == 0:
                file.truncate(0)
                if hasattr(os, "posix_fallocate"):  # fail now if the disk is too small, not after hours
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    file.truncate(size)
                _write(file.fileno(), header, 0)
            starts = range(done, rows, block)
            for start in progress(starts) if progress else starts:
                stop = min(start + block, rows)
                _write_rows(file.fileno(), len(header), fields, rows, start, stop, fill(start, stop))
                getattr(os, "fdatasync", os.fsync)(file.fileno())  # macOS has no fdatasync
                write_json(journal, {"begun": begun, "rows": stop})
            _write(file.fileno(), _header(fields, rows, info, _digest(file, len(header))), 0)
            os.fsync(file.fileno())
            journal.unlink(missing_ok=True)  # before the rename, so that it never outlives the partial file
            os.replace(part, path)
    except OSError as error:
        resumes = "; another call resumes from the rows written" if os.path.exists(journal) else ""
        raise DataError(f"{path}: cannot be written: {error.strerror}{resumes}") from error


@contextlib.contextmanager
def _locked(part: Path, path: Path) -> Iterator[IO[bytes]]:
    """Opens the partial file of `path`, made if needed, and locks it. Raises DataError if another process has it."""
    while True:
        with open(part, "r+b", opener=lambda name, flags: os.open(name, flags | _MADE, 0o666)) as file:
            try:
                lock(file.fileno())
            except BlockingIOError as error:
                raise DataError(f"{path}: another process is writing it; wait for that one, or end it") from error
            # Before it was locked, another process may have completed it: what is open is the finished file then.
            if _names(part, file):
                yield file
                return


def _names(path: Path, file: IO[bytes]) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def open_packed(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Memory-maps a packed file and returns its tensors and info, which it verifies. Raises DataError."""
    try:
        tensors, metadata = read_tensors(path)
        told, info = metadata["info"], json.loads(metadata["info"])
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as packed features: {error}") from error
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: a safetensors file, but not of packed features: it has no info") from error
    if metadata.get("info_sha256", _sha256(told)) != _sha256(told):  # the first files have none
        raise DataError(f"{path}: {_CHANGED}")
    return tensors, info


def check_packed(path: str | Path, audio: bool = False) -> None:
    """Verifies a whole file against its checksum. Raises DataError, also without sound if `audio` is required."""
    fields, _ = open_packed(path)
    if audio and "audio" not in fields:
        remedy = "pack it again with --audio; without sound, train --student, check --no-audio"
        raise DataError(f"{path}: packed without sound: {remedy}")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if _digest(file, 8 + length) != checksum(path):
            raise DataError(f"{path}: {_CHANGED}")


def checksum(path: str | Path) -> str | None:
    """The SHA-256 in the header of a packed file, or None."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("sha256")


def _header(fields: dict[str, Field], rows: int, info: dict, checksum: str) -> bytes:
    told = json.dumps(info, sort_keys=True)
    entries: dict = {"__metadata__": {"info": told, "info_sha256": _sha256(told), "sha256": checksum}}
    at = 0
    for name, field in fields.items():
        end = at + rows * field.row_bytes
        shape = [rows, *field.shape]
        entries[name] = {"dtype": _NAMES[field.dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # aligns tensors to eight bytes
    return struct.pack("<Q", len(text)) + text


def _write_rows(file: int, at: int, fields: dict[str, Field], rows: int, start: int, stop: int, arrays: dict) -> None:
    for name, field in fields.items():
        array = np.ascontiguousarray(arrays[name], dtype=field.dtype)
        if array.shape != (stop - start, *field.shape):
            raise ValueError(f"{name}: rows {start} to {stop} have shape {array.shape}, a row is {field.shape}")
        _write(file, array.data.cast("B"), at + start * field.row_bytes)
        at += rows * field.row_bytes


def _write(file: int, left: bytes | memoryview, offset: int) -> None:
    """Writes all bytes at an offset, where one call may stop short, as on a disk that fills up."""
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def _done(journal: Path, begun: str, rows: int) -> int:
    """Number of rows written by an earlier call with the same header, or 0. rows: of the whole file"""
    note = read_record(journal)
    try:
        return range(rows + 1).index(note["rows"]) if note["begun"] == begun else 0
    except (ValueError, KeyError):
        return 0


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(file, start: int) -> str:
    file.seek(start)
    return hashlib.file_digest(file, "sha256").hexdigest()
