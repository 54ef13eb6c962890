"""Validation of a list and its files, reporting all problems at once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .dataset import Progress, unequal
from .errors import DataError, LabelError, shortened
from .features import load_features
from .ground_truth import read_frame_gt
from .labels import encode, is_normal
from .lists import Row, scan_list, unlike, videos


def check_list(
    path: str | Path,
    codes: dict[str, str],
    root: str | Path | None = None,
    audio: bool = True,
    width: int = 512,
    frame_gt: str | Path | None = None,
    frames_per_snippet: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Returns the problems of a list, one line each with file and line number; empty if the list is valid.

    Reads all features, since only that finds NaN.

    codes: code -> class name
    audio: whether every row must have audio
    frame_gt: frame ground truth to compare with the list, or None
    """
    try:
        rows, problems = scan_list(path, root, audio)
    except DataError as error:
        return [str(error)]
    whole = not problems  # with rows missing, the counts cannot match the ground truth
    counts: list[int | None] = []
    for row in progress(rows) if progress else rows:
        found, count = _check_row(row, codes, audio, width)
        problems += [f"{path}, line {row.line}: {problem}" for problem in found]
        counts.append(count)
    problems += [f"{path}, line {row.line}: {problem}" for row, problem in unlike(rows)]
    if frame_gt is not None:
        try:
            truth = read_frame_gt(frame_gt)
            known = [count for count in counts if count is not None]
            if whole and len(known) == len(counts):
                problems += truth_problems(path, rows, known, truth, frame_gt, frames_per_snippet, codes)
        except DataError as error:
            problems.append(str(error))
    return [*map(shortened, problems)]


def _check_row(row: Row, codes: dict[str, str], audio: bool, width: int) -> tuple[list[str], int | None]:
    """Returns the problems of a row, and its number of snippets or None if unknown."""
    problems: list[str] = []
    counts: list[int | None] = []
    try:
        encode(row.label, codes)
    except LabelError as error:
        problems.append(str(error))
    for file in [file for file in (row.visual, row.audio if audio else None) if file is not None]:
        try:
            counts.append(len(load_features(file, width)))
        except DataError as error:
            problems.append(str(error))
            counts.append(None)
    known = [count for count in counts if count is not None]
    if len(known) == len(counts) and len(set(known)) > 1:
        problems.append(unequal(row, *known))
    return problems, counts[0]


def truth_problems(
    path: str | Path,
    rows: Sequence[Row],
    counts: Sequence[int],
    truth: np.ndarray,
    frame_gt: str | Path,
    frames: int,
    codes: dict[str, str],
) -> list[str]:
    """Returns a problem for each row whose label differs from the frame ground truth.

    counts: snippets of each row; truth: read from `frame_gt`, `frames` frames per snippet
    Raises DataError if its number of frames is not the list's.
    """
    snippets = sum(counts)
    if len(truth) != snippets * frames:
        problem = (
            f"{frame_gt}: {len(truth)} frames, but {path} has {snippets} snippets x {frames} = {snippets * frames}; "
        )
        if len(videos(rows)) < len(rows):
            remedy = "a test list holds one crop of each video (XD-Violence: the `__5` files)"
        elif len(truth) % snippets == 0:
            remedy = f"it would fit --frames-per-snippet {len(truth) // snippets}"
        else:
            remedy = "are they of the same videos, cut into the same snippets?"
        raise DataError(problem + remedy)
    problems = []
    ends = np.cumsum(counts) * frames
    for row, end, count in zip(rows, ends, counts, strict=True):
        positive = int(truth[end - count * frames : end].sum())
        try:
            normal = is_normal(row.label, codes)
        except LabelError:  # already reported
            continue
        if normal == (positive > 0):
            problems.append(
                f"{path}, line {row.line}: labelled {row.label}, but {positive} frames are anomalous in {frame_gt}; "
                "is the list in the order of the ground truth?"
            )
    return problems
