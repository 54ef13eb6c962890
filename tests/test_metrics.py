import csv
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from avadclip_fast.data import Span
from avadclip_fast.engine import metrics
from avadclip_fast.engine.metrics import detection_map, evaluate_scores, format_table, frame_ap

XD_CLASSES = ["A", "B1", "B2", "B4", "B5", "B6", "G"]


def plain_detection_map(scores, spans, frames_per_snippet):
    """The definition frame by frame, non-maximum suppression and sets of frames included: [IoUs, C] in percent."""
    frames = [np.repeat(np.asarray(p, np.float64), frames_per_snippet, axis=0) for p in scores]
    table = []
    for least in metrics.IOUS:
        row = []
        for c in range(frames[0].shape[1]):
            proposals = []
            for b, video in enumerate(frames):
                s = video[:, c].tolist()
                n = len(s)
                if n // 16 == 0:
                    continue
                top_mean = sum(sorted(s, reverse=True)[: n // 16]) / (n // 16)
                if not top_mean > 0:
                    continue
                threshold = max(s) - 0.6 * (max(s) - min(s))
                own, t = [], 0
                while t < n:
                    end = t
                    while end < n and s[end] > threshold:
                        end += 1
                    if end - t >= 2:
                        own.append((max(s[t:end]) + 0.7 * top_mean, b, t, end))
                    t = end + 1
                kept = []
                for p in sorted(own, key=lambda p: -p[0]):
                    if all(iou(p[2:], q[2:]) <= 0.6 for q in kept):
                        kept.append(p)
                proposals += sorted(kept, key=lambda p: p[2])
            proposals.sort(key=lambda p: -p[0])
            truths = [(b, start, end) for b, own in enumerate(spans) for start, end, k in own if k == c]
            total, hits, summed = len(truths), 0, 0.0
            for seen, (_, b, start, end) in enumerate(proposals, 1):
                fits = [(iou((start, end), truth[1:]), -j) for j, truth in enumerate(truths) if truth[0] == b]
                fits = [fit for fit in fits if fit[0] >= least]
                if fits:
                    del truths[-max(fits)[1]]
                    hits += 1
                    summed += hits / seen
            row.append(100 * summed / total if total else 0.0)
        table.append(row)
    return np.array(table)


def iou(first, second):
    a, b = set(range(*first)), set(range(*second))
    return len(a & b) / len(a | b)


@st.composite
def detection_cases(draw):
    """Ties, constant scores, one-snippet and very short videos, classes and videos without truth."""
    frames_per_snippet = draw(st.sampled_from([1, 2, 3, 4, 16, 20]))
    classes = draw(st.integers(1, 3))
    scores, spans = [], []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 24))
        cells = st.integers(0, draw(st.sampled_from([0, 1, 8])))
        values = draw(st.lists(cells, min_size=n * classes, max_size=n * classes))
        scores.append(np.array(values, np.float32).reshape(n, classes) / 8)  # eighths sum exactly: ties stay ties
        frames = n * frames_per_snippet
        own = []
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, frames - 1))
            own.append((start, draw(st.integers(start + 1, frames + 8)), draw(st.integers(0, classes - 1))))
        spans.append(own)
    return scores, spans, frames_per_snippet


@settings(max_examples=150, deadline=None)
@given(detection_cases())
def test_detection_map_is_the_plain_definition(case):
    scores, spans, frames_per_snippet = case
    result = detection_map(scores, spans, frames_per_snippet)
    np.testing.assert_allclose(result.per_class, plain_detection_map(scores, spans, frames_per_snippet), atol=1e-9)
    np.testing.assert_allclose(result.map_at_iou, result.per_class.mean(1), atol=1e-12)
    assert result.average == pytest.approx(result.map_at_iou.mean())
    assert result.truths.sum() == sum(map(len, spans))


def smooth_case(seed, frames_per_snippet=16):
    """Scores that follow their spans, with noise: softmax-like, so that hits and misses are mixed."""
    rng = np.random.default_rng(seed)
    scores, spans = [], []
    for _ in range(12):
        n = int(rng.integers(5, 60))
        own, logits = [], rng.normal(0, 0.5, (n, 4))
        for _ in range(rng.integers(0, 4)):
            start = int(rng.integers(0, n - 2)) * frames_per_snippet
            end = start + int(rng.integers(1, n * frames_per_snippet // 2))
            c = int(rng.integers(0, 4))
            logits[start // frames_per_snippet : end // frames_per_snippet + 1, c] += 2
            own.append((start, end, c))
        p = np.exp(logits)
        scores.append((p / p.sum(1, keepdims=True)).astype(np.float32))
        spans.append(own)
    return scores, spans


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("frames_per_snippet", [4, 16])
def test_detection_map_on_noisy_scores(seed, frames_per_snippet):
    scores, spans = smooth_case(seed, frames_per_snippet=frames_per_snippet)
    result = detection_map(scores, spans, frames_per_snippet)
    assert 0 < result.average < 100
    np.testing.assert_allclose(result.per_class, plain_detection_map(scores, spans, frames_per_snippet), atol=1e-9)


def test_a_perfect_detection_is_100_and_another_class_is_not():
    scores = np.full((20, 2), 0.1)
    scores[5:10, 1] = 0.9
    result = detection_map([scores], [[(80, 160, 1)]])
    np.testing.assert_array_equal(result.per_class, [[0, 100]] * 5)
    assert result.average == 50, "the class without truth counts"
    assert detection_map([scores], [[(80, 160, 1)]], ious=[1.0]).average == 50
    np.testing.assert_array_equal(result.truths, [0, 1])


def test_iou_counts_frames_with_exclusive_ends_and_meets_its_threshold():
    scores = np.full((20, 1), 0.1)
    scores[0:1] = 0.9  # frames 0..15
    for end, expected in ((32, [100] * 5), (33, [100, 100, 100, 100, 0]), (160, [100, 0, 0, 0, 0])):
        assert detection_map([scores], [[(0, end, 0)]]).map_at_iou.tolist() == expected
    assert detection_map([scores], [[(0, 1000, 0)]], ious=[0.016]).average == 100, "a truth counts beyond the video"
    assert detection_map([scores], [[(0, 1001, 0)]], ious=[0.016]).average == 0


def test_short_and_constant_videos_propose_nothing():
    ramp = np.linspace(0.1, 0.9, 3)[:, None]
    assert detection_map([ramp], [[(4, 12, 0)]], frames_per_snippet=4).average == 0, "12 frames: no top mean"
    assert detection_map([ramp], [[(32, 48, 0)]], frames_per_snippet=16).average > 0
    assert detection_map([np.full((30, 1), 0.7)], [[(0, 480, 0)]]).average == 0
    run_of_one = np.eye(40)[:, :1] + 0.1
    assert detection_map([run_of_one], [[(0, 1, 0)]], frames_per_snippet=1).average == 0, "runs have 2 frames or more"


def test_equal_scores_keep_the_order_of_videos():
    p = np.full((20, 1), 0.1)
    p[3:6] = 0.9
    first = detection_map([p, p], [[(48, 96, 0)], []]).average
    second = detection_map([p, p], [[], [(48, 96, 0)]]).average
    assert (first, second) == (100, 50)


def test_inputs_are_left_alone():
    scores, spans = smooth_case(9)
    copies = [p.copy() for p in scores]
    detection_map(scores, spans)
    assert all(np.array_equal(a, b) for a, b in zip(scores, copies, strict=True))


class Counted(np.ndarray):
    """Counts the numbers that are compared, computed or picked."""

    work = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        found = getattr(ufunc, method)(*plain, **options)
        Counted.work += np.size(found)
        return found

    def __getitem__(self, at):
        found = super().__getitem__(at)
        Counted.work += np.size(found)
        return found


def test_twice_as_many_videos_take_twice_the_work():
    """Not four times: each video's spans and proposals are looked for once, not among those of all videos."""

    def work(videos):
        start, end = np.zeros(videos, np.int64), np.full(videos, 32)
        video = np.arange(videos)
        truths = np.stack([video, start, end], 1).view(Counted)
        Counted.work = 0
        hits = metrics._match(video.view(Counted), start, end, truths, metrics.IOUS)
        ap = metrics._class_ap(np.tile([0.9, 0.1, 0.8], videos), truths, 3 * video, np.full(videos, 3), 16)
        assert hits.all() and 0 < ap < 1
        return Counted.work

    assert work(400) < 3 * work(200)


@pytest.mark.parametrize(
    ("scores", "spans", "options", "words"),
    [
        ([], [], {}, "no videos"),
        ([np.zeros((3, 2))], [], {}, "spans of 0 videos, scores of 1"),
        ([np.zeros((3, 2)), np.zeros((3, 3))], [[], []], {}, "video 1"),
        ([np.zeros((0, 2))], [[]], {}, "video 0"),
        ([np.full((3, 2), np.nan)], [[]], {}, "finite"),
        ([np.zeros((3, 2))], [[(0, 4, 2)]], {}, "class < 2"),
        ([np.zeros((3, 2))], [[(4, 4, 0)]], {}, "start < end"),
        ([np.zeros((3, 2))], [[(-1, 4, 0)]], {}, "0 <= start"),
        ([np.zeros((3, 2))], [[(0, 4, -1)]], {}, "class < 2"),
        ([np.zeros((3, 2))], [[(0, 4)]], {}, "class"),
        ([np.zeros((3, 2))], [[Span(0, 4, "B1")]], {}, r"class < 2.*got \[0, 4, 'B1'\]"),
        ([np.zeros((3, 2))], [[(0.5, 2.5, 1)]], {}, r"whole frames.*got \[0.5, 2.5, 1\]"),
        ([np.zeros((3, 2))], [[(0, np.inf, 1)]], {}, "whole frames"),
        ([np.zeros((3, 2))], [[]], {"ious": [0.0]}, "ious"),
        ([np.zeros((3, 2))], [[]], {"ious": []}, "ious"),
        ([np.zeros((3, 2))], [[]], {"frames_per_snippet": 0}, "frames_per_snippet"),
        ([np.zeros((3, 2))], [[]], {"frames_per_snippet": 12.5}, "a whole number of at least 1, got 12.5"),
    ],
)
def test_detection_errors_say_what_was_wrong(scores, spans, options, words):
    with pytest.raises(ValueError, match=words):
        detection_map(scores, spans, **options)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_frame_metrics_are_scikit_learns_on_repeated_scores(data):
    n = data.draw(st.integers(1, 20))
    frames = data.draw(st.sampled_from([1, 3, 16]))
    scores = np.array(data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)), np.float32) / 7
    truth = np.array(data.draw(st.lists(st.booleans(), min_size=n * frames, max_size=n * frames)), np.float32)
    found = evaluate_scores([scores], [scores[:, None]], truth, frames_per_snippet=frames)["binary"]
    if truth.min() == truth.max():
        assert math.isnan(frame_ap(scores, truth, frames)) and found["ap"] is found["auc"] is None
        return
    repeated = np.repeat(scores, frames)
    assert frame_ap(scores, truth, frames) == found["ap"]
    assert found["ap"] == pytest.approx(average_precision_score(truth, repeated), abs=1e-12)
    assert found["auc"] == pytest.approx(roc_auc_score(truth, repeated), abs=1e-12)


def test_frame_metric_errors():
    with pytest.raises(ValueError, match="5 frames.*4 snippets x 1 = 4"):
        frame_ap(np.zeros(4), np.zeros(5))
    with pytest.raises(ValueError, match="0 and 1"):
        frame_ap(np.zeros(2), np.array([0, 2]))
    with pytest.raises(ValueError, match="finite"):
        frame_ap(np.array([0, np.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match="shape"):
        frame_ap(np.zeros((2, 1)), np.zeros(2))


def evaluation_case(frames_per_snippet=16):
    scores, spans = smooth_case(3, frames_per_snippet=frames_per_snippet)
    spans = [
        [(a, min(b, len(p) * frames_per_snippet), c) for a, b, c in own] for p, own in zip(scores, spans, strict=True)
    ]
    spans = [own or [(0, len(p) * frames_per_snippet, 0)] for p, own in zip(scores, spans, strict=True)]
    truth = [np.zeros(len(p) * frames_per_snippet) for p in scores]
    for vector, own in zip(truth, spans, strict=True):
        for start, end, c in own:
            vector[start:end] = c > 0 or vector[start:end]
    anomaly = [p[:, 1:].max(1) for p in scores]
    return anomaly, scores, truth, spans


@pytest.mark.parametrize("frames_per_snippet", [4, 16, np.int64(16)])
def test_evaluate_scores_gathers_every_number(frames_per_snippet):
    anomaly, scores, truth, spans = evaluation_case(frames_per_snippet)
    names = ["normal", "b", "c", "d"]
    result = evaluate_scores(anomaly, scores, np.concatenate(truth), spans, names, frames_per_snippet)
    assert json.loads(json.dumps(result, allow_nan=False)) == result

    full = np.concatenate(truth)
    abnormal = [b for b, vector in enumerate(truth) if vector.any()]
    assert (result["videos"], result["abnormal_videos"]) == (len(scores), len(abnormal))
    assert (result["frames"], result["positive_frames"]) == (len(full), full.sum())
    for branch, parts in (("align", [1 - p[:, 0] for p in scores]), ("binary", anomaly)):
        repeated = [np.repeat(p, frames_per_snippet) for p in parts]
        alone = np.concatenate([truth[b] for b in abnormal]), np.concatenate([repeated[b] for b in abnormal])
        assert result[branch] == pytest.approx(
            {
                "ap": average_precision_score(full, np.concatenate(repeated)),
                "auc": roc_auc_score(full, np.concatenate(repeated)),
                "abnormal_ap": average_precision_score(*alone),
                "abnormal_auc": roc_auc_score(*alone),
            },
            abs=1e-12,
        )

    for c, name in enumerate(names):
        own_truth, own_scores = [], []
        for p, own in zip(scores, spans, strict=True):
            inside = np.zeros(len(p) * frames_per_snippet)
            for start, end, k in own:
                if k == c:
                    inside[start:end] = 1
            if inside.any():
                own_truth.append(inside)
                own_scores.append(np.repeat(p[:, c], frames_per_snippet))
        expected = average_precision_score(np.concatenate(own_truth), np.concatenate(own_scores))
        assert result["class_ap"][name] == pytest.approx(expected, abs=1e-12)

    detection = detection_map(scores, spans, frames_per_snippet)
    assert result["detection"]["average"] == detection.average
    assert result["detection"]["per_class"]["c"] == detection.per_class[:, 2].tolist()
    assert result["detection"]["truths"] == dict(zip(names, detection.truths.tolist(), strict=True))
    cells = next(line for line in format_table(result).splitlines() if line.startswith("c ")).split()
    assert cells[-3] == f"{detection.per_class[:, 2].mean():.2f}"  # its average over the IoUs
    table = format_table(result)
    assert f"{100 * result['align']['ap']:.2f}" in table and f"{detection.average:.2f}" in table
    assert max(map(len, table.splitlines())) <= 80 and "no span" not in table


def test_evaluate_scores_without_spans_and_with_one_class():
    anomaly, scores, truth, _ = evaluation_case()
    result = evaluate_scores(anomaly, scores, np.concatenate(truth))
    assert "detection" not in result and "class_ap" not in result
    assert "detection" not in format_table(result)
    result = evaluate_scores(anomaly, scores, np.zeros(sum(map(len, truth))), [[] for _ in scores])
    assert result["align"] == {"ap": None, "auc": None, "abnormal_ap": None, "abnormal_auc": None}
    assert result["detection"]["average"] == 0 and set(result["class_ap"].values()) == {None}
    json.dumps(result, allow_nan=False)
    assert " - " in format_table(result)
    named = ", ".join(result["detection"]["truths"])
    assert format_table(result).endswith(f"\nthe mean counts as 0 what has no span: {named}")


def test_evaluate_scores_errors():
    anomaly, scores, truth, spans = evaluation_case()
    frames = sum(map(len, truth))
    with pytest.raises(ValueError, match=rf"{frames} frames.* = {frames // 4} frames; check --frames-per-snippet"):
        evaluate_scores(anomaly, scores, np.concatenate(truth), frames_per_snippet=4)
    with pytest.raises(ValueError, match="same videos"):
        evaluate_scores(anomaly[:-1], scores, np.concatenate(truth))
    with pytest.raises(ValueError, match="4 distinct class names"):
        evaluate_scores(anomaly, scores, np.concatenate(truth), spans, ["a", "b", "c", "c"])
    with pytest.raises(ValueError, match=r"give softmax\(logits\), not logits"):
        evaluate_scores(anomaly, [np.log(p) for p in scores], np.concatenate(truth))
    with pytest.raises(ValueError, match="a whole number of at least 1, got 16.0"):
        evaluate_scores(anomaly, scores, np.concatenate(truth), frames_per_snippet=16.0)
    anomaly[0] = anomaly[0] * np.nan
    with pytest.raises(ValueError, match="finite"):
        evaluate_scores(anomaly, scores, np.concatenate(truth))


@pytest.fixture
def xd(shared):
    """Frames a video, the frame truth by video and the spans of the 800 XD-Violence test videos."""
    from avadclip_fast.data.ground_truth import segments

    folder = shared / "data" / "xd_violence"
    with open(folder / "test_videos.csv", newline="") as file:
        frames = np.array([int(row["gt_frames"]) for row in csv.DictReader(file)])
    with np.load(folder / "gt_xd.npz") as file:
        truth = np.split(file[file.files[0]], np.cumsum(frames)[:-1])
    official = segments(folder / "gt_xd_segment.npy", folder / "gt_xd_label.npy")
    spans = [[(start, end, XD_CLASSES.index(code)) for start, end, code in video] for video in official]
    return frames, truth, spans


def test_golden_scores_give_the_official_numbers(shared, xd):
    frames, truth, spans = xd
    with np.load(shared / "parity" / "golden_eval.npz") as file:
        golden = dict(file)
    index = golden["video_index"]
    np.testing.assert_array_equal(golden["snippets"] * 16, frames[index])
    scores = np.split(golden["scores"], np.cumsum(golden["snippets"])[:-1])
    result = evaluate_scores(
        [1 - p[:, 0] for p in scores], scores, np.concatenate([truth[b] for b in index]), [spans[b] for b in index]
    )
    assert result["detection"]["iou"] == pytest.approx(golden["iou"])
    assert result["detection"]["map"] == pytest.approx(golden["map_at_iou"], abs=1e-6)
    assert result["detection"]["average"] == pytest.approx(float(golden["map_avg"]), abs=1e-6)
    for branch in ("align", "binary"):
        assert result[branch]["ap"] == pytest.approx(float(golden["ap"]), abs=1e-9)
        assert result[branch]["auc"] == pytest.approx(float(golden["auc"]), abs=1e-9)


def test_all_800_videos_take_less_than_10_seconds(xd):
    frames, truth, spans = xd
    rng = np.random.default_rng(0)
    scores = []
    for n, own in zip(frames // 16, spans, strict=True):
        logits = rng.normal(0, 1, (n, 7))  # rough scores make many proposals
        for start, end, c in own:
            logits[start // 16 : -(-end // 16), c] += 3
        p = np.exp(logits)
        scores.append((p / p.sum(1, keepdims=True)).astype(np.float32))
    truth = np.concatenate(truth)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = evaluate_scores([1 - p[:, 0] for p in scores], scores, truth, spans, XD_CLASSES)
        seconds.append(time.perf_counter() - start)
    assert (result["frames"], result["positive_frames"]) == (2_331_296, 537_882)
    assert result["detection"]["average"] > 1
    assert min(seconds) < 10, f"took {seconds}"
