"""Folds of clips, on a set composed like FightSurv; figures and plots are made from what is committed."""

import json

import numpy as np
import pytest

from bench import fightsurv
from bench import fightsurv_folds as folds

CLIPS, FIGHTS, ROWS, WIDTH = 24, 10, 5, 6


@pytest.fixture(scope="module")
def videos() -> list[folds.Video]:
    """Sixty videos of six clips each; the first FIGHTS clips show fights; sound is of each video alone."""
    rng = np.random.default_rng(0)
    clips = rng.standard_normal((CLIPS, ROWS, WIDTH)).astype(np.float32)
    made = []
    for i in range(60):
        normal = rng.choice(np.arange(FIGHTS, CLIPS), 4 + 2 * (i % 2 == 0), replace=False)
        chosen = rng.permutation(normal if i % 2 == 0 else np.append(normal, rng.choice(FIGHTS, 2, replace=False)))
        visual = clips[chosen].reshape(-1, WIDTH)
        made.append(folds.Video(visual, rng.standard_normal(visual.shape).astype(np.float32), i % 2 == 1))
    return made


def test_clips_and_fights_are_found_from_labels_alone(videos):
    clips = folds.find_clips(videos)
    assert len(clips.fight) == CLIPS and clips.fight.sum() == FIGHTS
    for video, of in zip(videos, clips.of, strict=True):
        assert len(of) == len(video.visual) and (of.reshape(-1, ROWS) == of.reshape(-1, ROWS)[:, :1]).all()
        assert clips.fight[of].any() == video.abnormal


def test_a_source_is_held_out_with_all_its_clips():
    """Twelve places of two clips each, which differ a little: one shows a fight, or both, or neither."""
    rng = np.random.default_rng(0)
    places = np.repeat(np.eye(12, dtype=np.float32), 2, axis=0)[:, None]
    clips = places + 0.05 * rng.standard_normal((24, ROWS, 12)).astype(np.float32)
    fights = np.arange(24) % 3 == 0
    made = []
    for i in range(80):
        chosen = rng.choice(24, 5, replace=False) if i % 2 else rng.choice(np.flatnonzero(~fights), 5, replace=False)
        visual = clips[chosen].reshape(-1, 12)
        made.append(folds.Video(visual, visual, bool(fights[chosen].any())))
    found = folds.find_clips(made)
    assert len(found.fight) == 24 and folds.find_sources(made, found).max() == 11
    for number in range(folds.FOLDS):
        kept, held = (
            {int(place) for v in part for place in v.visual.argmax(1)} for part in folds.by_sources(made, found, number)
        )
        assert kept and held and not kept & held


@pytest.mark.parametrize("number", range(folds.FOLDS))
def test_neither_part_has_a_clip_or_a_sound_of_the_other(videos, number):
    clips = folds.find_clips(videos)
    kept, held = folds.by_clips(videos, clips, number)
    for stream in ("visual", "audio"):
        seen = {row.tobytes() for v in kept for row in getattr(v, stream)}
        assert seen and not any(row.tobytes() in seen for v in held for row in getattr(v, stream))
    for v in kept + held:
        assert v.abnormal == v.fights.any() and len(v.fights) == len(v.visual) == len(v.audio) > 0
    whole, others = folds.by_videos(videos, clips, number)
    assert len(whole) + len(others) == len(videos) and 13 <= len(others) <= 17


def test_folds_hold_out_different_clips(videos):
    clips = folds.find_clips(videos)
    parts = [{row.tobytes() for v in folds.by_clips(videos, clips, k)[1] for row in v.visual} for k in range(4)]
    assert sum(map(len, parts)) == len(set.union(*parts)) > 0.7 * CLIPS * ROWS


def test_as_training_and_scoring_take_them(videos):
    features = folds.feature_set(videos, 16)
    assert features.visual.shape == (60, 16, WIDTH) and features.labels[:2].tolist() == [[1, 0], [0, 1]]
    test = folds.test_videos(videos, 16)
    assert test[0].visual.shape == (2, 16, WIDTH) and test[0].lengths.tolist() == [16, 14] and test[0].snippets == 30


def test_plots_are_made_from_the_committed_json(tmp_path):
    fightsurv.plot(tmp_path)
    pages = (fightsurv.RESULTS.parents[1] / "docs/training-that-hears.md").read_text()
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made and all((tmp_path / name).stat().st_size > 5000 and f"({name})" in pages for name in made)


def test_the_committed_numbers_are_of_the_recipe_that_is_shipped():
    for name in ("fightsurv", "fightsurv_ablation"):
        settings = fightsurv.read(name)["settings"]
        shipped = {"recipe": fightsurv.ROBUST, "model": fightsurv.ROBUST_STREAMS}
        for key, recipe in json.loads(json.dumps(shipped)).items():
            assert settings[key] == recipe, f"{name}.json is of another recipe; run the bench"
