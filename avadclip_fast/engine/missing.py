"""Missing sound: compares the teacher, the student, and a choice between them when some videos have no sound."""

from collections.abc import Sequence

import numpy as np

from ..data import DataError
from .calibrate import HEADS
from .evaluate import VideoScores, evaluate

CHOICES = ("teacher", "student", "automatic")
COLUMNS = (*CHOICES, "oracle")  # of the tables


def mute(videos: int, percent: float, seed: int) -> np.ndarray:
    """Returns which videos lose their sound, (videos,) bool: a random `percent` of them.

    With the same seed, a larger share includes a smaller one. Raises DataError unless percent is in 0..100.
    """
    if not 0 <= percent <= 100:
        raise DataError(f"a share of videos without sound is 0 to 100 percent, got {percent:g}")
    chosen = np.random.default_rng(seed % 2**64).permutation(videos)[: round(videos * percent / 100)]
    return np.isin(np.arange(videos), chosen)


def check_kinds(truth: np.ndarray) -> None:
    """Raises DataError if the frames of the ground truth are all normal, or all anomalous."""
    if not 0 < np.count_nonzero(truth) < len(truth):
        raise DataError("the frames of the ground truth are all of one kind, of which there is no AP to compare")


def missing_sound(
    hearing: Sequence[VideoScores],
    deaf: Sequence[VideoScores],
    student: Sequence[VideoScores],
    truth: np.ndarray,
    classes: list[str],
    frames_per_snippet: int,
    percents: Sequence[float],
    seed: int,
) -> list[dict]:
    """Returns a record per share: {"missing": percent, "teacher" | "student" | "automatic" | "oracle": {branch: AP}}.

    hearing, deaf: the teacher's scores of all videos with and without their sound; student: the student's scores.
    "teacher" scores every video with the teacher; "automatic" uses the student for videos without sound; "oracle" is
    the best of the three by the ground truth. Raises DataError on invalid shares or ground truth.
    """
    check_kinds(truth)
    records = []
    for percent in percents:
        silent = mute(len(student), percent, seed)
        parts = {
            "teacher": [d if s else h for h, d, s in zip(hearing, deaf, silent, strict=True)],
            "student": student,
            "automatic": [o if s else h for h, o, s in zip(hearing, student, silent, strict=True)],
        }
        record: dict = {"missing": percent}
        for name, scores in parts.items():
            result = evaluate(scores, truth, classes, frames_per_snippet)
            record[name] = {branch: result[branch]["ap"] for branch in HEADS}
        record["oracle"] = {branch: max(record[name][branch] for name in CHOICES) for branch in HEADS}
        records.append(record)
    return records


def format_missing(records: Sequence[dict]) -> str:
    """Formats the records as a table of frame AP in percent, of 80 columns."""
    lines = [f"{'frame AP, %':<16}" + "".join(f"{name:>16}" for name in COLUMNS)]
    lines.append(f"{'without sound':<16}" + f"{'align':>9}{'binary':>7}" * 4)
    for record in records:
        cells = (record[name] for name in COLUMNS)
        shown = "".join(f"{100 * cell['align']:>9.2f}{100 * cell['binary']:>7.2f}" for cell in cells)
        lines.append(f"{format(record['missing'], 'g') + ' %':<16}" + shown)
    return "\n".join(lines)
