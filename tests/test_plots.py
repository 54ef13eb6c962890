import threading

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from avadclip_fast.data import DataError, Span
from avadclip_fast.engine import plots, report
from avadclip_fast.engine.detect import Detection
from avadclip_fast.engine.evaluate import VideoScores
from avadclip_fast.engine.timeline import timeline
from bench import plots as bench_plots

CURVES = {"teacher": np.linspace(0, 1, 30), "student": np.linspace(1, 0, 30) ** 2}
ORANGE = np.array([0.969, 0.886, 0.702])  # TRUTH_COLOUR at 0.3 on white


def shaded(path) -> np.ndarray:
    """[width] the share of each pixel column that has the ground truth's colour, legend aside."""
    image = imread(path)[..., :3]
    image = image[: int(image.shape[0] * 0.7)]
    return (np.abs(image - ORANGE).max(-1) < 0.02).mean(0)


def test_one_video_has_its_truth_shaded_and_its_size(tmp_path):
    truth = np.zeros(480)
    truth[120:240] = 1
    plots.score_curves(tmp_path / "a.png", "video", CURVES, truth)
    assert imread(tmp_path / "a.png").shape[:2] == (540, 1350)
    columns = shaded(tmp_path / "a.png") > 0.5
    assert 0.22 < columns.sum() / 1224 < 0.27, "a quarter of the axis is shaded"
    plots.score_curves(tmp_path / "b.png", "video", CURVES, [(120, 240, 3), (300, 400, 0)])
    np.testing.assert_array_equal(imread(tmp_path / "a.png"), imread(tmp_path / "b.png"), "class 0 is not shaded")


@pytest.mark.parametrize("truth", [None, [], np.zeros(480)])
def test_no_truth_shades_nothing(tmp_path, truth):
    plots.score_curves(tmp_path / "a.png", "normal", CURVES, truth)
    assert shaded(tmp_path / "a.png").max() == 0


@pytest.mark.parametrize(
    "name",
    [
        "a$b$c_{",
        "$\\frac$",
        "x" * 300,
        "",
        "two\nlines\t\x00",
        b"broken-\xe9\xff".decode("utf-8", "surrogateescape"),
        "_",
    ],
)
def test_any_name_and_label_is_drawn(tmp_path, name):
    plots.score_curves(tmp_path / "a.png", name, {name: CURVES["teacher"], "_b$": CURVES["student"]})
    assert imread(tmp_path / "a.png").shape[:2] == (540, 1350)


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_are_another_fonts(tmp_path, monkeypatch):
    name, scores = "a\u1d81", np.array([0.1, 0.9])  # its \u1d81 is in Matplotlib's STIX fonts, if in no others
    found = Detection(name, ["normal", name], np.arange(2.0), 1.0, scores, np.eye(2), np.full(2, 0.5), [])
    other = Detection("a", ["normal", name], np.arange(2.0), 1.0, scores, np.eye(2), np.full(2, 0.5), [])
    drawings = (
        lambda: plots.score_curves(tmp_path / "a.png", name, {"teacher": scores}),
        lambda: timeline(tmp_path / "b.png", found, {}),
        lambda: timeline(tmp_path / "c.png", other, {}),
    )
    for draw in drawings:
        draw()
    assert plots.families("a\u00e9") == matplotlib.rcParams["font.family"]  # which has them
    monkeypatch.setattr(plots, "_fonts", list)  # no others
    plots._family.cache_clear()
    for draw in drawings:
        with pytest.raises(UserWarning, match="Glyph 7553 .* missing"):
            draw()
    plots._family.cache_clear()


def test_long_names_keep_both_ends():
    assert plots.plain("a" * 100 + "_label_B1", 30) == "a" * 14 + "…" + "aaaaaa_label_B1"
    assert len(plots.plain("b" * 1000, 64)) == 64
    assert plots.plain("c" * 64, 64) == "c" * 64


def test_grid_has_a_panel_a_video(tmp_path):
    items = [(f"v{i}", {"teacher": np.full(n, 0.5)}, [(0, 16)]) for i, n in enumerate((1, 3, 500))]
    plots.score_grid(tmp_path / "grid.png", items)
    height, width = imread(tmp_path / "grid.png").shape[:2]
    assert (height, width) == (720, 1920)
    plots.score_grid(tmp_path / "one.png", items[:1], frames_per_snippet=16)
    assert imread(tmp_path / "one.png").shape[1] == 960


def test_frames_of_long_videos_are_written_out(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.score_curves("s.png", "day", {"binary": np.full(100_000, 0.5)})
    drawn[0].draw_without_rendering()
    axis = drawn[0].axes[0].xaxis
    assert axis.get_offset_text().get_text() == "" and axis.get_ticklabels()[-1].get_text() == "1600000"


def test_legends_fit(monkeypatch):
    drawn = []
    for module in (plots, bench_plots):
        monkeypatch.setattr(module, "save", lambda figure, path: drawn.append(figure))
    labels = [f"{model}, {sound}" for model in ("teacher", "student") for sound in ("with sound", "without sound")]
    plots.score_grid("g.png", [("v", dict.fromkeys(labels, np.full(9, 0.5)), [(0, 16)])])
    plots.score_curves("s.png", "v", {f"{i}$" * 100: np.full(9, 0.5) for i in range(9)})
    plots.reliability_plot("r.png", {f"{i}" * 100: [[0.1, 0.2, 1.0]] for i in range(3)})
    bench_plots.bar_groups("b.png", {"AP": {"a": {str(i) * 40: (1, 0) for i in range(4)}}}, "", "")
    for figure in drawn:
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert len(figure.legends) == 1 and 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_reliability_and_bars(tmp_path):
    plots.reliability_plot(
        tmp_path / "r.png", {"before": [[0.1, 0.2, 0.5], [0.9, 0.7, 0.5]], "after": [[0.5, 0.5, 1.0]]}
    )
    bars = {"AP": {"a": {"x": (3, 1), "y": (2, 0.5)}, "b": {"x": (1, 0.1)}}}
    bench_plots.bar_groups(tmp_path / "b.png", bars, "", "")
    for name in ("r", "b"):
        image = imread(tmp_path / f"{name}.png")[..., :3]
        for colour in plots.COLOURS[:2]:
            wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            assert (np.abs(image - wanted).max(-1) < 0.02).any(), "two labels, two colours"
    with pytest.raises(ValueError, match="bins"):
        plots.reliability_plot(tmp_path / "none.png", {})


def test_reliability_says_what_dots_and_diagonal_mean(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.reliability_plot("r.png", {"binary": [[0.1, 0.2, 0.5], [0.9, 0.7, 0.5]]})
    plots.reliability_plot("r.png", {"_$a$": [[0.1, 0.2, 1.0]]}, "videos", "of a student")
    frames, videos = (figure.axes[0] for figure in drawn)
    assert (frames.get_title(), frames.get_ylabel()) == ("Reliability", "share of positive frames")
    assert (videos.get_title(), videos.get_ylabel()) == ("of a student", "share of positive videos")
    said = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert said == ["binary", "diagonal = calibrated", "dot area = share of scores"]


def test_bars_stand_at_their_groups_names_and_titles_fit(monkeypatch):
    drawn = []
    monkeypatch.setattr(bench_plots, "save", lambda figure, path: drawn.append(figure))
    both, one = {"x": (3, 1), "y": (2, 0.5)}, {"z": (1, 0.1)}
    title = "Frame AP of everything that was held out, %"
    bench_plots.bar_groups("b.png", {"teacher": {"a": both}, "student": {"a": one, "b" * 50: both}}, title, "AP")
    (figure,) = drawn
    upper, lower = figure.axes
    assert (upper.get_title(), lower.get_title(), lower.get_xlabel()) == ("teacher", "student", "AP")
    middles = [bar.get_y() + bar.get_height() / 2 for bar in lower.patches]
    np.testing.assert_allclose([middles[0], np.mean(middles[1:])], [0, 1], atol=1e-9)
    figure.draw_without_rendering()
    for text in (figure._suptitle, *lower.get_yticklabels(), *upper.get_yticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text


def test_variants_of_ours_are_drawn_as_faster(monkeypatch):
    """As often as the tables say, and not where the official code was not timed."""
    drawn = []
    monkeypatch.setattr(bench_plots, "save", lambda figure, path: drawn.append(figure))
    times = {"a": {"official": 4.0, "ours": 1.0, "ours, masked": 0.5}, "b": {"ours": 1.0, "ours, masked": 0.7}}
    rows = [{"case": c, "alternative": n, "over_ours": t} for c, of in times.items() for n, t in of.items()]
    bench_plots.speedups("s.png", rows)
    (ax,) = drawn[0].axes
    assert [bar.get_width() for bar in ax.patches] == [4, 8]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["this library", "this library, masked"]


def test_a_roofline_names_its_roofs(monkeypatch):
    drawn = []
    monkeypatch.setattr(bench_plots, "save", lambda figure, path: drawn.append(figure))
    roofs = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
    row = {"bytes": 1e9, "flops": 1e12, "median_ms": 1.0, "over_ours": 1, "roofs": roofs}
    bench_plots.roofline("r.png", [{"bench": "bench_exp", "rows": [row]}])
    said = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert said == ["exp", "roofs: copy and matrix product, in the same run"]


def test_near_markers_of_a_row_do_not_hide_each_other():
    places = [(1.01, 0), (1.0, 0), (3.0, 0), (1.0, 1)]
    up, down, *alone = bench_plots._heights(places, 0.1)
    assert alone == [0, 1] and up - down == pytest.approx(bench_plots.APART) and up + down == 0


def test_videos_with_positive_frames_are_drawn_first(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "score_curves", lambda path, name, curves, truth, every: drawn.update({name: truth}))
    scores = [VideoScores(f"v{i}", np.zeros(i + 1), np.ones((i + 1, 2))) for i in range(8)]
    truth = np.zeros(4 * 36)
    truth[[4 * 3, 4 * 35]] = 1  # in v2 and v7
    paths = report.draw(scores, truth, 4, tmp_path)
    assert [path.stem for path in paths] == list(drawn) == ["v2", "v7", "v0", "v1", "v3"]
    assert all(len(part) == 4 * (int(name[1:]) + 1) for name, part in drawn.items())
    assert [int(drawn[name].sum()) for name in drawn] == [1, 1, 0, 0, 0]
    assert [path.stem for path in report.draw(scores, truth, 4, tmp_path, ["v4", "v1"])] == ["v4", "v1"]
    with pytest.raises(DataError, match="no video named w"):
        report.draw(scores, truth, 4, tmp_path, ["w"])


def test_errors_name_the_video(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="vid: truth of 100 frames, scores of 480"):
        plots.score_curves(path, "vid", CURVES, np.zeros(100))
    with pytest.raises(ValueError, match="vid: expected label"):
        plots.score_curves(path, "vid", {"x": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="vid: expected label"):
        plots.score_curves(path, "vid", {})
    with pytest.raises(ValueError, match=r"vid: curves of one video .* got \{'x': \[3\], 'y': \[2\]\}"):
        plots.score_curves(path, "vid", {"x": np.zeros(3), "y": np.zeros(2)})
    with pytest.raises(ValueError, match="vid: truth is"):
        plots.score_curves(path, "vid", CURVES, np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"vid: spans are .* in numbers.*got \['0', '9', 'B1'\]"):
        plots.score_curves(path, "vid", CURVES, [Span(0, 9, "B1")])
    with pytest.raises(ValueError, match="frames_per_snippet"):
        plots.score_curves(path, "vid", CURVES, frames_per_snippet=0)
    with pytest.raises(ValueError, match="a video or more"):
        plots.score_grid(path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        plots.score_curves(path, "v", CURVES)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    worker = threading.Thread(target=plots.score_curves, args=(tmp_path / "a.png", "v", CURVES))
    worker.start()
    worker.join()
    assert (tmp_path / "a.png").stat().st_size > 0
    assert dict(matplotlib.rcParams) == before
