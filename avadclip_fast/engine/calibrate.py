"""Calibration on held-out videos: temperatures that turn scores into probabilities, and alarm thresholds.

Held-out training videos have video labels but no frame ground truth, so the score of a whole video is calibrated: the
mean of its top len // 16 + 1 snippet scores, as in training, against whether the video is abnormal.
"""

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..data import DataError, FeatureSet
from ..data.atomic import write_json
from ..models.avadclip import Detector
from ..models.checkpoints import CALIBRATION, model_folder

# None below 1: where the held-out videos are told apart without a mistake, the least one fits best, and would only push
# scores towards 0 and 1, where they tie in float32.
TEMPERATURES = np.geomspace(1, 16, 81)
BINS = 10
HEADS = ("align", "binary")  # 1 - p(normal), sigmoid of the anomaly logit


@dataclass(frozen=True)
class Head:
    """Calibration of one output: `temperature` divides its logits; a score >= `threshold` is an alarm.

    Raises ValueError unless the temperature is above zero, and both are finite.
    """

    temperature: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature) and math.isfinite(self.threshold)):
            raise ValueError(
                f"a head needs a finite temperature above zero and a finite threshold; got {self.temperature} and "
                f"{self.threshold}"
            )


@dataclass(frozen=True)
class Calibration:
    """Calibration of both outputs of a model; the default does not change scores."""

    align: Head = Head()
    binary: Head = Head()
    videos: int = 0  # held-out videos used for the fit

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / CALIBRATION, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Loads the calibration of a model or run folder; returns the default if it has none.

        Raises DataError, also if there is nothing at the path.
        """
        if not Path(path).exists():
            raise DataError(f"no model at {path}, whose calibration is wanted")
        file = (model_folder(path) or Path(path)) / CALIBRATION
        if not file.is_file():
            return cls()
        try:
            stored = json.loads(file.read_text())
            heads = {name: _head(**stored[name]) for name in HEADS}
            return cls(**heads, videos=operator.index(stored["videos"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"  # repr would print all bytes of a file that is not UTF-8
            raise DataError(f"{file} holds no calibration: {reason}; remove it, or train again") from error


def _head(temperature: float, threshold: float) -> Head:
    """The calibration of an output, as a file gives it: both numbers, and no other."""
    return Head(temperature, threshold)


def snippet_scores(head: str, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns anomaly scores (n,) in 0..1: align from class logits (n, C), binary from anomaly logits (n,)."""
    x = np.asarray(logits, np.float64) / temperature
    if head == "align":
        x = np.logaddexp.reduce(x[:, 1:], axis=1) - x[:, 0]
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def video_scores(snippets: Sequence[np.ndarray]) -> np.ndarray:
    """Returns video scores (videos,): the mean of the top n // 16 + 1 snippet scores of each video, as in L_mil."""
    return np.array([np.sort(s)[-(len(s) // 16 + 1) :].mean() for s in snippets])


def fit_calibration(logits: Mapping[str, Sequence[np.ndarray]], abnormal: np.ndarray) -> Calibration:
    """Fits the temperatures that minimize the log loss of video scores, then the thresholds that maximize their F1.

    logits: head -> one array per video, as for `snippet_scores`. abnormal: (videos,) bool.
    Raises ValueError unless there are both normal and abnormal videos.
    """
    abnormal = np.asarray(abnormal, bool)
    if abnormal.all() or not abnormal.any():
        raise ValueError("calibration needs normal and abnormal videos")
    heads = {}
    for name in HEADS:
        tried = {t: video_scores([snippet_scores(name, x, t) for x in logits[name]]) for t in TEMPERATURES.tolist()}
        best = min(tried, key=lambda t: log_loss(tried[t], abnormal))
        heads[name] = Head(best, best_threshold(tried[best], abnormal))
    return Calibration(**heads, videos=len(abnormal))


def log_loss(scores: np.ndarray, abnormal: np.ndarray) -> float:
    """Returns the mean binary cross-entropy of scores (videos,)."""
    right = np.where(abnormal, scores, 1 - scores)
    return float(-np.log(np.maximum(right, 1e-12)).mean())


def best_threshold(scores: np.ndarray, abnormal: np.ndarray) -> float:
    """Returns the threshold with the best F1, halfway between two scores, or the lowest score; of several, the middle.

    Several thresholds can share the best F1; the outermost would lie next to the score of a single video.
    """
    levels = np.unique(scores)
    cuts = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2])

    def alarms(videos: np.ndarray) -> np.ndarray:
        """How many of these scores reach each cut."""
        return len(videos) - np.searchsorted(np.sort(videos), cuts)

    f1 = 2 * alarms(scores[abnormal]) / (alarms(scores) + abnormal.sum())
    best = np.flatnonzero(f1 == f1.max())
    return float(cuts[best[len(best) // 2]])


def reliability(scores: np.ndarray, positive: np.ndarray) -> dict:
    """Computes a reliability diagram with ten bins of equal width, and the expected calibration error.

    scores: (n,) in 0..1. positive: (n,) in 0..1, the positive share of each snippet or video.
    Returns {"ece": mean |score - share positive|, "bins": [[mean score, share positive, share of all]]}.
    """
    at = np.minimum((scores * BINS).astype(int), BINS - 1)
    count = np.bincount(at, minlength=BINS)
    used = count > 0
    score = np.bincount(at, scores, BINS)[used] / count[used]
    share = np.bincount(at, positive, BINS)[used] / count[used]
    mass = count[used] / len(scores)
    return {
        "ece": float((mass * np.abs(score - share)).sum()),
        "bins": np.stack([score, share, mass], 1).tolist(),
    }


@torch.no_grad()
def held_out_logits(model: Detector, data: FeatureSet, batch_size: int, device) -> dict[str, list[np.ndarray]]:
    """Returns the logits of both heads for every video of a held-out set, in eval mode."""
    model.eval()
    text = model.encode_text()
    logits: dict[str, list[np.ndarray]] = {name: [] for name in HEADS}
    for index in torch.arange(len(data)).split(batch_size):
        batch = data.batch(index).to(device)
        out = model.infer(*model.inputs(batch), lengths=batch.lengths, text_features=text)
        for name, x in zip(HEADS, (out.class_logits, out.anomaly_logits), strict=True):
            rows = x.float().cpu().numpy()
            logits[name] += [row[:n] for row, n in zip(rows, batch.lengths.tolist(), strict=True)]
    return logits


def has_both_kinds(data: FeatureSet) -> bool:
    """Whether a set has both normal and abnormal videos, as calibration requires."""
    return len(np.unique(_abnormal(data))) == 2


def calibrate(model: Detector, held_out: FeatureSet, batch_size: int, device) -> Calibration:
    """Calibrates a model on a held-out set. Raises ValueError unless it has both normal and abnormal videos."""
    fitted = fit_calibration(held_out_logits(model, held_out, batch_size, device), _abnormal(held_out))
    return replace(fitted, videos=held_out.videos())


def _abnormal(data: FeatureSet) -> np.ndarray:
    rows = slice(None) if data.index is None else data.index
    return (data.labels[rows, 0] == 0).cpu().numpy()
