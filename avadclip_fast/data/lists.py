"""Lists of videos: CSV files with the columns path, audio_path and label."""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .atomic import atomic_write
from .errors import DataError
from .labels import is_normal

_CROP = re.compile(r"__\d$")


@dataclass(frozen=True)
class Row:
    """One line of a list: the feature files of a video (or of one crop of it), and its label."""

    visual: Path
    audio: Path | None
    label: str
    line: int  # in the list file, from 1, the header included


def read_list(path: str | Path, root: str | Path | None = None, audio: bool = True) -> list[Row]:
    """The rows of a list, in order; the feature files are not opened.

    root: where relative paths start, and what no path may lead out of; the list's own folder by default.
    audio: whether each row must name its sound. Without, a list may lack the column, or cells of it.
    Raises DataError: no such file, not UTF-8 CSV, missing columns, no rows, an empty cell, a video listed twice,
    a path that leads out of the root.
    """
    rows, problems = scan_list(path, root, audio)
    if problems:
        more = f" (and {len(problems) - 1} more; `avadclip-fast check` shows all)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    return rows


def scan_list(path: str | Path, root: str | Path | None = None, audio: bool = True) -> tuple[list[Row], list[str]]:
    """The good rows of a list, and a line for each bad one. Raises DataError where there is no list to speak of."""
    path = Path(path)
    root = path.parent if root is None else Path(root)
    rows, problems = [], []
    seen: dict[Path, int] = {}  # feature file -> line
    for line, cells in _cells(path, audio):
        row = Row(
            root / cells["path"], root / cells["audio_path"] if cells["audio_path"] else None, cells["label"], line
        )
        wanted = ("path", "audio_path", "label") if audio else ("path", "label")
        empty = [name for name in wanted if not cells[name]]
        if empty:
            problems.append(f"{path}, line {line}: {' and '.join(empty)} empty; fill in, or remove the line")
        elif outside := [cells[name] for name in ("path", "audio_path") if not is_inside(root, cells[name])]:
            problems.append(f"{path}, line {line}: {outside[0]} leads out of {root}; name a --root that holds it")
        elif row.visual in seen:
            problems.append(f"{path}, line {line}: {cells['path']} is on line {seen[row.visual]} already; remove one")
        else:
            seen[row.visual] = line
            rows.append(row)
    if not rows and not problems:
        raise DataError(f"{path}: the list is empty: nothing follows its header")
    return rows, problems


def is_inside(root: str | Path, name: str) -> bool:
    """Whether a path of a list stays below its root. It is judged as written: links below the root are its owner's."""
    return Path(os.path.abspath(Path(root, name))).is_relative_to(os.path.abspath(root))


def _cells(path: Path, audio: bool) -> list[tuple[int, dict[str, str]]]:
    """(line, column -> text without surrounding blanks; "" where there is none) of each line that is not blank."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the header
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such list") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {error}") from error
    expected = ["path", "audio_path", "label"] if audio else ["path", "label"]
    if missing := [name for name in expected if name not in header]:
        raise DataError(
            f"{path}: no column {', '.join(missing)}: the header must be {','.join(expected)}, found {','.join(header)}"
        )
    blank = dict.fromkeys(("path", "audio_path", "label"), "")
    return [(line, blank | {n: c.strip() for n, c in zip(header, cells, strict=False)}) for line, cells in lines]


def write_list(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes a list atomically; paths under the list's folder become relative to it. No audio at all, no column."""
    folder = Path(path).absolute().parent

    def cell(file: Path | None) -> str:
        if file is None:
            return ""
        file = Path(os.path.abspath(file))
        return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)

    with_audio = any(row.audio is not None for row in rows)
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "audio_path", "label"] if with_audio else ["path", "label"])
        for row in rows:
            writer.writerow([cell(row.visual), *([cell(row.audio)] if with_audio else []), row.label])


def videos(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by video, in order of first appearance: crops `NAME__0.npy` ... `NAME__9.npy` are one video."""
    groups: dict[Path, list[Row]] = {}
    for row in rows:
        groups.setdefault(video_of(row), []).append(row)
    return list(groups.values())


def video_of(row: Row) -> Path:
    """The video of a row: its visual file without suffix and crop."""
    return row.visual.with_name(_CROP.sub("", row.visual.stem))


def split(rows: Sequence[Row], fraction: float, seed: int, codes: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, each in list order; it depends on the arguments alone.

    Whole videos are held out, the same share of normal ones as of anomalous ones: the nearest number, but at least one
    where there are two, and never all. codes: code -> class name, the first being normal. Raises LabelError.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    rng = np.random.default_rng(seed % 2**64)
    strata: dict[bool, list[list[Row]]] = {True: [], False: []}
    for video in videos(rows):
        strata[is_normal(video[0].label, codes)].append(video)
    held = set()
    for members in strata.values():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1) if fraction and members else 0
        held |= {row for i in rng.permutation(len(members))[:count] for row in members[i]}
    return [row for row in rows if row not in held], [row for row in rows if row in held]
