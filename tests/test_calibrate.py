"""Calibration: temperatures and thresholds found again in scores that were made from known ones."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from small_models import batch, teacher

from avadclip_fast.data import DataError, FeatureSet
from avadclip_fast.engine.calibrate import (
    CALIBRATION,
    TEMPERATURES,
    Calibration,
    Head,
    best_threshold,
    calibrate,
    fit_calibration,
    has_both_kinds,
    held_out_logits,
    log_loss,
    reliability,
    snippet_scores,
    video_scores,
)
from avadclip_fast.engine.evaluate import VideoScores, at_threshold
from avadclip_fast.models.checkpoints import CONFIG


def made(temperature: float) -> tuple[dict, np.ndarray]:
    """4000 videos of one snippet whose logits are `temperature` times too sure of themselves."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 4000)
    abnormal = rng.random(4000) < 1 / (1 + np.exp(-logit))
    logit = temperature * logit[:, None]
    classes = np.stack([0 * logit, logit - np.log(2), logit - np.log(2)], 2)  # p(normal) = 1 - sigmoid(logit)
    return {"binary": list(logit), "align": list(classes)}, abnormal


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_known_temperature_is_found(temperature, monkeypatch):
    """Within 10 %: what 4000 coin flips tell of a slope. The align output falls off the logit where t is not 1."""
    # an eighth of those that are tried, 32 % apart, with these two among them: 4000 videos take their time
    monkeypatch.setattr("avadclip_fast.engine.calibrate.TEMPERATURES", TEMPERATURES[::8])
    logits, abnormal = made(temperature)
    found = fit_calibration(logits, abnormal)
    assert found.binary.temperature == pytest.approx(temperature, rel=0.1) and found.videos == 4000
    assert 0.3 < found.binary.threshold < 0.6
    if temperature == 1:
        assert found.align == found.binary
    before = reliability(video_scores([snippet_scores("binary", x) for x in logits["binary"]]), abnormal)["ece"]
    scores = video_scores([snippet_scores("binary", x, found.binary.temperature) for x in logits["binary"]])
    assert reliability(scores, abnormal)["ece"] < max(0.03, 0.5 * before)


def test_videos_told_apart_do_not_make_scores_more_certain():
    logits = {"binary": [np.full(3, x) for x in (-2.0, -1.0, 1.0, 2.0)]}
    logits["align"] = [np.stack([-x, x], 1) for x in logits["binary"]]
    found = fit_calibration(logits, np.array([False, False, True, True]))
    assert found.align.temperature == found.binary.temperature == 1


def test_a_score_of_nought_for_an_abnormal_video_is_a_finite_loss():
    assert log_loss(np.array([0.0, 1.0]), np.array([True, True])) == pytest.approx(-np.log(1e-12) / 2)


def test_calibration_needs_both_kinds():
    with pytest.raises(ValueError, match="normal and abnormal"):
        fit_calibration({"binary": [np.zeros(3)], "align": [np.zeros((3, 2))]}, np.array([True]))


def test_abnormal_is_what_is_not_of_the_first_class():
    held = FeatureSet(*batch([5, 5, 5], 5)[:2], torch.tensor([5, 5, 5]), torch.eye(3))
    for videos, both in (([0, 1, 2], True), ([2, 0], True), ([1, 2], False), ([0], False)):
        assert has_both_kinds(held.subset(torch.tensor(videos))) == both


def test_snippet_scores_are_those_of_softmax_and_sigmoid():
    x = torch.randn(50, 4, dtype=torch.float64) * 5
    expected = 1 - (x / 2.5).softmax(-1)[:, 0]
    np.testing.assert_allclose(snippet_scores("align", x.numpy(), 2.5), expected.numpy(), rtol=1e-9, atol=1e-12)
    expected = (x[:, 0] / 2.5).sigmoid()
    np.testing.assert_allclose(snippet_scores("binary", x[:, 0].numpy(), 2.5), expected.numpy(), rtol=1e-12)


def test_a_video_scores_as_its_top_snippets():
    one, two = np.arange(15) / 15, np.arange(16) / 16
    assert video_scores([one, two]) == pytest.approx([14 / 15, (15 + 14) / 32])


def test_best_threshold():
    assert best_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.5)
    assert best_threshold(np.array([0.1, 0.9, 0.4, 0.95]), np.array([False, False, True, True])) < 0.4
    assert best_threshold(np.array([0.7, 0.7]), np.array([False, True])) == 0.7
    # one alarm of one, two of five and three of nine all have an F1 of a half: the middle one
    assert best_threshold(np.arange(1, 10) / 10, np.arange(9) % 4 == 0) == pytest.approx(0.45)


def test_a_threshold_for_many_videos_takes_memory_for_each_and_not_for_each_pair():
    generator = np.random.default_rng(0)
    abnormal = generator.random(5000) < 0.3
    scores = np.clip(generator.normal(0.3 + 0.3 * abnormal, 0.2), 0, 1)
    tracemalloc.start()
    best = best_threshold(scores, abnormal)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.3 < best < 0.6 and peak < 5000**2 / 10


def test_reliability_weighs_its_bins():
    found = reliability(np.array([0.05, 0.95, 0.95, 1.0]), np.array([0.0, 1, 0, 1]))
    assert found["bins"][0] == pytest.approx([0.05, 0, 0.25])
    assert found["bins"][1] == pytest.approx([2.9 / 3, 2 / 3, 0.75])
    assert found["ece"] == pytest.approx(0.25 * 0.05 + 0.75 * 0.3)


def test_saved_beside_a_model_and_loaded(tmp_path):
    assert Calibration.load(tmp_path) == Calibration() and Calibration().binary == Head(1.0, 0.5)
    with pytest.raises(DataError, match="no model at .*typing-error, whose calibration"):
        Calibration.load(tmp_path / "typing-error")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / CONFIG).write_text("{}")
    kept = Calibration(Head(2.0, 0.25), Head(0.5, 0.75), 17)
    kept.save(tmp_path / "model")
    assert Calibration.load(tmp_path) == Calibration.load(tmp_path / "model") == kept
    Calibration().save(tmp_path)  # of no model, and not in the way of the run's
    assert Calibration.load(tmp_path) == kept
    (tmp_path / "model" / CALIBRATION).write_text(json.dumps({"align": {}}))
    with pytest.raises(DataError, match="holds no calibration"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    "temperature, threshold",
    [(0, 0.5), (-1.0, 0.5), ("NaN", 0.5), (1.0, "NaN"), ('"2"', 0.5), (10**400, 0.5), (1.0, 10**400)],
)
def test_edited_so_that_no_score_is_a_number(temperature, threshold, tmp_path):
    """Told with the file's name: the scores that it spoils have none."""
    head = f'{{"temperature": {temperature}, "threshold": {threshold}}}'
    (tmp_path / CALIBRATION).write_text(f'{{"align": {head}, "binary": {head}, "videos": 3}}')
    with pytest.raises(DataError, match=f"{CALIBRATION} holds no calibration: .*; remove it"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize("temperature, threshold", [(0, 0.5), (float("inf"), 0.5), (1.0, float("nan"))])
def test_made_so_that_no_score_is_a_number(temperature, threshold):
    with pytest.raises(ValueError, match=f"above zero and a finite threshold; got {temperature} and {threshold}"):
        Head(temperature, threshold)


def test_another_file_in_its_place_is_not_printed(tmp_path):
    (tmp_path / CALIBRATION).write_bytes(bytes(range(256)) * 1000)
    with pytest.raises(DataError, match="holds no calibration: UnicodeDecodeError: ") as told:
        Calibration.load(tmp_path)
    assert len(str(told.value)) < 500


def test_of_a_model_and_a_held_out_set():
    visual, audio, labels, lengths = batch([24, 5, 17, 1], 24)
    held = FeatureSet(visual, audio, lengths, labels, video=torch.tensor([0, 1, 1, 2]))
    model = teacher(dropout=0.5).train()
    logits = held_out_logits(model, held, 3, "cpu")
    assert [len(x) for x in logits["binary"]] == lengths.tolist() and logits["align"][1].shape == (5, 3)
    with torch.no_grad():
        out = model.eval()(visual, audio, lengths)
    np.testing.assert_allclose(logits["align"][1], out.class_logits[1, :5].numpy(), rtol=1e-4, atol=1e-5)
    part = held.subset(torch.tensor([0, 1, 2]))
    assert calibrate(model, part, 3, "cpu").videos == 2, "two crops are one video"


def test_what_a_threshold_finds():
    scores = [VideoScores("a", np.array([0.9, 0.2]), np.array([[0.4, 0.6], [0.9, 0.1]]))]
    found = at_threshold(scores, np.array([1, 1, 0, 1]), 2, Calibration(Head(1, 0.05), Head(2, 0.5)))
    assert found["binary"]["precision"] == 1 and found["binary"]["recall"] == pytest.approx(2 / 3)
    assert found["align"]["precision"] == 0.75 and found["align"]["recall"] == 1
    assert found["binary"]["f1"] == pytest.approx(0.8) and found["align"]["f1"] == pytest.approx(6 / 7)
    exact = at_threshold(scores, np.array([1, 1, 0, 1]), 2, Calibration(binary=Head(1, 0.9)))["binary"]
    assert exact["precision"] == 1  # a score on the threshold is an alarm
    none = at_threshold(scores, np.zeros(4), 2, Calibration(binary=Head(1, 0.95)))["binary"]
    assert none["precision"] is None and none["recall"] is None and none["f1"] is None
    assert found["binary"]["ece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)
    with pytest.raises(DataError, match="frames"):
        at_threshold(scores, np.array([1, 1, 0]), 2, Calibration())
