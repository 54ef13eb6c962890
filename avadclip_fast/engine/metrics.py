"""Frame-level AP and ROC-AUC, and detection mAP, computed on snippets with exact frame-level results.

All `frames_per_snippet` frames of a snippet share its score, so scores are not repeated per frame: frames enter as
weights (AP, AUC, top means) and as a factor on positions (proposals).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..data.errors import printable

IOUS = (0.1, 0.2, 0.3, 0.4, 0.5)
THRESHOLD, TOP_WEIGHT, TOP_DIVISOR = 0.6, 0.7, 16  # of proposals, see `detection_map`
Spans = Sequence[Sequence[tuple[int, int, int]]]  # per video: (first frame, one past the last, class index)


def frame_ap(scores: np.ndarray, truth: np.ndarray, frames_per_snippet: int = 1) -> float:
    """Returns the average precision over frames, as a fraction.

        AP = sum_i (R_i - R_{i-1}) P_i over the distinct scores in descending order      (scikit-learn's)

    scores: (n,), one per snippet; truth: (n * frames_per_snippet,) of 0 and 1
    Returns nan if the truth has only one class. Raises ValueError on mismatched lengths, other truth values, or
    non-finite scores.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1:
        raise ValueError(f"scores must be one a snippet, [n], got shape {list(scores.shape)}")
    positives = positive_frames(truth, len(scores), frames_per_snippet)  # [n]
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    return _weighted_metric("ap", scores, positives, frames_per_snippet)


def _weighted_metric(metric: str, scores: np.ndarray, positives: np.ndarray, frames_per_snippet: int) -> float:
    """Computes frame-level "ap" or "auc" from snippet scores [n] and the number of positive frames per snippet [n].

    Frames of a snippet are tied, so a snippet is one positive of weight `positives` and one negative with the rest.
    """
    # imported late: it takes as long as the rest of a command's start
    from sklearn.metrics import average_precision_score, roc_auc_score

    function = {"ap": average_precision_score, "auc": roc_auc_score}[metric]
    negatives = frames_per_snippet - positives
    if not positives.any() or not negatives.any():
        return math.nan
    label = np.repeat([True, False], len(scores))
    weight = np.concatenate([positives, negatives]).astype(np.float64)
    kept = weight > 0
    return float(function(label[kept], np.tile(scores, 2)[kept], sample_weight=weight[kept]))


def positive_frames(truth, snippets: int, frames_per_snippet: int) -> np.ndarray:
    """Returns the number of positive frames in each snippet, [snippets] int64."""
    truth = np.asarray(truth)
    frames_per_snippet = _whole(frames_per_snippet)
    if truth.shape != (snippets * frames_per_snippet,):
        raise ValueError(
            f"the truth has {truth.size} frames (shape {list(truth.shape)}), but the scores make {snippets} snippets x "
            f"{frames_per_snippet} = {snippets * frames_per_snippet} frames; check --frames-per-snippet"
        )
    positive = truth == 1
    if not (positive | (truth == 0)).all():
        raise ValueError("the frame truth must be of 0 and 1 alone")
    return positive.reshape(snippets, frames_per_snippet).sum(1, dtype=np.int64)


def _whole(frames_per_snippet: Any) -> int:
    """Checks it, and returns it as Python's integer, which JSON has a form of."""
    if not isinstance(frames_per_snippet, Integral) or frames_per_snippet < 1:
        raise ValueError(f"frames_per_snippet must be a whole number of at least 1, got {frames_per_snippet!r}")
    return int(frames_per_snippet)


@dataclass(frozen=True)
class DetectionResult:
    """Detection mAP in percent, as in the papers."""

    ious: tuple[float, ...]  # [I]
    map_at_iou: np.ndarray  # [I] mean over the classes
    average: float  # mean of map_at_iou, AVG in the papers
    per_class: np.ndarray  # [I, C], 0 for a class without truth
    truths: np.ndarray  # [C] int, number of ground-truth spans


def detection_map(
    scores: Sequence[np.ndarray],
    spans: Spans,
    frames_per_snippet: int = 16,
    ious: Sequence[float] = IOUS,
) -> DetectionResult:
    """Mean average precision of temporal detection at several IoUs.

        proposals of class c in video b: the runs of >= 2 frames where s > max(s) - 0.6 (max(s) - min(s))
        score of a run = max of s in it + 0.7 * mean of the video's top n // 16 of s
        AP_c = sum over hits of (hits so far / proposals so far) / truths,    mAP = 100 * mean_c AP_c

    where s holds the video's n = n_b * frames_per_snippet frame scores of c. Proposals of all videos are visited in
    descending order of score. A proposal is a hit if, among the unmatched truths of its class and video, the one with
    the highest IoU reaches `iou`; that truth is then matched. IoU counts frames, with exclusive ends. A truth may
    extend beyond the scored frames; its full length counts.
    Source: the evaluator of VadCLIP (Wu et al., AAAI 2024), after W-TALC (Paul et al., ECCV 2018), used by AVadCLIP.

    scores: per video (n_b, C), softmax of the class logits; spans: per video (start, end, class) in frames
    Returns a `DetectionResult`. Raises ValueError on invalid shapes, classes or IoUs and on non-finite scores.

    As in the official code, a class without truth has AP 0 and is included (so an unlabelled normal class halves a
    two-class mAP). Constant scores, videos of fewer than 16 frames, and videos whose top mean is not positive
    produce no proposals. The official non-maximum suppression is omitted since runs over one threshold never overlap.
    Differences from the official code: sums are float64, not float32; equal scores keep the order of video and start
    (the official sort is unstable); a class without proposals has AP 0 (officially it makes the whole mAP 0).
    Deterministic. Cost: O(N log N) in snippets.
    """
    scores, classes = _check_scores(scores)
    ious = tuple(float(iou) for iou in ious)
    if not ious or not all(0 < iou <= 1 for iou in ious):
        raise ValueError(f"ious must be in (0, 1], got {ious}")
    frames_per_snippet = _whole(frames_per_snippet)
    truths = _check_spans(spans, len(scores), classes)  # [S, 4]: video, start, end, class

    proposals = [_proposals(p, frames_per_snippet) for p in scores]
    video = np.repeat(np.arange(len(scores)), [len(columns[0]) for columns in proposals])
    klass, start, end, score = (np.concatenate(column) for column in zip(*proposals, strict=True))

    per_class = np.zeros((len(ious), classes))
    for c in range(classes):
        own = np.flatnonzero(klass == c)
        own = own[np.argsort(-score[own], kind="stable")]
        hits = _match(video[own], start[own], end[own], truths[truths[:, 3] == c, :3], ious)  # [I, P]
        precision = np.cumsum(hits, 1) / np.arange(1, len(own) + 1)
        per_class[:, c] = 100 * (precision * hits).sum(1) / max(1, (truths[:, 3] == c).sum())
    map_at_iou = per_class.mean(1)
    count = np.bincount(truths[:, 3], minlength=classes)
    return DetectionResult(ious, map_at_iou, float(map_at_iou.mean()), per_class, count)


def _proposals(scores: np.ndarray, frames_per_snippet: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns class, start, end (in frames) and score, each [P], of one video's runs; scores [n, C].

    Runs are sorted by class and start.
    """
    values = scores.T.astype(np.float64)  # [C, n]
    n = values.shape[1]
    top = n * frames_per_snippet // TOP_DIVISOR  # frames in the top mean
    weight = np.clip(top - frames_per_snippet * np.arange(n), 0, frames_per_snippet)  # [n] frames taken by rank
    top_mean = (-np.sort(-values, 1) * weight).sum(1) / max(1, top)  # [C]; 0 where top is 0

    low, high = values.min(1), values.max(1)
    above = values > (high - THRESHOLD * (high - low))[:, None]
    above &= top_mean[:, None] > 0
    klass, edge = np.nonzero(np.diff(above, axis=1, prepend=False, append=False))  # alternating starts and ends
    klass, start, end = klass[::2], edge[::2], edge[1::2]

    row = klass * (n + 1)  # with a spare column, so that an end is a valid index
    bounds = np.stack([row + start, row + end], 1).ravel()
    peak = np.maximum.reduceat(np.pad(values, ((0, 0), (0, 1))).ravel(), bounds)[::2] if len(klass) else np.empty(0)
    keep = (end - start) * frames_per_snippet >= 2
    score = peak + TOP_WEIGHT * top_mean[klass]
    return klass[keep], start[keep] * frames_per_snippet, end[keep] * frames_per_snippet, score[keep]


def _match(
    video: np.ndarray, start: np.ndarray, end: np.ndarray, truths: np.ndarray, ious: tuple[float, ...]
) -> np.ndarray:
    """Returns which proposals hit, [I, P] bool. Proposals [P] in descending score; truths [S, 3]: video, start, end."""
    hits = np.zeros((len(ious), len(video)), bool)
    proposals = _by_video(video)
    for b, there in _by_video(truths[:, 0]).items():
        if (own := proposals.get(b)) is None:  # proposals of the video, in descending score
            continue
        _, first, last = truths[there].T
        inter = np.minimum(end[own, None], last) - np.maximum(start[own, None], first)
        inter = np.maximum(inter, 0)
        iou = inter / ((end - start)[own, None] + (last - first) - inter)  # [own, truths]
        for i, least in enumerate(ious):
            free = iou * (iou >= least)
            for p in np.flatnonzero(free.any(1)):
                best = free[p].argmax()  # the first of ties
                if free[p, best] > 0:
                    hits[i, own[p]] = True
                    free[:, best] = 0
    return hits


def _by_video(video: np.ndarray) -> dict[int, np.ndarray]:
    """Returns which elements of video [S] are of each, in order: looking for every video's would be quadratic."""
    order = np.argsort(video, kind="stable")
    videos, starts = np.unique(video[order], return_index=True)
    return dict(zip(videos.tolist(), np.split(order, starts[1:]), strict=True)) if len(videos) else {}


def _check_scores(scores: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    scores = [np.asarray(p) for p in scores]
    if not scores:
        raise ValueError("no videos to score")
    for b, p in enumerate(scores):
        if p.ndim != 2 or 0 in p.shape or p.shape[1] != scores[0].shape[1]:
            raise ValueError(f"video {b}: scores must be [snippets, classes] like video 0, got {list(p.shape)}")
        if not np.isfinite(p).all():
            raise ValueError(f"video {b}: scores must be finite")
    return scores, scores[0].shape[1]


def _check_spans(spans: Spans, videos: int, classes: int) -> np.ndarray:
    """Validates spans and returns them as [S, 4] int64: video, start, end, class."""
    if len(spans) != videos:
        raise ValueError(f"spans of {len(spans)} videos, scores of {videos}")
    rows = [(b, *span) for b, own in enumerate(spans) for span in own]
    for b, *span in rows:
        numbers = len(span) == 3 and all(map(_is_whole, span))
        if not numbers or not 0 <= span[0] < span[1] or not 0 <= span[2] < classes:
            wanted = f"(start, end, class < {classes}) in whole frames, with 0 <= start < end"
            raise ValueError(f"video {b}: a span is {wanted}, got {span}")
    return np.array(rows, np.int64).reshape(-1, 4)


def _is_whole(number: Any) -> bool:
    """Whether a number of a span is one, and not a code, as in `data.Span`, nor a part of a second."""
    return isinstance(number, Real) and float(number).is_integer()


def evaluate_scores(
    anomaly: Sequence[np.ndarray],
    class_probabilities: Sequence[np.ndarray],
    truth: np.ndarray,
    spans: Spans | None = None,
    class_names: Sequence[str] | None = None,
    frames_per_snippet: int = 16,
) -> dict:
    """Computes all metrics of one model's scores, ready for JSON (undefined values are None).

    anomaly: per video (n_b,), sigmoid(logits1); class_probabilities: per video (n_b, C), softmax(logits2), class 0
    normal; truth: (sum of n_b * frames_per_snippet,) of 0 and 1, videos in order; spans: see `detection_map`

    Returns counts and, as fractions unless stated otherwise,
        align, binary   ap, auc over all frames; abnormal_ap, abnormal_auc over videos with a positive frame;
                        align scores 1 - p[0] (the AP in papers), binary scores sigmoid(logits1)
        class_ap        per class c, if spans are given: AP of p[c] against the frames inside spans of c, over videos
                        with such a span (None if the spans cover all their frames, as for normal videos)
        detection       if spans are given: the result of `detection_map`, in percent
    Raises ValueError on lengths or shapes that do not match, such as a truth of the wrong length, and on logits.
    """
    frames_per_snippet = _whole(frames_per_snippet)
    class_probabilities, classes = _check_scores(class_probabilities)
    anomaly = [np.asarray(p) for p in anomaly]
    lengths = np.array([len(p) for p in class_probabilities])
    if [p.shape for p in anomaly] != [(n,) for n in lengths]:
        raise ValueError("anomaly and class_probabilities must be of the same videos, [n_b] and [n_b, C]")
    names = [str(name) for name in (range(classes) if class_names is None else class_names)]
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(f"expected {classes} distinct class names, got {names}")

    positives = positive_frames(truth, lengths.sum(), frames_per_snippet)  # [N]
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])  # [B] first snippet of each video
    abnormal = np.add.reduceat(positives, first) > 0  # [B]
    in_abnormal = np.repeat(abnormal, lengths)  # [N]
    probabilities = np.concatenate(class_probabilities)  # [N, C]
    if probabilities.min() < -1e-3 or probabilities.max() > 1 + 1e-3:  # by more than rounding
        raise ValueError("class_probabilities must lie in 0..1: give softmax(logits), not logits")
    branches = {"align": 1 - probabilities[:, 0], "binary": np.concatenate(anomaly)}
    if not np.isfinite(branches["binary"]).all():
        raise ValueError("anomaly scores must be finite")

    result: dict[str, Any] = {
        "videos": len(lengths),
        "abnormal_videos": int(abnormal.sum()),
        "snippets": int(lengths.sum()),
        "frames": int(lengths.sum()) * frames_per_snippet,
        "positive_frames": int(positives.sum()),
        "frames_per_snippet": frames_per_snippet,
    }
    for branch, score in branches.items():
        result[branch] = {
            prefix + metric: _or_none(_weighted_metric(metric, score[chosen], positives[chosen], frames_per_snippet))
            for prefix, chosen in (("", slice(None)), ("abnormal_", in_abnormal))
            for metric in ("ap", "auc")
        }
    if spans is None:
        return result

    rows = _check_spans(spans, len(lengths), classes)
    result["class_ap"] = {
        name: _or_none(_class_ap(probabilities[:, c], rows[rows[:, 3] == c, :3], first, lengths, frames_per_snippet))
        for c, name in enumerate(names)
    }
    detection = detection_map(class_probabilities, spans, frames_per_snippet)
    result["detection"] = {
        "iou": list(detection.ious),
        "map": detection.map_at_iou.tolist(),
        "average": detection.average,
        "per_class": dict(zip(names, detection.per_class.T.tolist(), strict=True)),
        "truths": dict(zip(names, detection.truths.tolist(), strict=True)),
    }
    return result


def _class_ap(scores: np.ndarray, spans: np.ndarray, first: np.ndarray, lengths: np.ndarray, frames: int) -> float:
    """Returns the AP of one class over the videos with a span of it. scores: [N]; spans: [S, 3] (video, start, end)."""
    parts = []
    for b, there in _by_video(spans[:, 0]).items():
        inside = np.zeros(lengths[b] * frames, np.int64)
        for _, start, end in spans[there]:
            inside[start:end] = 1
        parts.append((scores[first[b] : first[b] + lengths[b]], inside.reshape(-1, frames).sum(1)))
    if not parts:
        return math.nan
    chosen, positives = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _weighted_metric("ap", chosen, positives, frames)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def format_table(result: dict) -> str:
    """Formats the result of `evaluate_scores` as tables of up to 80 columns, in percent."""

    def cells(values, width: int = 9) -> str:
        return "".join(f"{'-' if v is None else format(v, '.2f'):>{width}}" for v in values)

    lines = [
        f"{result['videos']} videos ({result['abnormal_videos']} abnormal), {result['frames']:,} frames "
        f"({result['positive_frames']:,} positive), {result['frames_per_snippet']} a snippet",
        "",
        f"{'frame level, %':<16}" + "".join(f"{head:>9}" for head in ("AP", "AUC", "Ano-AP", "Ano-AUC")),
    ]
    for branch in ("align", "binary"):
        values = [result[branch][key] for key in ("ap", "auc", "abnormal_ap", "abnormal_auc")]
        lines.append(f"{branch:<16}" + cells(v if v is None else 100 * v for v in values))
    if "detection" not in result:
        return "\n".join(lines)

    detection = result["detection"]
    heads = "".join(f"{f'@{iou:g}':>7}" for iou in detection["iou"])
    lines += ["", f"{'detection, %':<16}{heads}{'AVG':>8}{'truths':>8}{'frame AP':>10}"]
    for name, row in detection["per_class"].items():
        ap, shown = result["class_ap"][name], printable(name)
        shown = shown if len(shown) <= 15 else shown[:14] + "…"
        average, truths = cells([sum(row) / len(row)], 8), f"{detection['truths'][name]:>8}"
        lines.append(f"{shown:<16}" + cells(row, 7) + average + truths + cells([ap if ap is None else 100 * ap], 10))
    lines.append(f"{'mean':<16}" + cells(detection["map"], 7) + cells([detection["average"]], 8))
    if without := [name for name, truths in detection["truths"].items() if not truths]:
        lines.append(f"the mean counts as 0 what has no span: {printable(', '.join(without))}")
    return "\n".join(lines)
