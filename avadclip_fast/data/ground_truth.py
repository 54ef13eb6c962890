"""Ground truth of the test sets: anomalous spans and frame labels."""

import io
import json
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from .errors import DataError
from .npy import bytes_left, read_header

# What zipfile raises on a damaged file: RuntimeError where it seems encrypted, or compressed in another way.
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, KeyError, EOFError)

# Lists, numbers and codes of an official file; XD-Violence's has 5,000. A pickle can name one list many times, and
# so hold more of them than any memory.
MOST = 1 << 20


class Span(NamedTuple):
    """Frames start <= t < end of a video."""

    start: int
    end: int
    code: str


def read_spans(path: str | Path, labels: str | Path | None = None) -> list[list[Span]]:
    """Reads spans per video from a `.json` file or the official pair of `.npy` files. Raises DataError."""
    if Path(path).suffix == ".json":
        if labels is not None:
            raise DataError(f"{path} holds the labels of its spans itself; leave out {labels}")
        return read_segments_json(path)
    if labels is None:
        raise DataError(f"{path}: the official form has the labels of its spans in a second file; name that as well")
    return segments(path, labels)


def segments(path_segment: str | Path, path_label: str | Path) -> list[list[Span]]:
    """Reads spans per video from the official `gt_*_segment.npy` and `gt_*_label.npy`. Raises DataError."""
    source = f"{path_segment} and {path_label}"
    return _spans(read_object_array(path_segment), read_object_array(path_label), source)


def read_segments_json(path: str | Path) -> list[list[Span]]:
    """Reads spans per video from `{"segments": [[[start, end], ...], ...], "labels": [[code, ...], ...]}`.

    Raises DataError.
    """
    try:
        truth = json.loads(Path(path).read_text(encoding="utf-8"))
        return _spans(truth["segments"], truth["labels"], str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"  # repr would print all bytes of a file that is not UTF-8
        raise DataError(f'{path}: not JSON of the form {{"segments": ..., "labels": ...}}: {reason}') from error


def _spans(segments: Sequence, labels: Sequence, source: str) -> list[list[Span]]:
    if len(segments) != len(labels):
        raise DataError(f"{source}: spans of {len(segments)} videos, labels of {len(labels)}")
    result = []
    for video, (pairs, codes) in enumerate(zip(segments, labels, strict=True)):
        try:
            spans = [
                Span(_frame(start), _frame(end), str(code)) for (start, end), code in zip(pairs, codes, strict=True)
            ]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{source}: video {video}, from 0: expected a label and [start, end] per span: {error}"
            ) from error
        if bad := [span for span in spans if not 0 <= span.start < span.end]:
            raise DataError(f"{source}: video {video}, from 0: span {bad[0][:2]} is not 0 <= start < end")
        result.append(spans)
    return result


def _frame(number: str | float) -> int:
    """A frame number, which the official files hold as text. Raises ValueError on another one."""
    whole = isinstance(number, str) or (isinstance(number, float) and number.is_integer())
    frame = int(number) if whole else number
    if type(frame) is not int or abs(frame) >= 1 << 62:
        raise ValueError(f"{number!r} is no frame number")
    return frame


def read_object_array(path: str | Path) -> list:
    """Reads a `.npy` file of Python objects as nested lists of strings and integers, without running pickled code.

    A pickle calls the names it contains. The names that numpy writes map to inert classes of this file, and any other
    name is refused, so no other code runs.
    Raises DataError if the file is not an object array, or refers to another name.
    """
    try:
        with open(path, "rb") as file:
            _, _, dtype = read_header(file, path)
            if dtype.kind != "O":
                raise DataError(f"{path}: dtype {dtype}; expected Python objects, as in the official gt_*_segment.npy")
            array = _Unpickler(io.BytesIO(_bounded(file.read()))).load()
        if not isinstance(array, _Array):
            raise pickle.UnpicklingError(f"a {type(array).__name__} instead of an array")
        return array.tolist()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except _Forbidden as error:
        raise DataError(f"{path}: refused: its pickle refers to {error}, which spans do not need") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        MemoryError,
        OverflowError,
        RecursionError,
    ) as error:
        raise DataError(f"{path}: not an array of lists, or cut short: {error}") from error


def _bounded(pickled: bytes) -> bytes:
    """The pickle itself. Raises ValueError if it would take memory for more than its bytes can hold."""
    for code, argument, _ in pickletools.genops(pickled):  # refuses strings that are said to be longer
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and cast(int, argument) > len(pickled):
            raise ValueError(f"it numbers an object {argument}, and pickle keeps room for as many")
    return pickled


class _Forbidden(Exception):
    pass


class _Array:
    """Stands in for numpy.ndarray: stores the pickled state and converts it to lists."""

    def __init__(self, *_: Any):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def tolist(self) -> list:
        _, shape, _, _, items = self.state
        numbers = all(type(size) is int for size in shape)  # a product with text would repeat it
        if not numbers or math.prod(size or 1 for size in shape) > MOST:  # of which most may be empty
            raise ValueError(f"its shape is {shape}")
        room = iter(range(MOST))
        array: np.ndarray = np.empty(len(items), dtype=object)
        for i, item in enumerate(items):  # assigning all at once would make numpy unpack the lists
            array[i] = _plain(item, room)
        return array.reshape(shape).tolist()  # object arrays are pickled in C order, whatever the flag says


class _Inert:
    """Stands in for numpy.dtype, and for the class passed to `_reconstruct`."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2
        ("numpy", "ndarray"): _Inert,
        ("numpy", "dtype"): _Inert,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.KNOWN:
            raise _Forbidden(f"{module}.{name}")
        return self.KNOWN[module, name]


def _plain(item: Any, room: Iterator[int]) -> Any:
    if next(room, None) is None:
        raise ValueError(f"more than {MOST} lists, numbers and codes")
    if isinstance(item, list | tuple):
        return [_plain(part, room) for part in item]
    if type(item) not in (str, int):
        raise ValueError(f"a {type(item).__name__} among strings, integers and lists")
    return item


def read_annotations(path: str | Path) -> dict[str, list[tuple[int, int]]]:
    """Reads XD-Violence's annotations.txt: one line per video with its name and pairs of start and end frames.

    Returns name (without `.mp4`) -> [(start, end), ...], frames start <= t < end. Raises DataError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file in UTF-8: {error}") from error
    annotations = {}
    for number, line in enumerate(lines, 1):
        name, *numbers = line.split() or [""]
        name = name.removesuffix(".mp4")
        if not name:
            continue
        try:
            frames = [int(text) for text in numbers]
            pairs = list(zip(frames[::2], frames[1::2], strict=True))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected a name and pairs of frame numbers") from error
        if bad := [pair for pair in pairs if not 0 <= pair[0] < pair[1]]:
            raise DataError(f"{path}, line {number}: span {bad[0]} is not 0 <= start < end")
        if name in annotations:
            raise DataError(f"{path}, line {number}: {name} is annotated a second time; join the lines")
        annotations[name] = pairs
    return annotations


def frame_vector(annotations: dict[str, list[tuple[int, int]]], videos: Iterable[tuple[str, int]]) -> np.ndarray:
    """Frame ground truth of XD-Violence.

    videos: (name, frames) in evaluation order
    Returns (sum of frames,) float32 of 0 and 1. Raises DataError if an annotated video is not in `videos` exactly once,
    or a span is not two whole numbers, 0 <= start < end.
    """
    parts, named = [np.zeros(0, np.float32)], set()
    for name, frames in videos:
        if name in named and name in annotations:
            raise DataError(f"{name} is annotated, and in the list twice; name each video apart, as with its folder")
        named.add(name)
        truth = np.zeros(frames, np.float32)
        for span in annotations.get(name, []):
            start, end = _frames(name, span)
            truth[start:end] = 1  # annotations may extend past the last whole snippet; slicing drops the rest
        parts.append(truth)
    if unknown := [name for name in annotations if name not in named]:
        raise DataError(f"{len(unknown)} annotated videos are not in the list, {unknown[0]} first")
    return np.concatenate(parts)


def _frames(name: str, span: Sequence[int]) -> tuple[int, int]:
    """Start and end of a span that a user wrote: slices would take -5, and an end before the start, for no frames."""
    try:
        start, end = map(index, span)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: span {span!r} is not (start, end) in whole frames") from error
    if not 0 <= start < end:
        raise DataError(f"{name}: span {(start, end)} is not 0 <= start < end")
    return start, end


def read_frame_gt(path: str | Path) -> np.ndarray:
    """Reads frame ground truth from `.npy`, or from `.npz` (its array `gt`, or its only array).

    Returns (frames,) float32 of 0 and 1. Raises DataError.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            loaded = _zipped_vector(file, path) if zipped else _vector(file, path, bytes_left(file))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise DataError(f"{path}: not a readable .npz file, or damaged: {error}; copy or make it again") from error
    if len(bad := np.flatnonzero((loaded != 0) & (loaded != 1))):
        raise DataError(f"{path}: frame {bad[0]} is {loaded[bad[0]]}; a frame is 0 (normal) or 1 (anomalous)")
    return loaded.astype(np.float32)


def _zipped_vector(file: IO[bytes], path: str | Path) -> np.ndarray:
    with zipfile.ZipFile(file) as arrays:
        names = [name.removesuffix(".npy") for name in arrays.namelist()]
        if "gt" not in names and len(names) != 1:
            raise DataError(f"{path}: holds {', '.join(names) or 'no arrays'}; name one of them gt")
        info = arrays.infolist()[names.index("gt") if "gt" in names else 0]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: compressed as numpy.savez_compressed does not; write it with that")
        with arrays.open(info) as member:
            return _vector(member, path, info.file_size)


def _vector(file: IO[bytes], path: str | Path, size: int) -> np.ndarray:
    """Reads a non-empty vector of numbers in `.npy` format from a file of `size` bytes."""
    shape, _, dtype = read_header(file, path)
    if len(shape) != 1 or shape[0] < 1 or dtype.kind not in "bfiu":
        raise DataError(f"{path}: expected a vector with a number per frame, got {dtype} {shape}")
    wanted = shape[0] * dtype.itemsize
    stored = file.read(min(wanted, size))  # a few bytes of a .npz may stand for gigabytes behind them
    if len(stored) < wanted:
        raise DataError(f"{path}: cut short: fewer bytes than its {shape[0]} frames take; copy or make it again")
    return np.frombuffer(stored, dtype, shape[0])
