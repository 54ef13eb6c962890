import json

import numpy as np
import pytest
import torch

from avadclip_fast import data
from avadclip_fast.data import DataError, FeatureSet, make_synthetic

CODES = {code: data.XD_VIOLENCE[code] for code in ("A", "B1", "B2", "G")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_synthetic(folder, videos=48, test_videos=64)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_it_is_in_the_official_form(made):
    for part, count in (("train", 48), ("test", 64)):
        rows = data.read_list(made / f"{part}.csv")
        assert len(rows) == count and sum(row.label == "A" for row in rows) == count // 2
        assert all(np.load(row.visual).dtype == np.float16 for row in rows)
    assert data.check_list(made / "train.csv", CODES) == []
    assert data.check_list(made / "test.csv", CODES, frame_gt=made / "gt.npy") == []
    labels = {row.label for row in data.read_list(made / "train.csv")}
    assert any(label.count("0") == 1 for label in labels), "no video has two classes"
    assert any(label.count("0") == 2 for label in labels)


def test_truth_spans_and_labels_agree(made):
    rows, spans = data.read_list(made / "test.csv"), data.read_spans(made / "gt_segments.json")
    info = json.loads((made / "info.json").read_text())
    truth, at = data.read_frame_gt(made / "gt.npy"), 0
    assert (info["test"]["frames"], info["test"]["positive"]) == (len(truth), truth.sum())
    for row, own, shown in zip(rows, spans, info["test"]["shown"], strict=True):
        frames = 16 * data.snippet_count(row.visual)
        anomalies = [span for span in own if span.code != "A"]
        expected = np.zeros(frames, np.float32)
        for start, end, _ in anomalies:
            assert not expected[start:end].any(), "anomalies overlap"
            expected[start:end] = 1
        np.testing.assert_array_equal(truth[at : at + frames], expected)
        assert {span.code for span in own} == set(row.label.split("-")) - {"0"}
        assert shown["video"] == row.visual.stem and len(shown["anomalies"]) == len(anomalies)
        assert anomalies or own == [(0, frames, "A")]
        at += frames
    assert at == len(truth) and 0.05 < truth.mean() < 0.4
    assert {mode for shown in info["test"]["shown"] for mode in shown["anomalies"]} == {"visible", "audible", "both"}


def test_same_arguments_same_bytes(tmp_path):
    small = {"videos": 5, "test_videos": 3, "width": 64, "min_snippets": 16, "max_snippets": 20}
    for name, options in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"videos": 7})):
        make_synthetic(tmp_path / name, **(small | options))
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b") != contents(tmp_path / "c")
    make_synthetic(tmp_path / "a", **small)
    assert contents(tmp_path / "a") == first
    more = contents(tmp_path / "d")
    assert all(more[name] == first[name] for name in first if name.endswith("__v.npy") or name.startswith("gt"))


def ranked(made, stream, mode=None):
    """AP of the best linear detector of a stream: fitted to frames of one half of the test videos, tried on the other.

    mode: count the anomalies of that mode alone, and leave the others out.
    """
    rows, spans = data.read_list(made / "test.csv"), data.read_spans(made / "gt_segments.json")
    shown = json.loads((made / "info.json").read_text())["test"]["shown"]
    x, y, half = [], [], []
    for i, (row, own, modes) in enumerate(zip(rows, spans, shown, strict=True)):
        streams = {"visual": [row.visual], "audio": [row.audio], "both": [row.visual, row.audio]}[stream]
        features = [data.load_features(path) for path in streams]
        features = np.concatenate([f / np.linalg.norm(f, axis=1, keepdims=True) for f in features], axis=1)
        truth = np.zeros(len(features))
        for (start, end, _), m in zip(own, modes["anomalies"], strict=False):
            truth[start // 16 : end // 16] = 1 if mode in (None, m) else np.nan
        x.append(features)
        y.append(truth)
        half.append(np.full(len(truth), i % 4 < 2))
    x, y, half = np.concatenate(x), np.concatenate(y), np.concatenate(half)
    x = np.hstack([x, np.ones((len(x), 1))])
    fit, test = half & ~np.isnan(y), ~half & ~np.isnan(y)
    w = np.linalg.solve(x[fit].T @ x[fit] + 0.1 * np.eye(x.shape[1]), x[fit].T @ y[fit])
    hits = y[test][np.argsort(-(x[test] @ w), kind="stable")]
    return (np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits > 0].mean(), hits.mean()


def test_sound_matters_and_the_task_is_not_trivial(made):
    (both, chance), (visual, _), (audio, _) = (ranked(made, s) for s in ("both", "visual", "audio"))
    assert visual > chance + 0.2 and audio > chance + 0.2
    assert both > visual + 0.1 and both > audio + 0.05
    assert both < 0.99


def test_what_is_only_heard_is_faint_but_there(made):
    seen, chance = ranked(made, "visual", "audible")
    heard, _ = ranked(made, "audio", "audible")
    assert chance + 0.03 < seen < heard - 0.1


def test_it_trains_in_memory(made):
    features = FeatureSet.load(data.read_list(made / "train.csv"), CODES, 64)
    assert features.visual.shape == (48, 64, 512) and features.labels.sum(0).min() > 0
    assert features.batch(torch.arange(4)).audio.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ("normal", "juggling")}, "juggling.*fighting"),
        ({"classes": ("fighting", "normal")}, "normal first"),
        ({"classes": ("normal",)}, "normal first"),
        ({"width": 8}, "width"),
        ({"min_snippets": 3}, "min_snippets"),
        ({"min_snippets": 50, "max_snippets": 40}, "min_snippets"),
        ({"seed": -1}, "seed"),
        ({"videos": -1}, "videos"),
        ({"frames_per_snippet": 0}, "frames_per_snippet"),
    ],
)
def test_arguments_refused(tmp_path, options, words):
    with pytest.raises(DataError, match=words):
        make_synthetic(tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_other_classes_and_no_test_videos(tmp_path):
    make_synthetic(tmp_path, videos=4, test_videos=0, classes=("normal", "riot"), width=64, frames_per_snippet=4)
    assert {row.label for row in data.read_list(tmp_path / "train.csv")} == {"A", "B4-0-0"}
