"""Detection in video files: the teacher scores parts with sound, the student parts without; scores become events."""

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data import DataError, TestVideo, chunk, with_motion
from ..data.errors import printable
from ..media.features import VideoFeatures
from ..models.avadclip import Detector, check_normal_first
from ..models.checkpoints import CheckpointError
from ..models.text import tokenize
from .calibrate import Calibration
from .evaluate import PACKED_CHUNKS, VideoScores, load_model, stream_scores

PAUSE = 5.0  # seconds: a shorter silence is part of the surrounding sound, a shorter time without frames no gap


class Scorer(NamedTuple):
    """A model, its calibration, and its encoded class names."""

    model: Detector
    calibration: Calibration
    text: torch.Tensor  # result of `model.encode_text`


class Part(NamedTuple):
    """Snippets start (inclusive) to end (exclusive) of a video, and which model scored them."""

    start: int
    end: int
    by: str  # "teacher", "student", or "teacher without sound"
    why: str  # the reason, such as "the sound ends"


class Event(NamedTuple):
    """A run of snippets whose scores reach the threshold, without a gap in the footage."""

    start: float  # seconds
    end: float
    name: str  # the most likely class other than normal
    score: float  # maximum of 1 - p(normal) over the event
    probability: float  # mean probability of the class over the event


@dataclass
class Detection:
    """The result of detection in one video of n snippets."""

    name: str
    classes: list[str]
    times: np.ndarray  # (n,) start of each snippet in seconds
    seconds: float  # duration of one snippet
    anomaly: np.ndarray  # (n,) sigmoid of the anomaly logits
    probabilities: np.ndarray  # (n, C)
    thresholds: np.ndarray  # (n,), since the thresholds of teacher and student may differ
    parts: list[Part]
    cuts: list[int] = field(default_factory=list)  # snippets before which there is a gap in the footage, see `cuts_of`
    until: float = np.inf  # end of the video in seconds

    @property
    def scores(self) -> np.ndarray:
        """(n,) 1 - p(normal)."""
        return 1 - self.probabilities[:, 0]

    @property
    def alarm(self) -> np.ndarray:
        """(n,) bool, whether each score reaches its threshold."""
        return self.scores >= self.thresholds

    @property
    def ends(self) -> np.ndarray:
        """(n,) end of each snippet in seconds: where the next one starts, except before a gap, or the video ends."""
        return np.minimum(ends_of(self.times, self.seconds, self.cuts), self.until)

    def spans(self, runs: Iterable[tuple[int, int]]) -> list[tuple[float, float]]:
        """Returns the times in seconds that runs of snippets, start (inclusive) to end (exclusive), take."""
        ends = self.ends
        return [(float(self.times[start]), float(ends[end - 1])) for start, end in runs]

    def timed_parts(self) -> list[tuple[Part, float, float]]:
        """Returns each part with its start and end in seconds."""
        spans = self.spans((part.start, part.end) for part in self.parts)
        return [(part, *span) for part, span in zip(self.parts, spans, strict=True)]

    def alarms(self) -> list[tuple[int, int]]:
        """Returns (start, end) of the snippets of each event, end exclusive, in order."""
        alarm = self.alarm
        return [
            (first + start, first + end)
            for first, last in pairwise([0, *self.cuts, len(alarm)])
            for start, end in runs(alarm[first:last])
        ]

    def events(self) -> list[Event]:
        """Returns the runs of snippets at or above the threshold, in order."""
        runs = self.alarms()
        return [
            event_of(*span, self.classes, self.probabilities[slice(*run)])
            for run, span in zip(runs, self.spans(runs), strict=True)
        ]

    def names(self) -> list[str]:
        """Returns the class name of the event that contains each snippet, or "" for snippets outside events."""
        found = [""] * len(self.times)
        for (start, end), event in zip(self.alarms(), self.events(), strict=True):
            found[start:end] = [event.name] * (end - start)
        return found

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Returns what plots show: edges (m + 1,) in seconds, and scores (m,), thresholds (m,) and names between them.

        These are the snippets and, with NaN and "", the gaps in the footage.
        """
        at, ends = np.array(self.cuts, int), self.ends
        edges = np.insert(np.append(self.times, ends[-1]), at, ends[at - 1])
        scores, thresholds = (np.insert(values.astype(float), at, np.nan) for values in (self.scores, self.thresholds))
        return edges, scores, thresholds, np.insert(np.array(self.names(), object), at, "").tolist()


def event_of(start: float, end: float, classes: Sequence[str], probabilities: np.ndarray) -> Event:
    """Returns the event of a run of n snippets from start to end (seconds), from their probabilities (n, C)."""
    mean = probabilities.mean(0)
    c = 1 + int(mean[1:].argmax())
    return Event(start, end, classes[c], float(1 - probabilities[:, 0].min()), float(mean[c]))


def load_scorers(path: str | Path, student: str | Path | None = None, classes: Sequence[str] = ()) -> list[Scorer]:
    """Loads the teacher and the student, or just one of them, for `detect`.

    path: a model of either kind, or a folder that contains teacher/ and student/. student: the student, if `path` is a
    teacher. classes: class names to use instead of those that the models were trained with, normal first; the text
    encoder embeds them, without training.
    Raises CheckpointError, DataError.
    """
    path = Path(path)
    if student is None and (path / "teacher").is_dir() and (path / "student").is_dir():
        path, student = path / "teacher", path / "student"
    paths = [Path(p) for p in (path, student) if p is not None]
    names = class_names(classes) if classes else None
    models = [_load(p, names).eval() for p in paths]
    if student is not None and ("audio" not in models[0].streams() or "audio" in models[1].streams()):
        raise DataError(f"{path} must be a model that hears, and {student} one that does not")
    for model in models:
        if names is not None:
            set_classes(model, names)
    if len({tuple(model.classes) for model in models}) > 1:
        raise DataError(f"{path} and {student} know other classes; --classes names those to look for")
    with torch.no_grad():
        return [Scorer(model, Calibration.load(p), model.encode_text()) for model, p in zip(models, paths, strict=True)]


def _load(path: Path, names: list[str] | None) -> Detector:
    """Loads a model. An official .pth does not store its classes, so it is loaded with `names` if it needs them."""
    try:
        return load_model(path)
    except CheckpointError:
        if names is None or not path.is_file():
            raise
        return load_model(path, names)


def class_names(classes: Sequence[str]) -> list[str]:
    """Strips blanks from the names.

    Raises DataError unless there are at least two, all different and not empty, and "normal" is first or absent.
    """
    classes = [name.strip() for name in classes]
    if len(classes) < 2 or len(set(classes)) < len(classes) or not all(classes):
        raise DataError(f"classes must be at least two different names, normal first; got {', '.join(classes)}")
    check_normal_first(classes)
    return classes


def set_classes(model: Detector, classes: Sequence[str]) -> None:
    """Replaces the class names of a model, normal first, also where it is saved. Raises DataError on invalid names."""
    classes = class_names(classes)
    model.text.set_tokens(tokenize(classes))
    model.classes = classes
    model.align_loss = type(model.align_loss)(len(classes)).to(model.classifier.weight)  # its weights are by class
    model.remember(classes=classes, class_tokens=model.text.tokens)


def detect(
    name: str,
    found: VideoFeatures,
    scorers: Sequence[Scorer],
    device: str | torch.device = "cpu",
    threshold: float | None = None,
) -> Detection:
    """Scores one video.

    A teacher scores each part with sound separately, so that silent parts do not influence it. A student, if given,
    scores the other parts, with the whole video as context. Footage before and after a gap is scored as
    separate videos, as `OnlineDetector` does.

    name: the video's. found: its features. scorers: from `load_scorers`. threshold: replaces the models' own.
    Raises DataError if the features do not match the model.
    """
    visual = found.visual[0].astype(np.float32, copy=False)
    first, last = scorers[0], scorers[-1]
    check_widths(first.model, visual.shape[1], None if found.audio is None else found.audio.shape[1])
    n = len(visual)
    cuts = cuts_of(found)
    stretches = list(pairwise([0, *cuts, n]))  # of footage
    if "audio" not in first.model.streams():
        parts = [Part(start, end, "student", "the model needs no sound") for start, end in stretches]
    else:
        lasts = ends_of(found.times, found.seconds, cuts) - found.times
        silence = "" if found.audio is not None else "sound is left out" if found.deaf else "no sound track"
        parts = [
            Part(start, end, "teacher" if heard else deaf_name(scorers), why)
            for start, end, heard, why in sound_parts(found.heard, silence, lasts, cuts)
        ]
    anomaly = np.zeros(n, np.float32)
    probabilities = np.zeros((n, len(first.model.classes)), np.float32)
    thresholds = np.zeros(n)
    unheard: dict[int, VideoScores] = {}  # of one stretch at a time, by its first snippet
    for part in parts:
        here = slice(part.start, part.end)
        if part.by == "teacher" and found.audio is not None:  # audio is never None for the teacher
            scorer, inner = first, slice(None)
            scored = score(scorer, visual[here], found.audio[here].astype(np.float32, copy=False), device)
        else:
            scorer = last
            first_seen, end_seen = stretches[bisect(cuts, part.start)]
            if first_seen not in unheard:
                unheard = {first_seen: score(scorer, visual[first_seen:end_seen], None, device)}
            scored, inner = unheard[first_seen], slice(part.start - first_seen, part.end - first_seen)
        anomaly[here], probabilities[here] = scored.anomaly[inner], scored.probabilities[inner]
        thresholds[here] = scorer.calibration.align.threshold if threshold is None else threshold
    scores = anomaly, probabilities, thresholds
    return Detection(name, first.model.classes, found.times, found.seconds, *scores, parts, cuts, found.end)


def cuts_of(found: VideoFeatures) -> list[int]:
    """Returns the snippets that follow a gap in the footage, as in recordings of a camera with motion detection.

    As in `OnlineDetector`, the snippet starts more than PAUSE seconds late. In addition, there is no frame for that
    long: a snippet of `every` frames also lasts longer if the frame rate drops.
    """
    steps = np.diff(found.times)
    waits = steps if found.waits is None else found.waits[1:]
    return (np.flatnonzero((steps > PAUSE + found.seconds) & (waits > PAUSE)) + 1).tolist()


def ends_of(times: np.ndarray, seconds: float, cuts: Sequence[int]) -> np.ndarray:
    """Returns (n,) the end of each snippet: where the next one starts, except before a gap and at the end."""
    ends = np.append(times[1:], times[-1] + seconds)
    last = np.array(cuts, int) - 1
    ends[last] = times[last] + seconds
    return ends


def check_widths(model: Detector, visual: int, audio: int | None) -> None:
    """Raises DataError if a model cannot take the features of encoders of these widths (audio: None without one)."""
    if model.streams() == ("audio",):
        raise DataError("a student of the sound alone cannot look at videos: give a teacher, or a student of sight")
    if wrong := [given for given in (visual, audio) if given not in (model.width, None)]:
        raise DataError(f"the encoders give {wrong[0]} numbers a snippet, the model takes {model.width}")


def deaf_name(scorers: Sequence[Scorer]) -> str:
    """Returns the name of the model that scores parts without sound, the last of `load_scorers`."""
    return "teacher without sound" if "audio" in scorers[-1].model.streams() else "student"


def score(scorer: Scorer, visual: np.ndarray, audio: np.ndarray | None, device: str | torch.device) -> VideoScores:
    """Returns the scores of one video from features (n, D); audio None is silence to a teacher."""
    model, calibration, text = scorer
    full = PACKED_CHUNKS * model.length  # rows per pass

    def parts() -> Iterator[TestVideo]:
        """Splits long videos, so that padding copies one part at a time."""
        for start in range(0, len(visual), full):
            here = slice(start, min(start + full, len(visual)))
            seen = with_motion(visual, here.start, here.stop) if model.motion else visual[here]
            chunks, lengths = chunk(seen, model.length)
            heard = None if audio is None else chunk(audio[here], model.length)[0]
            yield TestVideo("", chunks, heard, lengths, len(seen))

    found = list(stream_scores(model, parts(), device, silent=audio is None, calibration=calibration, text=text))
    return VideoScores(
        "", np.concatenate([part.anomaly for part in found]), np.concatenate([part.probabilities for part in found])
    )


def sound_parts(
    heard: np.ndarray, silence: str, seconds: np.ndarray, cuts: Sequence[int] = ()
) -> Iterator[tuple[int, int, bool, str]]:
    """Yields (start, end, whether there is sound, why) for each part of a video, in order.

    heard: (n,) bool, whether each snippet is audible. silence: why there is no sound, or "". seconds: (n,) duration of
    each snippet. cuts: snippets at which a part ends in any case, without 0. Silences shorter than PAUSE count as part
    of the surrounding sound.
    """
    n = len(heard)
    for first, last in pairwise([0, *cuts, n]):
        if silence:
            yield first, last, False, silence
            continue
        here = heard[first:last]
        sound = here.copy()
        for start, end in runs(~here):
            if here.any() and seconds[first + start : first + end].sum() < PAUSE - 1e-6:
                sound[start:end] = True
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(sound)) + 1).tolist(), last - first]):
            if sound[start]:
                why = "sound"
            elif not heard.any():
                why = "the sound track is silent"
            elif first + end == n:
                why = "the sound ends"
            else:
                why = "silent"
            yield first + start, first + end, bool(sound[start]), why


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Returns (start, end) of each run of True, end exclusive."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def time_code(seconds: float) -> str:
    """Formats seconds as HH:MM:SS.mmm."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def event_record(event: Event) -> dict:
    """Returns an event as JSON: seconds, time codes, class, maximum score, and mean probability of the class."""
    return {
        "start": round(event.start, 3),
        "end": round(event.end, 3),
        "start_code": time_code(event.start),
        "end_code": time_code(event.end),
        "class": event.name,
        "score": round(event.score, 6),
        "probability": round(event.probability, 6),
    }


def best_snippets(detection: Detection, most: int = 5) -> list[int]:
    """Returns the highest-scoring snippet of each of the `most` highest events, in order of time.

    Without events, returns the highest-scoring snippet of the video.
    """
    scores = detection.scores
    tops = [start + int(scores[start:end].argmax()) for start, end in detection.alarms()]
    return sorted(sorted(tops, key=lambda i: -scores[i])[:most] or [int(scores.argmax())])


def summary(detection: Detection) -> str:
    """Returns lines for the terminal: the parts that the teacher did not score, and the events."""
    lines, name = [], printable(detection.name)
    for part, start, end in detection.timed_parts():
        if part.by != "teacher" and part.why != "the model needs no sound":
            span = f"{time_code(start)} - {time_code(end)}"
            lines.append(f"{name}: {span} scored by the {part.by}: {part.why}")
    for e in detection.events():
        span = f"{time_code(e.start)} - {time_code(e.end)}"
        lines.append(f"{name}: {span} {printable(e.name)}, score {e.score:.2f}")
    if not detection.alarm.any():
        lines.append(f"{name}: nothing found")
    return "\n".join(lines)
