"""Held-out parts of FightSurv that share no clip, or no source, with the part that is trained on.

Its training videos are composed of a few clips each, and a clip comes back in many videos with its visual rows the
same to the bit. Held-out videos are then made of clips that training has seen, and tell how well those were learnt by
heart. Here whole clips are held out, or whole sources, which are clips of one camera or place that look alike:
training videos lose their rows, and other videos, of these rows alone, are scored. That a clip shows a fight follows
from the videos' labels: no normal video contains it.
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
ALIKE = 0.6  # cosine of two clips of one source: their mean rows less the mean of all clips
LEAST_ROWS = 8  # of a training video that has lost its held-out clips


class Video(NamedTuple):
    """n snippets and the label."""

    visual: np.ndarray  # (n, D) float32
    audio: np.ndarray  # (n, D) float32
    abnormal: bool
    fights: np.ndarray | None = None  # (n,) bool, whether a snippet is of a fight clip


class Clips(NamedTuple):
    """Which clip each row of each video is of, and which clips show fights."""

    of: list[np.ndarray]  # per video (n,) int
    fight: np.ndarray  # (clips,) bool


def load(folder: Path) -> list[Video]:
    """The training videos."""
    rows = data.read_list(folder / "train.csv")
    return [Video(*load_row(row, 512, True), row.label != "A") for row in rows]


def find_clips(videos: Sequence[Video]) -> Clips:
    """Rows that follow each other in a video, and occur in exactly the same videos, are of one clip."""
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
    """The source of each clip, (clips,) int: clips that look alike, or are linked by others that do."""
    sums, counts = np.zeros((len(clips.fight), videos[0].visual.shape[1])), np.zeros((len(clips.fight), 1))
    for video, of in zip(videos, clips.of, strict=True):
        np.add.at(sums, of, video.visual)
        np.add.at(counts, of, 1)
    means = sums / counts
    linked = AgglomerativeClustering(None, metric="cosine", linkage="single", distance_threshold=1 - ALIKE)
    return linked.fit_predict(means - means.mean(0))


def by_clips(videos: Sequence[Video], clips: Clips, number: int) -> tuple[list[Video], list[Video]]:
    """Fold `number`: three in four videos without the rows of a quarter of the clips, and the others of these alone.

    Neither part holds a video or a clip of the other. Abnormal videos that lose all their fights are left out.
    """
    return _without(videos, clips, _parts(clips.fight), number)


def by_sources(videos: Sequence[Video], clips: Clips, number: int) -> tuple[list[Video], list[Video]]:
    """As `by_clips`, a quarter of the sources being held out with all their clips."""
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
    """Fold `number` of whole videos, as one would hold them out not knowing of the clips."""
    parts = _parts([v.abnormal for v in videos])
    known = [v._replace(fights=clips.fight[of]) for v, of in zip(videos, clips.of, strict=True)]
    return [v for v, p in zip(known, parts, strict=True) if p != number], [
        v for v, p in zip(known, parts, strict=True) if p == number
    ]


def _parts(kinds: Sequence[float] | np.ndarray) -> np.ndarray:
    """A fold for each, with the same share of every kind."""
    rng, parts = np.random.default_rng(7), np.empty(len(kinds), int)
    for kind in np.unique(kinds):
        chosen = np.flatnonzero(np.asarray(kinds) == kind)
        parts[chosen] = rng.permutation(len(chosen)) % FOLDS
    return parts


def feature_set(videos: Sequence[Video], length: int, motion: bool = False) -> data.FeatureSet:
    """As training takes them: pooled to `length` rows, with a label each."""
    seen, sizes = zip(*(pool(_sight(v, motion), length) for v in videos), strict=True)
    heard = [pool(v.audio, length)[0] for v in videos]
    labels = np.array([[not v.abnormal, v.abnormal] for v in videos], np.float32)
    streams = (torch.from_numpy(np.stack(x)) for x in (seen, heard))
    return data.FeatureSet(*streams, torch.tensor(sizes), torch.from_numpy(labels))


def test_videos(videos: Sequence[Video], length: int, motion: bool = False) -> list[data.TestVideo]:
    """As scoring takes them: in chunks of `length`."""
    made = []
    for i, v in enumerate(videos):
        visual, lengths = chunk(_sight(v, motion), length)
        made.append(data.TestVideo(str(i), visual, chunk(v.audio, length)[0], lengths, len(v.visual)))
    return made


def _sight(video: Video, motion: bool) -> np.ndarray:
    return with_motion(video.visual) if motion else video.visual
