"""A synthetic dataset in the official format in which audio matters, for demonstrations, tests and timing.

Each stream of a video is a smooth random walk around its own scene, in a small subspace shared by all videos, like
embeddings of real videos. Events add a direction over a span:

    anomalies   a direction per class, visible, audible or both; an audible-only anomaly leaves a faint visual trace,
                which a student can learn from a teacher with audio, but hardly from labels
    distractors harmless visual and audio events as strong as anomalies, in normal and anomalous videos

Change alone is therefore uninformative, and a detector without audio misses audible-only anomalies.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .atomic import atomic_write, write_json
from .dataset import Progress
from .errors import DataError
from .labels import FILLER, XD_VIOLENCE
from .lists import Row, write_list
from .npy import npy_bytes

MODES = {"visible": 0.25, "audible": 0.45, "both": 0.3}  # fraction of the anomalous videos
SCENE = 8  # dimensions of the background subspace
HARMLESS = 6  # kinds of distractors per stream
# Norms; a row's is near 10, as for CLIP. MEAN: component shared by all rows. JITTER: noise along event directions.
MEAN, SCENE_NORM, WALK_NORM, NOISE_NORM, EVENT_NORM, JITTER = 6.0, 1.5, 1.5, 1.0, 7.0, 0.5
SPREAD = 0.3  # relative standard deviation of an event's strength
TRACE = 0.2  # visual strength of an audible-only anomaly, relative to a visible one
DOUBLE = 0.25  # fraction of anomalous videos with two classes
LEAST_EVENT, LONGEST_EVENT = 4, 24  # snippets


class Event(NamedTuple):
    start: int
    end: int
    code: str | None  # None for a distractor
    mode: str
    kind: int  # index into the stream's directions


def make_synthetic(
    folder: str | Path,
    videos: int = 128,
    test_videos: int = 48,
    classes: Iterable[str] = ("normal", "fighting", "shooting", "explosion"),
    width: int = 512,
    seed: int = 0,
    min_snippets: int = 16,
    max_snippets: int = 48,
    frames_per_snippet: int = 16,
    progress: Progress | None = None,
) -> None:
    """Writes train.csv, test.csv, train/*.npy, test/*.npy (float16), gt.npy, gt_segments.json and info.json.

    Half the videos are normal. A video depends only on its index, seed, classes, width and the snippet limits, so equal
    arguments give equal bytes, and adding videos does not change earlier ones. info.json gives the mode of each test
    anomaly.

    classes: names from XD_VIOLENCE, normal first
    Raises DataError on invalid arguments.
    """
    codes = _codes(classes)
    if width < SCENE + HARMLESS + len(codes) + 1 or not 4 * LEAST_EVENT <= min_snippets <= max_snippets:
        raise DataError(
            f"a made-up set needs width >= {SCENE + HARMLESS + len(codes) + 1} and "
            f"{4 * LEAST_EVENT} <= min_snippets <= max_snippets, got {width}, {min_snippets} and {max_snippets}"
        )
    if min(videos, test_videos, seed) < 0 or frames_per_snippet < 1:
        raise DataError(
            "a made-up set needs videos, test_videos and seed >= 0, and frames_per_snippet >= 1, got "
            f"{videos}, {test_videos}, {seed} and {frames_per_snippet}"
        )
    folder = Path(folder)
    anomalies = len(codes) - 1
    sight = _Stream(width, anomalies, {"audible": TRACE}, np.random.default_rng([seed, 0]))
    sound = _Stream(width, anomalies, {"visible": 0.0}, np.random.default_rng([seed, 1]))
    jobs = [("train", i) for i in range(videos)] + [("test", i) for i in range(test_videos)]
    rows: dict[str, list[Row]] = {"train": [], "test": []}
    tested: list[tuple[int, list[Event]]] = []  # snippets and anomalies
    for part in rows:
        (folder / part).mkdir(parents=True, exist_ok=True)
    for part, i in progress(jobs) if progress else jobs:
        rng = np.random.default_rng([seed, 2 + (part == "test"), i])
        snippets = int(rng.integers(min_snippets, max_snippets + 1))
        events = _events(snippets, codes[1:] if i % 2 else [], rng)
        planted = [event for event in events if event.code]
        found = [code for code in codes if code in {event.code for event in planted}]
        label = "-".join((found + [FILLER, FILLER])[:3]) if found else codes[0]
        name = f"{part}_{i:05d}_label_{label}"
        seen, heard = (folder / part / f"{name}__{stream}.npy" for stream in "va")
        row = Row(seen, heard, label, i + 2)
        # Not atomic: syncing thousands of small files takes minutes, and an interrupted set is cheap to make again.
        seen.write_bytes(npy_bytes(sight.draw(snippets, events, rng)))
        heard.write_bytes(npy_bytes(sound.draw(snippets, events, rng)))
        rows[part].append(row)
        if part == "test":
            tested.append((snippets, planted))
    for part, listed in rows.items():
        write_list(folder / f"{part}.csv", listed)
    frames, spans = _truth(tested, frames_per_snippet, codes[0])
    with atomic_write(folder / "gt.npy") as file:
        file.write(npy_bytes(frames))
    shown = [
        {"video": row.visual.stem, "anomalies": [event.mode for event in planted]}
        for row, (_, planted) in zip(rows["test"], tested, strict=True)
    ]
    info = {
        "frames_per_snippet": frames_per_snippet,
        "classes": {code: XD_VIOLENCE[code] for code in codes},
        "seed": seed,
        "train": {"videos": videos},
        "test": {"videos": test_videos, "frames": len(frames), "positive": int(frames.sum()), "shown": shown},
    }
    for name, content in (("gt_segments.json", spans), ("info.json", info)):
        write_json(folder / name, content)


def _truth(
    tested: list[tuple[int, list[Event]]], frames_per_snippet: int, normal: str
) -> tuple[np.ndarray, dict[str, list]]:
    """Returns the frame ground truth, (frames,) of 0 and 1, and the spans as `read_segments_json` reads them.

    tested: snippets and anomalies of each video. normal: the code of what is none
    """
    parts = [np.zeros(0, np.float32)]
    spans: dict[str, list] = {"segments": [], "labels": []}
    for snippets, planted in tested:
        frames = np.zeros(snippets * frames_per_snippet, np.float32)
        ends = [[event.start * frames_per_snippet, event.end * frames_per_snippet] for event in planted]
        for start, end in ends:
            frames[start:end] = 1
        parts.append(frames)
        spans["segments"].append(ends or [[0, len(frames)]])
        spans["labels"].append([event.code for event in planted] or [normal])
    return np.concatenate(parts), spans


def _codes(classes: Iterable[str]) -> list[str]:
    of = {name: code for code, name in XD_VIOLENCE.items()}
    classes = list(classes)
    if unknown := [name for name in classes if name not in of]:
        raise DataError(f"no class {', '.join(unknown)}; there are {', '.join(of)}")
    if len(classes) < 2 or len(set(classes)) < len(classes) or of[classes[0]] != "A":
        raise DataError(f"a made-up set needs normal first and other classes after it, got {', '.join(classes)}")
    return [of[name] for name in classes]


def _events(snippets: int, anomalies: list[str], rng: np.random.Generator) -> list[Event]:
    """Draws one to three anomalies, if `anomalies` is not empty, and one to three distractors, without overlap."""
    plan: list[tuple[str | None, str, int]] = []
    if anomalies:
        count = 1 + int(rng.integers(3))
        chosen = rng.choice(len(anomalies), 1 + (len(anomalies) > 1 and rng.random() < DOUBLE), replace=False)
        mode = str(rng.choice(list(MODES), p=list(MODES.values())))
        for i in range(max(count, len(chosen))):
            kind = int(chosen[i % len(chosen)])
            plan.append((anomalies[kind], mode, HARMLESS + kind))
    for _ in range(1 + int(rng.integers(3))):
        plan.append((None, str(rng.choice(["visible", "audible"])), int(rng.integers(HARMLESS))))
    order = rng.permutation(min(len(plan), snippets // LEAST_EVENT))  # a short video has fewer distractors
    slots = np.linspace(0, snippets, len(order) + 1, dtype=int)
    events = []
    for slot, j in enumerate(order):
        room = slots[slot + 1] - slots[slot]
        size = int(rng.integers(LEAST_EVENT - 1, max(min(room - 1, LONGEST_EVENT), LEAST_EVENT)))
        start = int(slots[slot] + rng.integers(room - size + 1))
        events.append(Event(start, start + size, *plan[j]))
    return events


class _Stream:
    """The visual or audio stream: its subspace, and the rows of a video in it."""

    def __init__(self, width: int, anomalies: int, faint: dict[str, float], rng: np.random.Generator):
        """faint: mode -> relative strength in this stream of anomalies that only the other stream shows."""
        self.faint = faint
        basis = np.linalg.qr(rng.standard_normal((width, 1 + SCENE + HARMLESS + anomalies)))[0].T
        self.mean, self.scene, self.events = basis[0], basis[1 : SCENE + 1], basis[SCENE + 1 :]

    def draw(self, snippets: int, events: list[Event], rng: np.random.Generator) -> np.ndarray:
        """Draws the rows of a video, (snippets, width) float16."""
        place = rng.standard_normal(SCENE)
        # mean-reverting walk: an AR(1) process as a sum over its decaying past
        age = np.subtract.outer(np.arange(snippets), np.arange(snippets))
        decay = np.where(age >= 0, 0.9 ** np.maximum(age, 0), 0) * (1 - 0.9**2) ** 0.5
        walk = decay @ rng.standard_normal((snippets, SCENE))
        strength = JITTER * rng.standard_normal((snippets, len(self.events)))
        for start, end, code, mode, kind in events:
            share = self.faint.get(mode, 1.0) if code else float(mode not in self.faint)
            peak = share * EVENT_NORM * max(1 + SPREAD * rng.standard_normal(), 0.3)
            strength[start:end, kind] += peak * np.sin(np.pi * (np.arange(end - start) + 1) / (end - start + 1)) ** 0.5
        inside = (SCENE_NORM * place + WALK_NORM * walk) / SCENE**0.5
        noise = rng.standard_normal((snippets, len(self.mean))) * (NOISE_NORM / len(self.mean) ** 0.5)
        return (MEAN * self.mean + inside @ self.scene + strength @ self.events + noise).astype(np.float16)
