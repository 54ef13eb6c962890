"""Video lists: CSV files with the columns path, audio_path and label."""

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .atomic import write_csv
from .errors import DataError
from .labels import codes_in, is_normal
from .packed import PACKED

_SEPARATORS = {";": "semicolons", "\t": "tabs"}  # which spreadsheets write in the place of commas
NAME_MAX = 255  # characters of a file's name, on any system
_CROP = re.compile(r"(?<=[^.])__\d$")


@dataclass(frozen=True)
class Row:
    """One line of a list: the feature files of a video (or one of its crops) and its label."""

    visual: Path
    audio: Path | None
    label: str
    line: int  # in the list file, from 1, including the header


def read_list(path: str | Path, root: str | Path | None = None, audio: bool = True) -> list[Row]:
    """Reads the rows of a list in order, without opening the feature files.

    root: base of relative paths, which no path may leave; the list's folder by default
    audio: whether every row must have an audio_path; if False, the column or its cells may be missing
    Raises DataError if the file is missing, not UTF-8 CSV or without rows, or has a missing column, an empty cell, a
    duplicate video, or a path that is outside the root or holds NUL.
    """
    rows, problems = scan_list(path, root, audio)
    if problems:
        more = f" (and {len(problems) - 1} more; `avadclip-fast check` shows all)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    return rows


def check_rows(rows: object) -> None:
    """Raises DataError if the list's path was given in the place of its rows."""
    if isinstance(rows, str | Path):
        raise DataError(f"{rows}: the rows of the list are wanted, not its path; give read_list({str(rows)!r})")


def scan_list(path: str | Path, root: str | Path | None, audio: bool) -> tuple[list[Row], list[str]]:
    """Returns the valid rows of a list, and a message for each invalid one. Raises DataError if unreadable or empty."""
    path = Path(path)
    root = path.parent if root is None else Path(root)
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}  # feature file -> line
    wanted = ["path", "audio_path", "label"] if audio else ["path", "label"]
    for line, cells in read_cells(path, wanted, problems):
        file = os.path.abspath(root / cells["path"])  # one name for a/../b.npy and b.npy
        row = Row(
            root / cells["path"], root / cells["audio_path"] if cells["audio_path"] else None, cells["label"], line
        )
        if empty := [name for name in wanted if not cells[name]]:
            problems.append(f"{path}, line {line}: {' and '.join(empty)} empty; fill in, or remove the line")
        elif wrong := misplaced(root, cells["path"], cells["audio_path"]):
            problems.append(f"{path}, line {line}: {wrong}")
        elif not Path(cells["path"]).name:
            problems.append(f"{path}, line {line}: {cells['path']} is a folder, not a feature file")
        elif Path(cells["path"]).stem in (".", ".."):
            problems.append(f"{path}, line {line}: {cells['path']} has no name before its suffix; rename the file")
        elif file in seen:
            problems.append(f"{path}, line {line}: {cells['path']} is on line {seen[file]} already; remove one")
        else:
            seen[file] = line
            rows.append(row)
    if not rows and not problems:
        raise DataError(f"{path}: the list is empty: nothing follows its header")
    return rows, problems


def misplaced(root: str | Path, *names: str) -> str | None:
    """Returns why paths of a list lead to no file below `root`, or None."""
    if any("\0" in name for name in names):
        return "a NUL in a path, which no file has; write the list again in UTF-8"
    if (longest := max(len(part) for name in names for part in name.split(os.sep))) > NAME_MAX:
        return f"a name of {longest} characters in a path, and files have {NAME_MAX} at most; is it a list of paths?"
    outside = [name for name in names if not is_inside(root, name)]
    return f"{outside[0]} leads out of {root}; name a --root that holds it" if outside else None


def is_inside(root: str | Path, name: str) -> bool:
    """Whether a path stays below the root. It does not resolve links: those below the root are trusted."""
    return Path(os.path.abspath(Path(root, name))).is_relative_to(os.path.abspath(root))


def read_cells(
    path: Path, expected: Sequence[str], problems: list[str] | None = None
) -> list[tuple[int, dict[str, str]]]:
    """(line number, column -> stripped text, "" if missing) of each non-blank line.

    problems: receives a message for each line left out because it has more cells than the header
    Raises DataError if the file cannot be read, one of the `expected` columns is missing, or, without `problems`, for
    such a line.
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such list") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        if str(path).endswith(PACKED):
            raise DataError(f"{path}: a packed file, for check, train and distill alone; give the list") from error
        where = f", line {reader.line_num}" if isinstance(error, csv.Error) else ""
        raise DataError(f"{path}{where}: not a CSV file in UTF-8: {error}") from error
    if not header:
        raise DataError(f"{path}: the file is empty")
    if missing := [name for name in expected if name not in header]:
        silent = "; without sound, train --student, check --no-audio" if missing == ["audio_path"] else ""
        raise DataError(
            f"{path}: no column {', '.join(missing)}: the header must be {','.join(expected)}, "
            f"found {','.join(header)}{_other_separator(header)}{silent}"
        )
    blank, found = dict.fromkeys(("path", "audio_path", "label"), ""), []
    for line, cells in lines:
        if beyond := "".join(cells[len(header) :]).strip():  # blank ones are those of spreadsheets
            wrong = (
                f"{path}, line {line}: {beyond} is beyond the {len(header)} columns of the header; join the codes of a "
                "label by -, and put a name that holds a comma in quotes"
            )
            if problems is None:
                raise DataError(wrong)
            problems.append(wrong)
        else:
            found.append((line, blank | {n: c.strip() for n, c in zip(header, cells, strict=False)}))
    return found


def _other_separator(header: Sequence[str]) -> str:
    """What to add to the error about a header, read as CSV, whose columns are not separated by commas; else ""."""
    other = next((name for sign, name in _SEPARATORS.items() if any(sign in cell for cell in header)), None)
    return f"; columns are separated by commas, not by {other}" if other else ""


def write_list(path: str | Path, rows: Sequence[Row]) -> None:
    """Writes a list atomically, with paths relative to its folder if below it; omits audio_path if no row has audio."""
    folder = Path(os.path.abspath(path)).parent

    def cell(file: Path | None) -> str:
        if file is None:
            return ""
        file = Path(os.path.abspath(file))
        return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)

    with_audio = any(row.audio is not None for row in rows)
    lines = [("path", "audio_path", "label"), *((cell(row.visual), cell(row.audio), row.label) for row in rows)]
    write_csv(path, lines if with_audio else [(visual, label) for visual, _, label in lines])


def videos(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups rows by video in order of first appearance: crops `NAME__0.npy` ... `NAME__9.npy` are one video."""
    groups: dict[Path, list[Row]] = {}
    for row in rows:
        groups.setdefault(video_of(row), []).append(row)
    return list(groups.values())


def video_of(row: Row) -> Path:
    """The video of a row: its visual file without suffix and crop number."""
    return row.visual.with_name(_CROP.sub("", row.visual.stem)) if row.visual.name else row.visual


def unlike(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """The rows whose label has other codes than the first crop of their video, each with an error message."""
    return [
        (
            row,
            f"labelled {row.label}, but {first.label} on line {first.line}, as another crop of the same video; correct "
            "one, or rename the files: a name that ends in __0 to __9 is that of a crop",
        )
        for first, *others in videos(rows)
        for row in others
        if codes_in(row.label) != codes_in(first.label)
    ]


def names_of(rows: Sequence[Row]) -> list[str]:
    """The name of each row: its visual file without suffix, with the folders that tell files of one name apart."""
    stems = Counter(row.visual.stem for row in rows)
    paths = [Path(os.path.abspath(row.visual.with_suffix(""))) for row in rows]
    same = [path.parent for path in paths if stems[path.name] > 1]
    common = os.path.commonpath(same) if same else ""
    return [path.name if stems[path.name] == 1 else str(path.relative_to(common)) for path in paths]


def split(rows: Sequence[Row], fraction: float, seed: int, codes: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """Splits rows into training and held-out rows, each in list order, deterministically.

    Holds out whole videos, the same fraction of normal and of anomalous ones, rounded; of two or more at least one, but
    never all.

    fraction: in [0, 1); codes: code -> class name, normal first
    Raises ValueError on an invalid fraction, LabelError on an invalid label, DataError on a path in place of rows.
    """
    check_rows(rows)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    rng = np.random.default_rng(int(seed) % 2**64)
    strata: dict[bool, list[list[Row]]] = {True: [], False: []}
    for video in videos(rows):
        strata[is_normal(video[0].label, codes)].append(video)
    held = set()
    for members in strata.values():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1) if fraction and members else 0
        held |= {row for i in rng.permutation(len(members))[:count] for row in members[i]}
    return [row for row in rows if row not in held], [row for row in rows if row in held]
