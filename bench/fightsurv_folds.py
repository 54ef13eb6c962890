"""Folds of FightSurv whose held-out part shares no clip, or no source, with the training part.

Each training video is composed of a few clips, and a clip recurs in many videos with bitwise equal visual rows. Videos
held out at random therefore consist of clips seen in training, and measure memorization. These folds hold out whole
clips, or whole sources (clips of one camera or place, which look alike): their rows are removed from the training
videos, and other videos, reduced to these rows, are scored. A clip shows a fight if no normal video contains it, so
this follows from the video labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering

from avadclip_fast import data
from avadclip_fast.data.dataset import load_row
from avadclip_fast.data.features import chunk, pool, with_motion

FOLDS = 4
ALIKE = 0.6  # minimum cosine of two clips of one source, from their mean rows minus the mean of all clips
LEAST_ROWS = 8  # minimum rows of a training video without its held-out clips


class Video(NamedTuple):
    """A video of n snippets and its label."""

    visual: np.ndarray  # (n, D) float32
    audio: np.ndarray  # (n, D) float32
    abnormal: bool
    fights: np.ndarray | None = None  # (n,) bool, whether a snippet belongs to a fight clip


class Clips(NamedTuple):
    """The clip of each row of each video, and which clips show fights."""

    of: list[np.ndarray]  # per video (n,) int
    fight: np.ndarray  # (clips,) bool


def load(folder: Path) -> list[Video]:
    """Loads the training videos."""
    rows = data.read_list(folder / "train.csv")
    return [Video(*load_row(row, 512, True), row.label != "A") for row in rows]


def find_clips(videos: Sequence[Video]) -> Clips:
    """Finds clips: consecutive rows of a video that occur in exactly the same videos belong to one clip."""
    video = np.repeat(np.arange(len(videos)), [len(v.visual) for v in videos])
    _, row = np.unique(np.concatenate([v.visual for v in videos]), axis=0, return_inverse=True)
    row = row.ravel()
    found_in = [set() for _ in range(row.max() + 1)]
    for r, v in zip(row, video, strict=True):
        found_in[r].add(v)
    root = list(range(len(found_in)))

    def find(r: int) -> int:
        while root[r] != r:
            r = root[r]
        return r

    for i in range(1, len(row)):
        if video[i] == video[i - 1] and found_in[row[i]] == found_in[row[i - 1]]:
            root[find(row[i])] = find(row[i - 1])
    _, clip = np.unique([find(r) for r in row], return_inverse=True)
    fight = np.ones(clip.max() + 1, bool)
    normal_rows = ~np.array([v.abnormal for v in videos])[video]
    fight[clip[normal_rows]] = False
    return Clips(np.split(clip, np.flatnonzero(np.diff(video)) + 1), fight)


def find_sources(videos: Sequence[Video], clips: Clips) -> np.ndarray:
    """Returns the source of each clip, (clips,) int, by single-linkage clustering of clips that look alike."""
    sums, counts = np.zeros((len(clips.fight), videos[0].visual.shape[1])), np.zeros((len(clips.fight), 1))
    for video, of in zip(videos, clips.of, strict=True):
        np.add.at(sums, of, video.visual)
        np.add.at(counts, of, 1)
    means = sums / counts
    linked = AgglomerativeClustering(None, metric="cosine", linkage="single", distance_threshold=1 - ALIKE)
    return linked.fit_predict(means - means.mean(0))


def by_clips(videos: Sequence[Video], clips: Clips, number: int) -> tuple[list[Video], list[Video]]:
    """Returns fold `number`: 3/4 of the videos without 1/4 of the clips, and the other videos with only these clips.

    The parts share no videos or clips. Abnormal training videos that lose all their fights are dropped.
    """
    return _without(videos, clips, _parts(clips.fight), number)


def by_sources(videos: Sequence[Video], clips: Clips, number: int) -> tuple[list[Video], list[Video]]:
    """As `by_clips`, but holds out a quarter of the sources with all their clips."""
    source = find_sources(videos, clips)
    fights = np.bincount(source, clips.fight) / np.bincount(source)
    kinds = np.ceil(fights) + np.floor(fights)  # 0: no fights, 1: some, 2: nothing else
    return _without(videos, clips, _parts(kinds)[source], number)


def _without(videos: Sequence[Video], clips: Clips, held_clip: np.ndarray, number: int):
    held_video = _parts([v.abnormal for v in videos])
    kept, held = [], []
    for video, of, part in zip(videos, clips.of, held_video, strict=True):
        fights, out = clips.fight[of], held_clip[of] == number
        rows = out if part == number else ~out
        left = Video(video.visual[rows], video.audio[rows], bool(fights[rows].any()), fights[rows])
        if part == number:
            held += [left] * (len(left.visual) > 0)
        elif left.abnormal == video.abnormal and len(left.visual) >= LEAST_ROWS:
            kept.append(left)
    return kept, held


def by_videos(videos: Sequence[Video], clips: Clips, number: int) -> tuple[list[Video], list[Video]]:
    """Returns fold `number` of whole videos, a split that ignores clips."""
    parts = _parts([v.abnormal for v in videos])
    known = [v._replace(fights=clips.fight[of]) for v, of in zip(videos, clips.of, strict=True)]
    return [v for v, p in zip(known, parts, strict=True) if p != number], [
        v for v, p in zip(known, parts, strict=True) if p == number
    ]


def _parts(kinds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Assigns items to folds, with equal shares of every kind."""
    rng, parts = np.random.default_rng(7), np.empty(len(kinds), int)
    for kind in np.unique(kinds):
        chosen = np.flatnonzero(np.asarray(kinds) == kind)
        parts[chosen] = rng.permutation(len(chosen)) % FOLDS
    return parts


def feature_set(videos: Sequence[Video], length: int, motion: bool = False) -> data.FeatureSet:
    """Returns videos as a training set: pooled to `length` rows, with one label each."""
    seen, sizes = zip(*(pool(_sight(v, motion), length) for v in videos), strict=True)
    heard = [pool(v.audio, length)[0] for v in videos]
    labels = np.array([[not v.abnormal, v.abnormal] for v in videos], np.float32)
    streams = (torch.from_numpy(np.stack(x)) for x in (seen, heard))
    return data.FeatureSet(*streams, torch.tensor(sizes), torch.from_numpy(labels))


def test_videos(videos: Sequence[Video], length: int, motion: bool = False) -> list[data.TestVideo]:
    """Returns videos for scoring, in chunks of `length` rows."""
    made = []
    for i, v in enumerate(videos):
        visual, lengths = chunk(_sight(v, motion), length)
        made.append(data.TestVideo(str(i), visual, chunk(v.audio, length)[0], lengths, len(v.visual)))
    return made


def _sight(video: Video, motion: bool) -> np.ndarray:
    return with_motion(video.visual) if motion else video.visual
