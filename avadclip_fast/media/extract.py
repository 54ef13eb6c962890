"""Features of many videos, to files that training and evaluation read; what is done is not done again.

OUTPUT/visual/NAME__K.npy (a file a crop), OUTPUT/audio/NAME.npy, OUTPUT/done/NAME.json (written last: a video is there
whole or not at all), OUTPUT/list.csv of all that is done, OUTPUT/extract.json with what failed, and why.
"""

import csv
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import DataError
from ..data.atomic import atomic_write
from ..data.features import write_features
from ..data.lists import Row, is_inside, write_list
from .encoders import AudioEncoder, VisualEncoder
from .errors import MediaError
from .features import Sampling, VideoFeatures, video_features

SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".flv", ".mpg", ".mpeg", ".ts", ".m4v", ".wmv", ".3gp")
_LABEL = re.compile(r"_label_([A-Z]\d?(?:-[A-Z0-9]+)*)$")  # XD-Violence's file names end in theirs


@dataclass(frozen=True)
class Source:
    """One video to extract: the file, its name in the output, and its label ("" where nobody says)."""

    path: Path
    name: str
    label: str = ""


def find_sources(
    given: Sequence[str | Path], label: str = "", root: str | Path | None = None
) -> tuple[list[Source], list[dict]]:
    """The videos of files, folders (searched through) and lists (.csv with path and label, or .txt), sorted by name.

    Returns (sources, failures): what cannot be read is told beside the rest. root: where a list's relative paths start,
    and what they must not lead out of; the list's folder by default. Raises DataError where two videos have one name.
    """
    sources: list[Source] = []
    failures: list[dict] = []
    for item in map(Path, given):
        if item.suffix.lower() in (".csv", ".txt") and item.is_file():
            sources += _listed(item, label, Path(root) if root is not None else item.parent)
        elif item.is_dir():
            sources += _inside(item, label, failures)
        else:
            sources.append(_source(item, item.stem, label))
    names: dict[str, Path] = {}
    for source in sources:
        other = names.setdefault(source.name, source.path)
        if other != source.path:
            raise DataError(
                f"{source.path} and {other} would both be called {source.name}: rename one, or give their common folder"
            )
    return sorted(set(sources), key=lambda source: source.name), failures


def _inside(folder: Path, label: str, failures: list[dict]) -> Iterable[Source]:
    """Videos below a folder; links to folders are not followed, so that no loop is walked."""

    def unreadable(error: OSError) -> None:
        failures.append({"source": str(error.filename), "reason": f"{error.filename}: {error.strerror}"})

    for parent, _, files in os.walk(folder, onerror=unreadable, followlinks=False):
        for file in files:
            path = Path(parent, file)
            if path.suffix.lower() in SUFFIXES:
                yield _source(path, str(path.relative_to(folder).with_suffix("")), label)


def _listed(path: Path, label: str, root: Path) -> Iterable[Source]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list: {error}") from error
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(text.splitlines())
        if "path" not in (reader.fieldnames or []):
            raise DataError(f"{path}: no column path: the header must be path or path,label")
        rows = [(row["path"] or "", row.get("label") or label) for row in reader]
    else:
        rows = [(line, label) for line in text.splitlines()]
    for number, (name, label_) in enumerate(rows, 2 if path.suffix.lower() == ".csv" else 1):
        if not name.strip():
            continue
        if not is_inside(root, name.strip()):
            raise DataError(f"{path}, line {number}: {name} leads out of {root}; name a --root that holds it")
        file = Path(os.path.abspath(root / name.strip()))
        yield _source(file, str(file.relative_to(os.path.abspath(root)).with_suffix("")), label_)


def _source(path: Path, name: str, label: str) -> Source:
    found = _LABEL.search(path.stem)
    return Source(path, name, label or (found[1] if found else ""))


class Tally:
    """What became of each video; progress is called with the name of each as it ends."""

    def __init__(self, progress: Callable[[str], None] | None = None):
        self._progress = progress
        self._ended: dict[str, list[str]] = {"done": [], "skipped": []}
        self._failed: list[dict[str, str]] = []

    def ended(self, source: Source, how: str) -> None:
        """how: "done" or "skipped"."""
        self._ended[how].append(source.name)
        self._told(source)

    def failed(self, source: Source, reason: str) -> None:
        self._failed.append({"source": str(source.path), "reason": reason})
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
) -> dict[str, list]:
    """Extracts every source that is not done, some at once in threads; one that fails does not stop the rest.

    settings: of `settings_of`; a video that was done with others is done again. Returns `Tally.record`.
    """
    output, tally = Path(output), Tally(progress)
    encoding = threading.Lock()  # decoding runs beside it; the encoders' own threads fill the processor
    seen: Any = _Locked(visual, encoding)
    heard: Any = None if audio is None else _Locked(audio, encoding)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        tasks = {
            pool.submit(extract_one, source, output, sampling, seen, heard, settings): source for source in sources
        }
        try:
            for task in as_completed(tasks):
                source = tasks[task]
                try:
                    how = task.result()
                except Exception as error:  # whatever one video did, the others go on, and it is told
                    tally.failed(source, failure(source.path, error)["reason"])
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
) -> str:
    """Extracts one video: "done", or "skipped" where it was done with these settings before. Raises MediaError."""
    if _is_done(output, source, settings):
        return "skipped"
    found = video_features(source.path, sampling, visual, audio, dtype=np.dtype(settings["dtype"]))
    write_video(output, source, found, settings)
    return "done"


def failure(path: Path, error: Exception) -> dict[str, str]:
    """{"source", "reason"}: a line that names the file, whatever went wrong."""
    if isinstance(error, DataError):
        return {"source": str(path), "reason": str(error)}
    return {"source": str(path), "reason": f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"}


class _Locked:
    """An encoder that one thread uses at a time."""

    def __init__(self, encoder: VisualEncoder | AudioEncoder, lock: threading.Lock):
        self._encoder: Any = encoder
        self._lock = lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, given: Any) -> torch.Tensor:
        with self._lock:
            return self._encoder(given)


def _paths(output: Path, name: str, crops: int) -> tuple[list[Path], Path, Path]:
    visual = [output / "visual" / f"{name}__{k}.npy" for k in range(crops)]
    return visual, output / "audio" / f"{name}.npy", output / "done" / f"{name}.json"


def _identity(path: Path) -> dict:
    try:
        facts = path.stat()
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from error
    return {"bytes": facts.st_size, "modified": facts.st_mtime_ns}


def settings_of(sampling: Sampling, half: bool, encoders: dict) -> dict:
    """All that features depend on. half: float16 files; encoders: their names and weights."""
    return {**asdict(sampling), "dtype": "float16" if half else "float32", **encoders}


def _is_done(output: Path, source: Source, settings: dict) -> bool:
    visual, audio, done = _paths(output, source.name, settings["crops"])
    identity = _identity(source.path)
    try:
        record = json.loads(done.read_text())
        files = [*visual, audio] if record["audio"] else visual
        return record["settings"] == settings and record["file"] == identity and all(f.is_file() for f in files)
    except (OSError, ValueError, KeyError):
        return False


def write_video(output: Path, source: Source, found: VideoFeatures, settings: dict) -> None:
    """A video's files, each atomically, and last of all the one that says that they are there."""
    visual, audio, done = _paths(output, source.name, len(found.visual))
    for path in (*visual, audio, done):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(visual, found.visual, strict=True):
        write_features(path, rows)
    if found.audio is not None:
        write_features(audio, found.audio)
    record = {
        "source": str(source.path),
        "file": _identity(source.path),
        "label": source.label,
        "settings": settings,
        "crops": len(visual),
        "audio": found.audio is not None,
        "snippets": len(found.times),
        "seconds": found.seconds,
        "times": np.round(found.times, 4).tolist(),
        "heard": found.heard.astype(int).tolist(),
    }
    with atomic_write(done, "w") as file:
        file.write(json.dumps(record) + "\n")


def write_lists(output: str | Path, settings: dict) -> list[Row]:
    """OUTPUT/list.csv of everything that was done there with these settings, in order of name; returns its rows."""
    output = Path(output)
    rows = []
    for path in sorted((output / "done").rglob("*.json")):
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            continue
        name = str(path.relative_to(output / "done").with_suffix(""))
        visual, audio, _ = _paths(output, name, record["crops"])
        rows += [Row(file, audio if record["audio"] else None, record["label"], 0) for file in visual]
    if rows:
        write_list(output / "list.csv", rows)
    return rows


def shard(sources: Sequence[Source], which: str) -> list[Source]:
    """The i-th of n equal parts for "i/n", i from 1. Raises DataError."""
    match = re.fullmatch(r"(\d+)/(\d+)", which)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--shard {which}: expected i/n with i from 1 to n, such as 2/8")
    return list(sources[int(match[1]) - 1 :: int(match[2])])
