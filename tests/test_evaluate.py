"""Scoring of whole videos: packing changes nothing, order is kept, memory stays bounded."""

import json

import numpy as np
import pytest
import torch
from small_models import batch, student, teacher

from avadclip_fast.data import DataError, TestVideo
from avadclip_fast.data.features import chunk
from avadclip_fast.engine.evaluate import VideoScores, evaluate, load_model, score_videos, stream_scores
from avadclip_fast.engine.state import LOGS, STATE
from avadclip_fast.models import CheckpointError
from avadclip_fast.models.checkpoints import CONFIG

LENGTHS = (5, 24, 60, 1, 48, 25)  # of chunks of 24: 1, 1, 3, 1, 2, 2


def video(number: int, snippets: int, sound: bool = True) -> TestVideo:
    visual, audio, _, _ = batch([snippets], snippets, seed=number)
    chunks, lengths = chunk(visual[0].numpy(), 24)
    return TestVideo(f"v{number}", chunks, chunk(audio[0].numpy(), 24)[0] if sound else None, lengths, snippets)


def videos():
    return [video(i, n) for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("chunks", [1, 3, 100])
@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize(("make", "silent"), [(teacher, False), (teacher, True), (student, False)])
def test_packing_changes_nothing(make, silent, padding, chunks):
    """Each chunk of each video alone, against packs: to rounding, since batches of other sizes sum in other orders."""
    model = make(padding=padding).eval()
    scores = list(stream_scores(model, videos(), silent=silent, chunks=chunks))
    assert [s.name for s in scores] == [f"v{i}" for i in range(len(LENGTHS))]
    for of, expected in zip(scores, videos(), strict=True):
        parts = []
        for i, n in enumerate(expected.lengths):
            streams = [torch.from_numpy(getattr(expected, stream)[i : i + 1]) for stream in model.streams()]
            if silent:
                streams[1] = None
            with torch.no_grad():
                out = model(*streams, torch.tensor([n]))
            parts.append((out.anomaly_logits[0, :n].sigmoid(), out.class_logits[0, :n].softmax(-1)))
        for own, plain in zip(of[1:], zip(*parts, strict=True), strict=True):
            np.testing.assert_allclose(own, torch.cat(plain).numpy(), rtol=1e-4, atol=1e-5)


def test_scoring_puts_a_model_into_eval_mode():
    """As it comes from training: else dropout is in the scores."""
    model = teacher(dropout=0.5).train()
    (first,), (again,) = (score_videos(model.train(), [video(0, 24)], progress=False) for _ in range(2))
    np.testing.assert_array_equal(first.anomaly, again.anomaly)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [teacher, student])
def test_a_model_of_another_dtype_scores(make, dtype):
    """Features are float32 whatever the model is; the text side may have been computed before it was cast."""
    model, close = make(standardize=["visual"]).eval(), {"rtol": 0, "atol": max(4 * torch.finfo(dtype).eps, 1e-5)}
    text, plain = model.encode_text().detach(), score_videos(model, videos(), progress=False)
    for known in (text, None):
        for of, expected in zip(stream_scores(model.to(dtype), videos(), text=known), plain, strict=True):
            assert of.probabilities.dtype == (np.float64 if dtype == torch.float64 else np.float32)
            np.testing.assert_allclose(of.probabilities.sum(1), 1, atol=1e-6)  # they have more bits than the model
            np.testing.assert_allclose(of.probabilities, expected.probabilities, **close)
            np.testing.assert_allclose(of.anomaly, expected.anomaly, **close)


def test_videos_are_read_as_they_are_needed():
    read = []

    def reading():
        for item in videos():
            read.append(item.name)
            yield item

    scores = stream_scores(teacher(), reading(), chunks=2)
    assert next(scores).name == "v0" and read == ["v0", "v1"]
    assert next(scores).name == "v1" and next(scores).name == "v2" and read == ["v0", "v1", "v2"]


@pytest.mark.parametrize("chunks", [2, 4])
def test_passes_are_bounded_and_the_text_side_is_computed_once(monkeypatch, chunks):
    model, passes, texts = teacher(), [], []
    forward, encode = model.forward, model.text.__class__.forward

    def counted(visual, *rest, **named):
        passes.append(len(visual))
        return forward(visual, *rest, **named)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(model.text, "forward", lambda: texts.append(1) or encode(model.text))
    list(stream_scores(model, videos(), chunks=chunks))
    assert max(passes) == chunks and sum(passes) == sum(-(-n // 24) for n in LENGTHS) and texts == [1]


def test_a_video_without_sound_is_named():
    with pytest.raises(DataError, match="v1: the model hears"):
        score_videos(teacher(), [video(0, 5), video(1, 7, sound=False)], progress=False)
    assert len(score_videos(teacher(), [video(1, 7, sound=False)], silent=True, progress=False)) == 1
    assert len(score_videos(student(), [video(1, 7, sound=False)], progress=False)) == 1


def test_no_videos_no_scores():
    assert score_videos(student(), [], progress=False) == []


def test_segments_that_the_model_does_not_know_are_named():
    scores = [VideoScores("a", np.array([0.5]), np.array([[0.5, 0.5]]))]
    codes = {"A": "normal", "B1": "fighting", "G": "explosion"}
    for code in ("G", "X"):  # of no class of the model, and no code at all
        with pytest.raises(
            DataError, match=rf"the segments name {code}, which .* cover: A \(normal\), B1 \(fighting\)$"
        ):
            evaluate(scores, np.array([0, 1]), ["normal", "fighting"], 2, [[(0, 1, code)]], codes)


def test_a_window_is_of_an_official_checkpoint(tmp_path):
    """A folder's is stored: one that is given is the same, or a mistake."""
    student().save_pretrained(tmp_path / "run" / "model")
    assert load_model(tmp_path / "run", window=8).settings()["window"] == 8
    for window in (4, 16):
        with pytest.raises(CheckpointError, match=r"run: --window is of an official \.pth; this model has 8: leave"):
            load_model(tmp_path / "run", window=window)


def test_a_file_of_a_model_folder_leads_to_the_folder(tmp_path):
    """Not said to be damaged, as a .pth would be."""
    student().save_pretrained(tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(CheckpointError, match=rf"{name} is a file of a model folder: give the folder, \S+/model$"):
            load_model(tmp_path / "model" / name)


def test_a_folder_of_runs_is_told_with_them(tmp_path):
    """As `runs`, where the README has teacher and student."""
    student().save_pretrained(tmp_path / "student" / "model")
    student().save_pretrained(tmp_path / "converted")
    (tmp_path / "plots").mkdir()
    with pytest.raises(CheckpointError, match=r"there; did you mean \S+/converted or \S+/student\?$"):
        load_model(tmp_path)


def test_a_run_that_has_not_ended_is_no_model_yet(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model: neither"):
        load_model(tmp_path)
    (tmp_path / LOGS).mkdir()  # a kill may come before the first state
    with pytest.raises(CheckpointError, match="its training has not ended; go on with --resume"):
        load_model(tmp_path)
    (tmp_path / STATE).touch()
    with pytest.raises(CheckpointError, match="holds no model yet: its training has not ended; go on with --resume"):
        load_model(tmp_path)
    student().save_pretrained(tmp_path / "model")
    load_model(tmp_path)


def test_a_model_of_a_class_of_ones_own_is_told(tmp_path):
    """The line was: does not describe a model of this library: 'Own'."""
    model = student()
    model.__class__ = type("Own", (type(model),), {})
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: 'Own' is no class of this library; its from_pretrained"):
        load_model(tmp_path)


def test_a_description_of_no_model_is_told_in_a_line(tmp_path):
    student().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for wrong in ({"length": -1}, {"length": 10**15}, {"length": 1e15}, {"window": 0}, {"window": 10**9}, {"heads": 5}):
        (tmp_path / CONFIG).write_text(json.dumps({**config, **wrong}))
        with pytest.raises(CheckpointError, match=CONFIG) as raised:
            load_model(tmp_path)
        assert "\n" not in str(raised.value)
