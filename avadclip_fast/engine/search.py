"""Searches video files for events, and writes what `detect` finds into one folder, video by video."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data import DataError
from ..data.atomic import (
    append_csv,
    identity_of,
    in_turn,
    make_folder,
    read_record,
    remove_left,
    write_csv,
    write_record,
)
from ..media.decode import Progress
from ..media.encoders import AudioEncoder, VisualEncoder
from ..media.extract import Source, check_results
from ..media.features import Sampling, key_frames, video_features
from .detect import Detection, Scorer, best_snippets, detect, event_record
from .state import model_digest

EVENTS = ["video", "start", "end", "start_seconds", "end_seconds", "class", "score"]  # columns of events.csv


@dataclass(frozen=True)
class Results:
    """The files of a search: FOLDER/events.csv, and for each video NAME.json and those chosen below."""

    folder: Path
    plot: bool = True  # NAME.png: curve, events and key frames
    copy: bool = False  # NAME.mkv: the video with curve and events in it
    per_frame: bool = False  # NAME.frames.csv: scores of every frame

    @property
    def events(self) -> Path:
        return self.folder / "events.csv"

    def files(self, source: Source) -> list[Path]:
        """Returns the files of one video, NAME.json first."""
        endings = [".json", *[".frames.csv"] * self.per_frame, *[".png"] * self.plot, *[".mkv"] * self.copy]
        return [self.folder / f"{source.name}{ending}" for ending in endings]

    def prepare(self, given: Sequence[Path], sources: Sequence[Source]) -> None:
        """Makes the folder, and removes unfinished files of killed calls.

        given: arguments of `find_sources`
        Raises DataError if a search of these sources would replace anything but earlier results of the same videos.
        """
        files = [path for source in sources for path in self.files(source)]
        check_results(given, sources, [self.events, *files])
        if self.copy and any(path.is_dir() and self.folder.is_dir() and path.samefile(self.folder) for path in given):
            raise DataError(
                f"--annotate would write videos into {self.folder}, where the next call would look for videos to "
                "search: give another folder with --output"
            )
        read_events(self.events)  # to fail early
        for source in sources:
            check_video(self.files(source)[0], source.path)
        make_folder(self.folder)
        for folder in {path.parent for path in files}:
            remove_left(folder)

    def left(self, source: Source) -> list[Path]:
        """Returns the files of a video that an earlier search wrote, and that this one, still to come, does not."""
        own = self.files(source)
        known = replace(self, plot=True, copy=True, per_frame=True).files(source) if own[0].is_file() else []
        return [p for p in known if p not in own and p.is_file() and p.resolve() != source.path.resolve()]

    def finished(self, source: Source, settings: dict) -> list[dict] | None:
        """Returns the events of a video that was searched with these settings, if all its files exist, else None.

        The others are written after NAME.json: older ones are from an earlier search.
        """
        first, *others = self.files(source)
        try:
            written = first.stat().st_mtime_ns
            fresh = all(path.stat().st_mtime_ns >= written for path in others)
        except OSError:
            return None
        return done_with(first, source.path, settings) if fresh else None


class Found(NamedTuple):
    """What `search` found in a video."""

    detection: Detection
    frames: int  # number of frames
    damaged: int  # frames that could not be decoded


def search(
    source: Source,
    results: Results,
    scorers: Sequence[Scorer],
    sampling: Sampling,
    visual: VisualEncoder,
    audio: AudioEncoder | None,
    settings: dict,
    device: str | torch.device = "cpu",
    threshold: float | None = None,
    progress: Progress = lambda frames: None,
) -> Found:
    """Finds the events of one video; writes its NAME.json, and adds its lines to events.csv, see `add_events`.

    results: prepared. settings: from `settings_of`. progress: as for `video_features`. The others: as for `detect`.
    Raises MediaError, DataError.
    """
    read = identity_of(source.path)
    features = video_features(source.path, sampling, visual, audio, progress)
    detection = detect(source.name, features, scorers, device, threshold)
    target = results.files(source)[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    add_events(results.events, source.name, [event_record(e) for e in detection.events()])
    write_detection(target, detection, source.path, read, settings)  # last: it is done then
    return Found(detection, features.frames, features.damaged)


def illustrate(
    target: Path, source: Source, found: Found, sampling: Sampling, progress: Progress = lambda frames: None
) -> str:
    """Writes one of `Results.files` after the first, by its suffix: plot, copy, or scores of every frame.

    progress: as for `video_features`
    Returns "", or what the copy lacks, as `annotate` does. Raises MediaError.
    """
    detection = found.detection
    if target.suffix == ".csv":
        write_frame_scores(target, detection, found.frames, sampling.every)
    elif target.suffix == ".png":
        from .timeline import timeline

        timeline(target, detection, key_frames(source.path, sampling, best_snippets(detection), progress))
    else:
        from ..media.annotate import annotate

        return annotate(source.path, target, *detection.curve(), progress)
    return ""


def as_record(detection: Detection, source: str | Path) -> dict:
    """Returns a detection as JSON. source: path of the video."""
    return {
        "video": os.path.abspath(source),
        "classes": detection.classes,
        "seconds_per_snippet": detection.seconds,
        "parts": [
            {"start": round(start, 3), "end": round(end, 3), "by": part.by, "why": part.why}
            for part, start, end in detection.timed_parts()
        ],
        "events": [event_record(e) for e in detection.events()],
        "snippets": {
            "time": np.round(detection.times, 3).tolist(),
            "score": np.round(detection.scores.astype(float), 6).tolist(),
            "anomaly": np.round(detection.anomaly.astype(float), 6).tolist(),
            "threshold": np.round(detection.thresholds, 6).tolist(),
            "probabilities": np.round(detection.probabilities.astype(float), 6).tolist(),
        },
    }


def settings_of(scorers: Sequence[Scorer], threshold: float | None, features: dict) -> dict:
    """All that results depend on besides the video, as JSON values. features: `media.extract.settings_of`."""
    models = [[model_digest(scorer.model), asdict(scorer.calibration)] for scorer in scorers]
    return json.loads(json.dumps({**features, "threshold": threshold, "models": models}))


def done_with(path: Path, source: str | Path, settings: dict) -> list[dict] | None:
    """Returns the events that `write_detection` wrote with these settings, if the video is unchanged, or None."""
    record = read_record(path)
    if record.get("settings") != settings or record.get("file") != identity_of(source):
        return None
    try:
        _rows("", record["events"])
    except (ValueError, TypeError, KeyError, OverflowError):  # another hand has changed them
        return None
    return record["events"]


def write_detection(path: Path, detection: Detection, source: str | Path, read: dict | None, settings: dict) -> None:
    """read: `identity_of` the video before reading, so that one that grew meanwhile does not count as done."""
    write_record(path, {"file": read, "settings": settings, **as_record(detection, source)})


def check_video(path: Path, source: str | Path) -> None:
    """Raises DataError if `write_detection` wrote `path` for a video other than `source`, moved or not."""
    own, record = identity_of(source), read_record(path)
    try:
        video = record["video"]
        there = os.path.isfile(video)
        other = not os.path.samefile(video, source) if there else (record.get("file") or own) != own
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # no such file, or none of ours
        return
    if other and own is not None:
        gone, remedy = ("", "their common folder as the videos") if there else (", which is gone", f"remove {path}")
        raise DataError(
            f"{path} is of {video}{gone}, and would be replaced by what is found in {source}: give another folder with "
            f"--output, or {remedy}"
        )


def read_events(path: Path) -> list[list[str]]:
    """Reads the rows of events.csv; none if there is no file. Raises DataError."""
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {error}; move it away") from error
    if header != EVENTS:
        raise DataError(f"{path} was not written by detect: move it away, or give another folder with --output")
    if rows and len(rows[-1]) < len(EVENTS):  # a kill has cut it short, of a video that is not done
        rows.pop()
    return rows


def write_events(path: Path, found: dict[str, list[dict]]) -> None:
    """Writes one CSV row per event with the columns EVENTS, sorted by video; keeps the rows of other videos there.

    found: video -> its events, from `event_record`
    """
    with in_turn(path.parent):  # of several calls with this folder
        _replace(path, found)


def add_events(path: Path, name: str, events: list[dict]) -> None:
    """Writes the rows of one more video, after those there; `sort_events` follows the last video.

    To write all rows for each of many thousand videos may take as long as to search them. Where there are rows of the
    video already, all are written.
    """
    with in_turn(path.parent):
        if _can_follow(path, name):
            append_csv(path, _rows(name, events))
        else:
            _replace(path, {name: events})


def sort_events(path: Path) -> None:
    """Sorts the rows by video. Raises DataError."""
    with in_turn(path.parent):
        names = [row[0] for row in read_events(path)]
        if names != sorted(names):
            _replace(path, {})


def _replace(path: Path, found: dict[str, list[dict]]) -> None:
    new = [row for name, events in found.items() for row in _rows(name, events)]
    rows = [row for row in read_events(path) if row[0] not in found]
    write_csv(path, [EVENTS, *sorted(rows + new, key=lambda row: row[0])])


def _can_follow(path: Path, name: str) -> bool:
    """Whether rows of a video can follow those there: these are whole, and none is of it."""
    if not path.is_file():
        return False
    table, cell = path.read_bytes(), name.replace('"', '""').encode()
    whole = table.startswith(f"{','.join(EVENTS)}\n".encode()) and table.endswith(b"\n")
    return whole and b"\n%b," % cell not in table and b'\n"%b",' % cell not in table


def _rows(name: str, events: list[dict]) -> list[list[str]]:
    """The rows of a video in events.csv."""
    return [
        [name, e["start_code"], e["end_code"], f"{e['start']:.3f}", f"{e['end']:.3f}", e["class"], f"{e['score']:.4f}"]
        for e in events
    ]


def write_frame_scores(path: Path, detection: Detection, frames: int, every: int) -> None:
    """Writes one CSV row per frame: frame, score, class probabilities.

    frames: number of frames. every: frames per snippet. Frames after the last whole snippet get its scores.
    """
    snippet = np.minimum(np.arange(frames) // every, len(detection.times) - 1)
    rows = np.concatenate([detection.scores[:, None], detection.probabilities], 1)[snippet]
    lines = ([i, *(f"{x:.4f}" for x in row)] for i, row in enumerate(rows))
    write_csv(path, chain([["frame", "score", *detection.classes]], lines))
