"""Evaluation with some of the sound missing."""

import numpy as np
import pytest

from avadclip_fast.data import DataError
from avadclip_fast.engine.evaluate import VideoScores
from avadclip_fast.engine.missing import CHOICES, format_missing, missing_sound, mute


def test_who_loses_its_sound():
    half, more = mute(80, 50, 7), mute(80, 75, 7)
    assert half.sum() == 40 and more.sum() == 60 and (half <= more).all(), "a larger share holds a smaller one"
    assert np.array_equal(half, mute(80, 50, 7)) and not np.array_equal(half, mute(80, 50, 8))
    assert not mute(80, 0, 0).any() and mute(80, 100, 0).all()
    assert mute(3, 60, 0).sum() == 2  # the nearest number
    assert mute(80, 50, -7).sum() == 40  # any seed
    for wrong in (-1, 101, float("nan")):
        with pytest.raises(DataError, match="0 to 100"):
            mute(80, wrong, 0)


def scores(values: np.ndarray) -> list[VideoScores]:
    return [VideoScores(f"v{i}", v, np.stack([1 - v, v], 1)) for i, v in enumerate(values)]


def test_shares_choices_and_the_oracle():
    """Thirty videos: the teacher is right where it hears and knows nothing else, the student is often right."""
    rng = np.random.default_rng(0)
    truth = (rng.random((30, 8)) < 0.2).astype(float)
    hearing = scores(0.8 * truth + 0.1)
    deaf = scores(rng.random((30, 8)))
    student = scores(np.where(rng.random((30, 8)) < 0.8, 0.8 * truth + 0.1, 0.5))
    classes = ["normal", "fighting"]
    records = missing_sound(hearing, deaf, student, np.repeat(truth.ravel(), 4), classes, 4, [0, 50, 100], seed=0)
    heard, half, none = records
    assert heard["teacher"]["align"] == heard["automatic"]["align"] == 1
    assert half["teacher"]["align"] < half["student"]["align"] < half["automatic"]["align"] < 1
    assert none["automatic"] == none["student"] and none["teacher"]["align"] < 0.4
    for record in records:
        assert record["oracle"]["binary"] == max(record[name]["binary"] for name in CHOICES)
    with pytest.raises(DataError, match="one kind"):
        missing_sound(hearing, deaf, student, np.zeros(30 * 8 * 4), classes, 4, [50], seed=0)
    lines = format_missing(records).splitlines()
    shown = [half[name][branch] for name in (*CHOICES, "oracle") for branch in ("align", "binary")]
    assert lines[3].split() == ["50", "%", *(f"{100 * value:.2f}" for value in shown)]
    assert {len(line) for line in lines} == {80}
