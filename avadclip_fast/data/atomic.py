"""Atomic writes, after which a file is complete or does not exist; locks, JSON records and hashes."""

import contextlib
import csv
import hashlib
import io
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from .errors import DataError

try:
    import fcntl
except ImportError as error:  # Windows, which does not replace open files either
    raise ImportError(
        "models, data and commands of avadclip_fast need Linux or macOS (no fcntl here): on Windows, install it in WSL"
    ) from error

PATIENCE = 10.0  # seconds to wait for a folder that another process holds
LEFT = 3600  # seconds after which a temporary file counts as abandoned


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file beside `path` (mode "wb", or "w" for UTF-8 text).

    On success the file replaces `path`. On failure it is removed, and `path` is unchanged; an OSError names `path`.
    """
    path = Path(path)
    # Not named after `path`, whose name may already have the maximum length; mode "x" honours the umask.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a crash could leave `path` empty
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):  # of an interrupt right after the rename
                    os.unlink(temporary)
                raise
    except OSError as error:  # also of closing, which tries once more to write what is left of a small file
        # Python names no file where the disk is full, and the temporary one where the folder is not there.
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
            del error.filename2  # of a rename
        raise


def lock(file: int) -> None:
    """Locks an open file or folder until it is closed or the process ends, even if killed.

    Does nothing on file systems without such locks. Raises BlockingIOError if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # such as NFS, which locks no folders
        pass


@contextlib.contextmanager
def in_turn(folder: str | Path) -> Iterator[None]:
    """Locks a folder inside the block, after waiting for others: for files that are read and replaced in moments.

    Goes on without the lock after PATIENCE seconds, as in a folder that a training run holds.
    """
    held, end = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end:
            try:
                lock(held)
                break
            except BlockingIOError:
                time.sleep(0.01)
        yield
    finally:
        os.close(held)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(value, indent=1) + "\n")


def write_csv(path: str | Path, rows: Iterable[Sequence]) -> None:
    """Writes rows of cells as CSV, atomically, with lines that end in \\n."""
    with atomic_write(path, "w") as file:
        _write_rows(file, rows)


def append_csv(path: str | Path, rows: Iterable[Sequence]) -> None:
    """Adds rows of cells to the end of a CSV file: all of them or, on failure, none. An OSError names `path`.

    Not atomic: a kill may cut the last row short.
    """
    text = io.StringIO()
    _write_rows(text, rows)
    left = memoryview(text.getvalue().encode())
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(before)
                raise
    except OSError as error:
        error.filename = str(path)  # Python names none where the disk is full
        raise


def _write_rows(file: IO[str], rows: Iterable[Sequence]) -> None:
    # The writer's own lines end in \r\n. Before Python 3.13 it quotes what is in their end alone, and readers take the
    # \r of a file's name for the end of a row.
    lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
    csv.writer(lines).writerows(rows)


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a JSON object in one line, atomically."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(record) + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object; empty if the file is missing or holds none."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def identity_of(path: str | Path) -> dict[str, int] | None:
    """What identifies a file even if moved, for its record; None if it is gone, as a camera's oldest are."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return {"bytes": facts.st_size, "modified": facts.st_mtime_ns}


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: str | Path) -> None:
    """Creates a folder for results, so that long runs fail early. Raises DataError if it is not writable."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder}: cannot be written to")


def remove_left(folder: str | Path) -> None:
    """Removes temporary files of `atomic_write` that killed processes left in a folder."""
    for path in Path(folder).glob(f".{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it was finished in the meantime
            if time.time() - path.stat().st_mtime > LEFT:
                path.unlink()
