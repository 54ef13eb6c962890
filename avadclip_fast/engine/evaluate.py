"""Evaluation: scores whole videos chunk by chunk, and computes metrics of the scores."""

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import DataError, Row, TestVideo, snippet_count, test_videos
from ..data.check import truth_problems
from ..data.errors import printable
from ..data.lists import check_rows, names_of
from ..models import AVadCLIP, AVadCLIPStudent, CheckpointError, TextWeightsError
from ..models.avadclip import Detector
from ..models.checkpoints import CONFIG, MISFITS, MODEL, kind_of, model_folder, read_official
from ..ops._padding import at_least_float32
from . import distributed
from .calibrate import Calibration, reliability
from .graph import StepGraph, recordable
from .metrics import evaluate_scores, positive_frames
from .progress import bar
from .state import LOGS, STATE

KINDS: dict[str, type[Detector]] = {"AVadCLIP": AVadCLIP, "AVadCLIPStudent": AVadCLIPStudent}
WIDEST = 1 << 14  # snippets in a window: its attention matrix takes a gigabyte per video at this size
PACKED_CHUNKS = 16  # chunks of 256 rows: enough to fill a CPU, and 50 MB of activations per layer

Item = TypeVar("Item")
_log = logging.getLogger("avadclip_fast")


class VideoScores(NamedTuple):
    """A model's scores of one video of n snippets."""

    name: str
    anomaly: np.ndarray  # (n,) sigmoid(anomaly logits / temperature)
    probabilities: np.ndarray  # (n, C) softmax(class logits / temperature)


def load_model(path: str | Path, classes: list[str] | None = None, window: int | None = None) -> Detector:
    """Loads a teacher or student from a model folder, a run folder, or an official .pth; its contents decide.

    classes, window: class names and window of an official checkpoint, which does not store them. A folder's model keeps
    its own classes whatever is given; its `from_pretrained(folder, classes=...)` takes others.
    Raises CheckpointError, also if a folder's model has another window.
    """
    path = Path(path)
    folder = model_folder(path)
    if path.is_dir() and folder is None:
        raise CheckpointError(_no_model_in(path))
    if not path.exists():
        raise CheckpointError(f"no model at {path}")
    where = path if folder is None else folder / CONFIG
    try:
        if folder is not None:
            kind = json.loads(where.read_text())["model"]
            if kind not in KINDS:
                raise CheckpointError(f"{where}: {kind!r} is no class of this library; its from_pretrained loads it")
            model = KINDS[kind].from_pretrained(folder)
        else:
            official = KINDS[kind_of(read_official(path))]
            model = official.from_official(path, classes, **({} if window is None else {"window": window}))
    except (CheckpointError, TextWeightsError):
        raise
    except MISFITS as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"{where} does not describe a model of this library: {reason}") from error
    if (wide := model.settings()["window"]) > WIDEST:
        raise CheckpointError(f"{where}: a window of {wide} snippets; up to {WIDEST} can be computed")
    if window not in (None, wide):
        raise CheckpointError(f"{path}: --window is of an official .pth; this model has {wide}: leave --window out")
    return model


def _no_model_in(folder: Path) -> str:
    """Says why a folder is not one of a model, and what may be meant."""
    inner = sorted(f for f in folder.iterdir() if model_folder(f))
    if (folder / STATE).is_file() or ((folder / LOGS).is_dir() and not inner):
        return f"{folder} holds no model yet: its training has not ended; go on with --resume"
    hint = f"; did you mean {' or '.join(map(str, inner[:5]))}?" if inner else ""
    return f"{folder} holds no model: neither {CONFIG} nor {MODEL}/{CONFIG} is there{hint}"


def score_videos(
    model: Detector,
    videos: Iterable[TestVideo],
    device: str | torch.device = "cpu",
    *,
    silent: bool = False,
    calibration: Calibration | None = None,
    total: int | None = None,
    progress: bool = True,
) -> list[VideoScores]:
    """Returns the `stream_scores` of all videos, with a progress bar."""
    scores = stream_scores(model, videos, device, silent=silent, calibration=calibration)
    return list(bar(scores, total=total, desc="scoring", unit="video", shown=progress))


def check_truth(
    path: Path, truth: np.ndarray, list_: Path, rows: Sequence[Row], width: int, frames: int, codes: dict[str, str]
) -> None:
    """Checks that the frame ground truth read from `path` is as long as a list's features, by their headers.

    Warns if labels of rows contradict it, as in another order. Raises DataError. frames: per snippet
    """
    counts = [snippet_count(row.visual, width) for row in rows]
    problems = truth_problems(list_, rows, counts, truth, path, frames, codes)
    if problems and os.environ.get("RANK", "0") == "0":  # one of torchrun's processes tells it
        more = f" ({len(problems) - 1} other rows differ too)" if len(problems) > 1 else ""
        _log.warning("warning: %s%s", printable(problems[0]), more)


def check_spans(path: Path, spans: Sequence, videos: int, classes: list[str], codes: dict[str, str]) -> None:
    """Checks the number of `videos` and the classes of the spans read from `path`. Raises DataError."""
    if len(spans) != videos:
        raise DataError(f"{path}: spans of {len(spans)} videos, the list has {videos}; are they of the same set?")
    try:
        _class_spans(spans, classes, codes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def score_rows(
    model: Detector,
    rows: Sequence[Row],
    device: str | torch.device = "cpu",
    *,
    audio: bool = True,
    silent: bool = False,
    calibration: Calibration | None = None,
    progress: bool = True,
) -> list[VideoScores]:
    """Returns the scores of a test list, in its order. audio: whether to read the audio features.

    In a distributed run (`distributed.joined`) the ranks share the list, and each returns all scores. Each rank scores
    whole packs, the same ones as in a single process, so that the scores are bitwise equal. Raises DataError.
    """
    check_rows(rows)
    rank, world = distributed.rank(), distributed.world()
    own = list(range(len(rows)))
    if world > 1:
        snippets = [snippet_count(row.visual, model.width) for row in rows]  # reads only the headers
        packs = list(_packs(own, lambda i: -(-snippets[i] // model.length), PACKED_CHUNKS))
        own = [i for pack in packs[rank::world] for i in pack]
    videos = test_videos([rows[i] for i in own], model.length, model.width, audio, model.motion)
    scores = score_videos(
        model, videos, device, silent=silent, calibration=calibration, total=len(own), progress=progress and rank == 0
    )
    names = names_of(rows)
    if world == 1:
        return [video._replace(name=name) for video, name in zip(scores, names, strict=True)]
    starts = np.cumsum([0, *snippets])
    merged = torch.zeros(int(starts[-1]), 1 + len(model.classes))
    for i, video in zip(own, scores, strict=True):
        merged[starts[i] : starts[i + 1]] = torch.from_numpy(np.column_stack([video.anomaly, video.probabilities]))
    parts = np.split(distributed.total(merged).numpy(), starts[1:-1])  # one rank fills a row; others hold zero
    return [VideoScores(name, part[:, 0], part[:, 1:]) for name, part in zip(names, parts, strict=True)]


@torch.no_grad()
def stream_scores(
    model: Detector,
    videos: Iterable[TestVideo],
    device: str | torch.device = "cpu",
    *,
    silent: bool = False,
    calibration: Calibration | None = None,
    text: Tensor | None = None,
    chunks: int = PACKED_CHUNKS,
) -> Iterator[VideoScores]:
    """Yields the scores of every snippet of every video, in order.

    Each chunk is scored independently. Videos are packed until they have `chunks` chunks together, so that short videos
    fill a batch. At most `chunks` chunks are computed in one pass, so that a long video needs little more memory than
    its features. On a GPU all passes have one shape, and from the second on are replays of one CUDA graph. Features are
    cast to the model's dtype; probabilities are float32 (float64 for a float64 model).

    silent: withhold the audio from a teacher. calibration: its temperatures divide the logits. text: the result of
    `model.encode_text` if already computed.
    Raises DataError if the model takes audio and a video has none.
    """
    model.to(device).eval()
    dtype = model.classifier.weight.dtype
    text = model.encode_text() if text is None else text.to(device, dtype)
    calibration = calibration or Calibration()
    read = [name for name in model.streams() if name != "audio" or not silent]

    def scored(lengths: Tensor, *streams: Tensor) -> Tensor:
        absent = [None] * (len(model.streams()) - len(streams))
        given = (x.to(dtype) for x in streams)
        out = model.infer(*given, *absent, lengths=lengths, text_features=text)
        anomaly = (at_least_float32(out.anomaly_logits) / calibration.binary.temperature).sigmoid()
        classes = (at_least_float32(out.class_logits) / calibration.align.temperature).softmax(-1)
        return torch.cat([anomaly[..., None], classes], -1)  # [B, T, 1 + C]

    graph, passes = StepGraph(scored) if recordable(torch.device(device)) else None, itertools.count()
    for pack in _packs(videos, lambda video: len(video.lengths), chunks):
        if "audio" in read and (deaf := [video.name for video in pack if video.audio is None]):
            raise DataError(f"{deaf[0]}: the model hears, but the list gives no sound; score without it by --silent")
        lengths = np.concatenate([video.lengths for video in pack])
        # in masked mode the rows past the longest chunk do not affect the scores
        rows = int(lengths.max()) if model.padding == "masked" else None
        inputs = [lengths, *(np.concatenate([getattr(video, name)[:, :rows] for video in pack]) for name in read)]
        parts = []
        for start in range(0, len(lengths), chunks):
            now = slice(start, start + chunks)
            given = [torch.as_tensor(x[now], device=device) for x in inputs]
            if graph is None:
                found = scored(*given)
            else:
                found = _full_pass(graph, given, chunks, pack[0].visual.shape[1], first=next(passes) == 0)
            valid = np.arange(found.shape[1]) < lengths[now, None]
            parts.append(found.cpu().numpy()[valid])
        scores = np.concatenate(parts)
        anomaly, probabilities = scores[:, 0], scores[:, 1:]
        ends = np.cumsum([video.snippets for video in pack])[:-1]
        for video, *of in zip(pack, np.split(anomaly, ends), np.split(probabilities, ends), strict=True):
            yield VideoScores(video.name, *of)


def _full_pass(graph: StepGraph, given: Sequence[Tensor], chunks: int, rows: int, first: bool) -> Tensor:
    """The graph's function in the shape of a full pass: for others a GPU picks other kernels, whose last bits differ.

    given: lengths (b,) and streams (b, t, D), b <= chunks and t <= rows. first: whether no pass came before, when it
    is called as it is: a recording takes as long as some passes, of which there may be many more from the second on.
    Returns (b, t, 1 + C).
    """
    padded = [_filled(x, chunks, rows) for x in given]
    if first:
        found = graph.function(*padded)
    else:
        graph.record(*padded)
        found = graph(*padded)
    return found[: len(given[0]), : given[1].shape[1]]


def _filled(x: Tensor, chunks: int, rows: int) -> Tensor:
    """Features (B, T, D) or lengths (B,) filled up to (chunks, rows, D) with zeros, or (chunks,) with ones."""
    if x.ndim == 1:
        return F.pad(x, (0, chunks - len(x)), value=1)
    return F.pad(x, (0, 0, 0, rows - x.shape[1], 0, chunks - len(x)))


def _packs(items: Iterable[Item], size: Callable[[Item], int], full: int) -> Iterator[list[Item]]:
    """Groups consecutive items until the sum of their sizes reaches `full`."""
    pack, filled = [], 0
    for item in items:
        pack.append(item)
        filled += size(item)
        if filled >= full:
            yield pack
            pack, filled = [], 0
    if pack:
        yield pack


def evaluate(
    scores: Sequence[VideoScores],
    truth: np.ndarray,
    classes: list[str],
    frames_per_snippet: int,
    spans: list | None = None,
    codes: dict[str, str] | None = None,
) -> dict:
    """Runs `evaluate_scores` on scored videos.

    spans: per video, a list of (start, end, code); codes: label code -> class name.
    Raises DataError if the ground truth does not match the videos.
    """
    if spans is not None:
        spans = _class_spans(spans, classes, codes or {})
    try:
        return evaluate_scores(
            [s.anomaly for s in scores],
            [s.probabilities for s in scores],
            truth,
            spans,
            class_names=classes,
            frames_per_snippet=frames_per_snippet,
        )
    except ValueError as error:
        raise DataError(str(error)) from error


def at_threshold(
    scores: list[VideoScores], truth: np.ndarray, frames_per_snippet: int, calibration: Calibration
) -> dict:
    """Computes precision, recall and F1 at the calibrated threshold, and the calibration error, over frames.

    Returns {"align" | "binary": {threshold, temperature, precision, recall, f1, ece, bins}}, see `reliability`.
    precision is None if no frame is detected, recall if no frame is positive. Raises DataError if the truth does not
    match the scores.
    """
    try:
        share = positive_frames(truth, sum(len(s.anomaly) for s in scores), frames_per_snippet) / frames_per_snippet
    except ValueError as error:
        raise DataError(str(error)) from error
    outputs = {"align": [1 - s.probabilities[:, 0] for s in scores], "binary": [s.anomaly for s in scores]}
    found = {}
    for name, parts in outputs.items():
        score, head = np.concatenate(parts), getattr(calibration, name)
        alarm = score >= head.threshold
        hits, alarms, positives = share[alarm].sum(), alarm.sum(), share.sum()
        found[name] = {
            "threshold": head.threshold,
            "temperature": head.temperature,
            "precision": float(hits / alarms) if alarms else None,
            "recall": float(hits / positives) if positives else None,
            "f1": float(2 * hits / (alarms + positives)) if alarms + positives else None,
            **reliability(score, share),
        }
    return found


def _class_spans(spans: Sequence, classes: list[str], codes: dict[str, str]) -> list[list[tuple[int, int, int]]]:
    unknown = {code for video in spans for _, _, code in video if codes.get(code) not in classes}
    if unknown:
        names = ", ".join(sorted(unknown))
        known = ", ".join(f"{code} ({name})" for code, name in codes.items() if name in classes)
        raise DataError(f"the segments name {names}, which the model's classes do not cover: {known}")
    return [[(start, end, classes.index(codes[code])) for start, end, code in video] for video in spans]
