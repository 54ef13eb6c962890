"""Resumable feature extraction from many videos, to files that training and evaluation read.

Writes OUTPUT/visual/NAME__K.npy (one file per crop), OUTPUT/audio/NAME.npy, OUTPUT/done/NAME.json (last, to mark the
video as complete), OUTPUT/list.csv with all complete videos, and OUTPUT/extract.json with failures and their reasons.
"""

import errno
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import DataError
from ..data.atomic import identity_of, in_turn, read_record, remove_left, sha256_of, write_record
from ..data.errors import without_login
from ..data.features import write_features
from ..data.lists import Row, misplaced, read_cells, video_of, write_list
from .decode import FILES_ONLY
from .encoders import AudioEncoder, Encoders, VisualEncoder
from .features import Sampling, VideoFeatures, video_features

LABELLED = {"file": dict, "label": str, "assumed": bool, "listed": str}
# required in OUTPUT/done/NAME.json
RECORDED = {"source": str, "file": dict, "settings": dict, "label": str, "crops": int, "audio": bool}
SUFFIXES = (
    ".mp4", ".mkv", ".avi", ".mov", ".webm", ".flv", ".mpg", ".mpeg", ".mpe", ".vob", ".ts", ".mts", ".m2ts", ".m4v",
    ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".mxf", ".dav",
)  # fmt: skip
LISTS = (".csv", ".txt")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # of a scheme with two letters or more; C:/ is a drive
_LABEL = re.compile(r"_label_([A-Z]\d?(?:-[A-Z0-9]+)*)$")  # XD-Violence's file names end with their label


class Interrupted(Exception):
    """Extraction of a video was interrupted on request."""


@dataclass(frozen=True)
class Source:
    """A video to extract: its file, its name in the output, and its label ("" if unknown)."""

    path: Path
    name: str
    label: str = ""
    assumed: bool = False  # whether neither a list nor the file's name labels it


def find_sources(
    given: Sequence[str | Path], label: str = "", root: str | Path | None = None, output: str | Path | None = None
) -> tuple[list[Source], list[dict]]:
    """Finds videos in files, folders (recursively) and lists (.csv with path and label, or .txt), sorted by name.

    label: for videos labelled by neither a list nor their name
    root: base of a list's relative paths, which no path may leave; the list's folder by default
    output: folder of the results, which is not searched unless it is given itself
    Returns (sources, failures), the latter for what cannot be read.
    Raises DataError for an invalid list, two videos with one name, one video with two names or labels, or a root
    without a list.
    """
    failures: list[dict] = []
    if root is not None and not any(Path(item).suffix.lower() in LISTS for item in given):
        raise DataError(f"--root {root} is for the paths of a list, and none is given: leave it out")
    sources = [source for item in map(Path, given) for source in _sources_of(item, label, root, output, failures)]
    found: dict[str, Source] = {}
    for source in sources:
        if not _is_text(source.name):
            shown = os.fsencode(source.path).decode(errors="backslashreplace")
            reason = f"{shown}: its name is not UTF-8, as lists and events are written; rename it"
            failures.append({"source": shown, "reason": reason})
            continue
        other = found.setdefault(source.name, source)
        if os.path.abspath(other.path) != os.path.abspath(source.path):
            together = os.path.abspath(other.path.parent) == os.path.abspath(source.path.parent)
            remedy = "rename one" if together else "rename one, or give their common folder"
            raise DataError(f"{source.path} and {other.path} would both be called {source.name}: {remedy}")
        if other.assumed:  # same video given twice: keep the label of a list
            found[source.name] = source
        elif not source.assumed and other.label != source.label:
            raise DataError(f"{source.path} is given twice, labelled {other.label} and {source.label}")
    names: dict[str, str] = {}
    for source in found.values():
        if (other_name := names.setdefault(os.path.abspath(source.path), source.name)) != source.name:
            raise DataError(
                f"{source.path} is given twice, and would be called {other_name} and {source.name}: leave one out, or "
                "give a list the --root that gives it the same name"
            )
    return sorted(found.values(), key=lambda source: source.name), failures


def _sources_of(
    item: Path, label: str, root: str | Path | None, output: str | Path | None, failures: list[dict]
) -> Iterable[Source]:
    """Yields the videos of one argument of `find_sources`, and adds what cannot be read to `failures`."""
    if (address := _ADDRESS.match(str(item))) is not None and not item.exists():
        url = without_login(f"{address[1]}://{str(item)[address.end() :]}")  # Path has swallowed a slash
        failures.append({"source": url, "reason": f"{url}: {address[1]}:// is not read ({FILES_ONLY})"})
    elif item.suffix.lower() in LISTS and item.is_file():
        yield from _listed(item, label, Path(root) if root is not None else item.parent)
    elif item.is_dir():
        yield from _inside(item, label, failures, output)
    else:
        yield _source(item, item.stem, "", label)


def check_results(given: Iterable[Path], sources: Iterable[Source], written: Iterable[Path]) -> None:
    """Raises DataError if results would replace a source, a given list, or a video that no earlier call wrote.

    given: arguments of `find_sources`. written: the files to be written
    A video without a NAME.json beside it is not the result of an earlier call.
    """
    kept = {_file(path): path for path in (*given, *(source.path for source in sources)) if path.is_file()}
    for path in filter(Path.is_file, written):
        theirs = kept.get(_file(path))
        if theirs is None and path.suffix in SUFFIXES and not path.with_suffix(".json").exists():
            theirs = path
        if theirs is not None:
            raise DataError(f"{theirs} would be overwritten by the results: give another folder with --output")


def _file(path: Path) -> tuple[int, int]:
    """Identifies a file, whatever links lead to it, on file systems that ignore case too."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def _inside(folder: Path, label: str, failures: list[dict], output: str | Path | None) -> Iterable[Source]:
    """Yields the videos below a folder, without following links to folders, which could form cycles.

    output: a folder to leave out, unless it is `folder` itself
    """
    left_out = os.path.realpath(output) if output is not None else ""

    def unreadable(error: OSError) -> None:
        failures.append({"source": str(error.filename), "reason": f"{error.filename}: {error.strerror}"})

    for parent, folders, files in os.walk(folder, onerror=unreadable, followlinks=False):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(parent, name)) != left_out]
        for file in files:
            path = Path(parent, file)
            # macOS puts a file ._NAME of attributes beside each NAME on disks of other systems
            if path.suffix.lower() in SUFFIXES and not file.startswith("._"):
                yield _source(path, str(path.relative_to(folder)).removesuffix(path.suffix), "", label)


def _listed(path: Path, label: str, root: Path) -> Iterable[Source]:
    if path.suffix.lower() == ".csv":
        rows = [(line, cells["path"], cells["label"]) for line, cells in read_cells(path, ["path"])]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list: {error}") from error
        rows = [(number, line.strip(), "") for number, line in enumerate(lines, 1)]
    if any(name.lower().endswith(".npy") for _, name, _ in rows):  # once, not one failure per line
        raise DataError(f"{path} lists feature files (.npy), not videos")
    for number, name, listed in rows:
        if not name:
            continue
        if wrong := misplaced(root, name):
            raise DataError(f"{path}, line {number}: {wrong}")
        file = Path(os.path.abspath(root / name))
        inner = file.relative_to(os.path.abspath(root))
        if not inner.name:
            raise DataError(f"{path}, line {number}: {name} is the list's own folder, not a video")
        yield _source(file, str(inner).removesuffix(inner.suffix), listed, label)


def _source(path: Path, name: str, listed: str, label: str) -> Source:
    """Creates a source labelled by the list, else by its file name, else by `label`."""
    found = _LABEL.search(path.stem)
    own = listed or (found[1] if found else "")
    return Source(path, name, own or label, assumed=not own)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the file name is not UTF-8
        return False
    return True


class Tally:
    """Records the outcome of each video, and calls `progress` with its name."""

    def __init__(self, progress: Callable[[str], None] | None = None):
        self._progress = progress
        self._ended: dict[str, list[str]] = {"done": [], "skipped": []}
        self._failed: list[dict[str, str]] = []

    def ended(self, source: Source, how: str) -> None:
        """how: "done" or "skipped"."""
        self._ended[how].append(source.name)
        self._told(source)

    def failed(self, source: Source, reason: str) -> None:
        self._failed.append({"source": without_login(str(source.path)), "reason": reason})
        self._told(source)

    def _told(self, source: Source) -> None:
        if self._progress is not None:
            self._progress(source.name)

    def record(self) -> dict[str, list]:
        """{"done": names, "skipped": names, "failed": [{"source", "reason"}]}, sorted."""
        ended = {how: sorted(names) for how, names in self._ended.items()}
        return {**ended, "failed": sorted(self._failed, key=str)}


def extract(
    sources: Sequence[Source],
    output: str | Path,
    sampling: Sampling,
    visual: VisualEncoder,
    audio: AudioEncoder | None,
    settings: dict[str, Any],
    workers: int = 2,
    progress: Callable[[str], None] | None = None,
    until: Callable[[], bool] = lambda: False,
    decoded: Callable[[int], None] = lambda frames: None,
) -> dict[str, list]:
    """Extracts every source that is not done, in parallel threads; a failure does not stop the others.

    settings: from `settings_of`; a video done with other settings is extracted again
    workers: threads
    progress: called with the name of each finished video
    until: polled; returning True stops the extraction and leaves the remaining videos undone
    decoded: called with the number of frames decoded since the last call, by any thread
    Returns the result of `Tally.record`.
    """
    output, tally = Path(output), Tally(progress)
    encoding = threading.Lock()  # encoders use all cores already; only decoding runs in parallel
    seen: Any = _Locked(visual, encoding, until)
    heard: Any = None if audio is None else _Locked(audio, encoding, until)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        tasks = {
            pool.submit(extract_one, source, output, sampling, seen, heard, settings, until, decoded): source
            for source in sources
        }
        try:
            for task in as_completed(tasks):
                source = tasks[task]
                try:
                    how = task.result()
                except Interrupted:
                    continue
                except Exception as error:  # report a failing video and continue with the others
                    tally.failed(source, reason_of(source.path, error))
                else:
                    tally.ended(source, how)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
    return tally.record()


def extract_one(
    source: Source,
    output: Path,
    sampling: Sampling,
    visual: VisualEncoder,
    audio: AudioEncoder | None,
    settings: dict[str, Any],
    until: Callable[[], bool] = lambda: False,
    decoded: Callable[[int], None] = lambda frames: None,
) -> str:
    """Extracts one video and returns "done", or "skipped" if it was done with these settings before.

    A skipped video's label is updated. Raises MediaError, and Interrupted once `until` returns True.
    """

    def go_on(frames: int = 0) -> None:
        if until():
            raise Interrupted
        decoded(frames)

    go_on()
    if (record := _done(output, source, settings)) is not None:
        if (updated := {**record, **_label(source, record)}) != record:
            write_record(_paths(output, source.name, 0)[2], updated)
        return "skipped"
    identity = identity_of(source.path)  # of what is read: a recording that grows meanwhile is then done again
    found = video_features(source.path, sampling, visual, audio, go_on, np.dtype(settings["dtype"]))
    write_video(output, source, identity, found, settings)
    return "done"


def reason_of(path: Path, error: Exception) -> str:
    """Returns why a video failed, in one line that names the file."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or f"a temporary file in {tempfile.gettempdir()}, which TMPDIR sets"
        return f"{path}: {where}: cannot be written: {error.strerror}; make room, and call again"
    return f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"


class _Locked:
    """An encoder protected by a lock."""

    def __init__(self, encoder: VisualEncoder | AudioEncoder, lock: threading.Lock, until: Callable[[], bool]):
        self._encoder: Any = encoder
        self._lock, self._until = lock, until

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, given: Any) -> torch.Tensor:
        with self._lock:
            if self._until():
                raise Interrupted
            return self._encoder(given)


def _paths(output: Path, name: str, crops: int) -> tuple[list[Path], Path, Path]:
    visual = [output / "visual" / f"{name}__{k}.npy" for k in range(crops)]
    return visual, output / "audio" / f"{name}.npy", output / "done" / f"{name}.json"


def remove_unfinished(output: Path, sources: Iterable[Source]) -> None:
    """Removes unfinished files of killed calls from the output folders of these videos."""
    folders = {output}
    for source in sources:
        (visual,), audio, done = _paths(output, source.name, 1)
        folders |= {visual.parent, audio.parent, done.parent}
    for folder in folders:
        remove_left(folder)


def settings_of(sampling: Sampling, half: bool, chosen: Encoders) -> dict:
    """All settings that features depend on, by option; for encoders, name and weights. half: float16 files."""
    return {
        **asdict(sampling),
        "dtype": "float16" if half else "float32",
        "visual": [chosen.visual, _content(chosen.visual_weights)],
        "audio": [chosen.audio, _content(chosen.audio_weights)],
    }


def _content(weights: str | None) -> str | None:
    """What identifies weights: a file's SHA-256, wherever it lies, otherwise what was given."""
    try:
        return sha256_of(weights) if weights is not None and os.path.isfile(weights) else weights
    except OSError:  # which loading them tells
        return weights


def _options(settings: dict) -> dict:
    """Settings by the names of the options of `extract`."""
    flat = {f"--{name}": value for name, value in settings.items() if name not in ("dtype", "visual", "audio")}
    for stream in ("visual", "audio"):
        flat |= dict(zip((f"--{stream}-encoder", f"--{stream}-weights"), settings[stream], strict=True))
    return {**flat, "--float32": settings["dtype"]}


def _differing(theirs: dict, ours: dict) -> set[str]:
    """The options by which settings differ."""
    given = _options(theirs)
    return {name for name, value in _options(ours).items() if given.get(name) != value}


def check_replaced(sources: Sequence[Source], output: Path, settings: dict) -> None:
    """Raises DataError if features of other videos, or made with other settings, would be replaced."""
    others = []
    for source in sources:  # no record is kept: each holds the times of all snippets
        if (record := _read_record(_paths(output, source.name, 0)[2])) is None:
            continue
        if source.path.is_file() and _is_other(source.path, record):
            raise DataError(
                f"{output} holds features of another video called {source.name}, {record['source']}: rename "
                f"{source.path}, give their common folder, or another --output, or --overwrite to replace them"
            )
        if record["settings"] != settings:
            others.append(record["settings"])
    if others:
        differ = ", ".join(sorted(set.union(*(_differing(given, settings) for given in others))))
        raise DataError(
            f"{output} holds features of {len(others)} of these videos, made with another {differ}: give another "
            "folder, or --overwrite to replace them"
        )


def check_names(sources: Sequence[Source], output: Path, settings: dict) -> None:
    """Raises DataError if a video would be listed by two names: one could be held out, the other trained on."""
    names = {os.path.abspath(source.path): source.name for source in sources}
    given = set(names.values())
    for done in sorted((output / "done").rglob("*.json")):
        known = str(done.relative_to(output / "done")).removesuffix(".json")
        record = _read_record(done) if known not in given else None  # which take seconds where there are thousands
        if record is None or record["settings"] != settings:
            continue
        if (name := names.get(record["source"])) is not None:
            raise DataError(
                f"{output} holds {record['source']} already, called {known}: give the folder or list that called it "
                f"so, or remove {done} to call it {name}"
            )


def _is_other(path: Path, record: dict) -> bool:
    """Whether a record is of another file than `path`: neither the same, changed or not, nor a copy of it."""
    return os.path.realpath(path) != os.path.realpath(record["source"]) and identity_of(path) != record["file"]


def _done(output: Path, source: Source, settings: dict) -> dict | None:
    """Returns the record of a video done with these settings, or None if it is not done."""
    visual, audio, done = _paths(output, source.name, settings["crops"])
    record = _read_record(done)
    if record is None or record["settings"] != settings or record["file"] != identity_of(source.path):
        return None
    files = [*visual, audio] if record["audio"] else visual
    return record if all(f.is_file() for f in files) else None


def _read_record(path: Path) -> dict | None:
    """Reads OUTPUT/done/NAME.json; returns None if it is missing or invalid, so that the video counts as not done."""
    record = read_record(path)
    try:
        _options(record["settings"])
        valid = all(isinstance(record[name], kind) for name, kind in RECORDED.items()) and "\0" not in record["source"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if valid else None


def _labelled(path: Path) -> dict | None:
    """Reads what a record, also one of a video that is not done, says of its label: "file", "label" and "listed"."""
    record = read_record(path)
    kept = {"listed": record.get("label"), "assumed": False}
    kept |= {name: record[name] for name in LABELLED if name in record}
    return kept if all(isinstance(kept.get(name), kind) for name, kind in LABELLED.items()) else None


def _label(source: Source, before: dict) -> dict:
    """What a record says of a video's label: one that is assumed does not replace one that an earlier call was told.

    before: the record until now
    """
    known = before["label"] and not before.get("assumed", False)
    if not source.label or (source.assumed and known):
        return {"label": before["label"], "assumed": not known}
    return {"label": source.label, "assumed": source.assumed}


def write_video(output: Path, source: Source, identity: dict | None, found: VideoFeatures, settings: dict) -> None:
    """Writes a video's files atomically, and its record last, which marks it as done. identity: the file's."""
    visual, audio, done = _paths(output, source.name, len(found.visual))
    before = _labelled(done)
    for path in (*visual, audio, done):
        path.parent.mkdir(parents=True, exist_ok=True)
    if before is None:
        before = {"file": identity, "label": source.label, "assumed": source.assumed, "listed": source.label}
    else:
        write_record(done, before)  # not done, until it is: a kill may leave files of two settings
    for path, rows in zip(visual, found.visual, strict=True):
        write_features(path, rows)
    if found.audio is not None:
        write_features(audio, found.audio)
    record = {
        "source": os.path.abspath(source.path),
        "file": identity,
        **_label(source, before if before["file"] == identity else {"label": ""}),
        "listed": before["listed"],  # label that `write_lists` wrote last
        "settings": settings,
        "crops": len(visual),
        "audio": found.audio is not None,
        "snippets": len(found.times),
        "seconds": found.seconds,
        "damaged": found.damaged,
        "times": np.round(found.times, 4).tolist(),
        "heard": found.heard.astype(int).tolist(),
    }
    write_record(done, record)


class Listing(NamedTuple):
    """What `write_lists` found."""

    rows: list[Row]
    damaged: dict[str, int]  # of the listed videos: name -> frames that could not be decoded
    others: int  # videos left out, since they were done with other settings
    options: set[str]  # in which these settings differ


def read_labels(output: str | Path) -> dict[Path, list[str]]:
    """Labels in OUTPUT/list.csv, if there is one: OUTPUT/visual/NAME -> one per crop. Raises DataError."""
    path, labels = Path(output) / "list.csv", dict[Path, list[str]]()
    if path.is_file():
        for line, cells in read_cells(path, ["path", "label"]):
            video = video_of(Row(path.parent / cells["path"], None, "", line))
            labels.setdefault(video, []).append(cells["label"])
    return labels


def write_lists(output: str | Path, settings: dict) -> Listing:
    """Writes OUTPUT/list.csv with all videos done with these settings, sorted by name.

    A label that differs from the last one written was typed by hand, and stays. Raises DataError like `read_labels`.
    """
    output = Path(output)
    rows: list[Row] = []
    damaged: dict[str, int] = {}
    others, options = 0, set[str]()
    changed: dict[Path, str] = {}  # label of each record to write, which is read again: all may be gigabytes
    with in_turn(output):  # of shards that end together
        labels = read_labels(output)
        for path in sorted((output / "done").rglob("*.json")):
            record = _read_record(path)
            if record is None:
                continue
            if record["settings"] != settings:
                others += 1
                options |= _differing(record["settings"], settings)
                continue
            name = str(path.relative_to(output / "done")).removesuffix(".json")
            visual, audio, _ = _paths(output, name, settings["crops"])
            written = record.get("listed", record["label"])
            typed = set(labels.get(output / "visual" / name, ())) - {"", written, record["label"]}
            label = min(typed, default=record["label"])
            rows.extend(Row(file, audio if record["audio"] else None, label, 0) for file in visual)
            if record.get("damaged"):
                damaged[name] = record["damaged"]
            if label != written and not typed:
                changed[path] = label
        if rows:
            write_list(output / "list.csv", rows)
        for path, label in changed.items():
            if (record := _read_record(path)) is not None:
                write_record(path, {**record, "listed": label})
    return Listing(rows, damaged, others, options)


def shard(sources: Sequence[Source], which: str) -> list[Source]:
    """Returns part i of n for "i/n", with i from 1: every n-th source. Raises DataError."""
    match = re.fullmatch(r"(\d+)/(\d+)", which)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--shard {which}: expected i/n with i from 1 to n, such as 2/8")
    return list(sources[int(match[1]) - 1 :: int(match[2])])
