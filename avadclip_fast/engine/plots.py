"""Score curves over ground truth, as PNG files.

Matplotlib is imported lazily, and only its figure objects are used: no pyplot, no global backend.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.atomic import atomic_write

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito 2008, colour-blind-safe
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))  # distinguish curves also in greyscale
TRUTH_COLOUR = "#E69F00"
DPI = 150
TITLE_PER_INCH = 10  # title characters per inch of panel width


def score_curves(
    path: str | Path,
    name: str,
    scores: Mapping[str, np.ndarray],
    truth: np.ndarray | Sequence[tuple] | None = None,
    frames_per_snippet: int = 16,
) -> None:
    """Writes one PNG: a video's score curves over its shaded ground truth.

    name: the title; scores: label -> (n,) snippet scores in 0..1, each drawn over its frames_per_snippet frames
    truth: (frames,) of 0 and 1, or spans (start, end) or (start, end, class) in frames, where class 0 is normal and
    not shaded
    Raises ValueError on shapes that do not match.
    """
    _write(path, [(name, scores, truth)], frames_per_snippet, columns=1, panel=(9.0, 3.2))


def score_grid(
    path: str | Path,
    items: Sequence[tuple[str, Mapping[str, np.ndarray], np.ndarray | Sequence[tuple] | None]],
    frames_per_snippet: int = 16,
) -> None:
    """Writes one PNG with one panel per video (up to about eight stay legible) and a shared legend.

    items: (name, scores, truth) of each video, as in `score_curves`; a label has the same colour in every panel
    Raises ValueError on shapes that do not match, or without items.
    """
    if not items:
        raise ValueError("expected a video or more")
    _write(path, items, frames_per_snippet, columns=min(2, len(items)), panel=(6.4, 2.2))


def reliability_plot(
    path: str | Path, bins: Mapping[str, Sequence[Sequence[float]]], of: str = "frames", title: str = "Reliability"
) -> None:
    """Writes one PNG with a reliability diagram: the positive share against the score, equal if well calibrated.

    bins: label -> rows (mean score, share positive, share of all) from `calibrate.reliability`; the share of all sets
    the area of a marker. of: what is counted, for the label of the y axis. Raises ValueError without bins.
    """
    from matplotlib.figure import Figure

    if not bins or not all(len(rows) for rows in bins.values()):
        raise ValueError(f"expected label -> bins, got {dict(bins)}")
    figure = Figure((4.6, 5.0), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for i, (label, rows) in enumerate(bins.items()):
        score, share, mass = np.asarray(rows, np.float64).T
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(score, share, color=colour, linestyle=DASHES[i % len(DASHES)], label=plain(label))
        ax.scatter(score, share, s=12 + 300 * mass, color=colour, alpha=0.5, linewidth=0)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0, label="diagonal = calibrated")
    ax.scatter([], [], s=60, color="0.6", alpha=0.5, linewidth=0, label="dot area = share of scores")
    ax.set(xlabel="predicted score", ylabel=f"share of positive {of}", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set_title(title, fontsize=10)
    legend_below(figure, *ax.get_legend_handles_labels(), columns=2, fontsize=8)
    save(figure, path)


def save(figure, path: str | Path) -> None:
    """Writes a figure as PNG, atomically."""
    with atomic_write(path, mode="wb") as file:
        figure.savefig(file, format="png")


def legend_below(figure, handles: Sequence, labels: Sequence[str], columns: int, fontsize: float | None = None) -> None:
    """Draws a legend below all panels, where it covers no data, in `columns` columns or as many as fit the width."""
    for ncols in range(min(columns, len(labels)), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=fontsize
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def light_grid(ax, axis: str = "both") -> None:
    """Draws a grid, and no frame at the top and the right."""
    ax.grid(axis=axis, color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _write(path, items, frames_per_snippet: int, columns: int, panel: tuple[float, float]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    if frames_per_snippet < 1:
        raise ValueError(f"frames_per_snippet must be at least 1, got {frames_per_snippet}")
    panels = []
    for name, scores, truth in items:
        curves = _curves(name, scores)
        frames = frames_per_snippet * len(next(iter(curves.values())))
        panels.append((name, curves, _spans(name, truth, frames)))
    labels = list(dict.fromkeys(label for _, curves, _ in panels for label in curves))

    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)  # inches
    figure = Figure((panel[0] * columns, panel[1] * rows + 0.4), dpi=DPI, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()  # [rows * columns]
    lines: dict = {}  # label -> line, for the legend
    shaded = False
    for ax, (name, curves, spans) in zip(axes, panels, strict=False):
        lines |= _panel(ax, curves, spans, labels, frames_per_snippet)
        title = plain(name, int(panel[0] * TITLE_PER_INCH))
        ax.set_title(title, fontsize=10, fontfamily=families(title), parse_math=False)
        shaded |= len(spans) > 0
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("frame")
    for ax in axes[: len(panels) : columns]:
        ax.set_ylabel("anomaly score")

    handles = [lines[label] for label in labels]
    if shaded:
        handles.append(Patch(facecolor=TRUTH_COLOUR, alpha=0.3))
    legend_below(figure, handles, [*map(plain, labels), *(["ground truth"] if shaded else [])], columns=5)
    save(figure, path)


def _panel(ax, curves, spans, labels, frames_per_snippet: int) -> dict:
    """Draws one video; returns label -> line."""
    for start, end in spans:
        ax.axvspan(start, end, facecolor=TRUTH_COLOUR, alpha=0.3, linewidth=0, zorder=0)
    length = len(next(iter(curves.values())))
    lines = {}
    for label, curve in curves.items():
        index = labels.index(label)
        x = np.arange(len(curve) + 1) * frames_per_snippet
        lines[label] = ax.step(
            x,
            np.append(curve, curve[-1]),  # the last snippet is as wide as the others
            where="post",
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=1.5 if length <= 120 else 1.0,
        )[0]
    ax.set_xlim(0, length * frames_per_snippet)
    ax.ticklabel_format(axis="x", style="plain")  # 1000000 frames, not 1.0 beside a 1e6 in the corner
    ax.set_ylim(-0.03, 1.03)
    ax.set_yticks(np.linspace(0, 1, 5), ["0", "", "0.5", "", "1"])
    light_grid(ax)
    ax.set_axisbelow(True)
    return lines


def _curves(name: str, scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    curves = {str(label): np.asarray(curve, np.float64) for label, curve in scores.items()}
    shapes = {label: list(curve.shape) for label, curve in curves.items()}
    if not curves or any(curve.ndim != 1 or len(curve) == 0 for curve in curves.values()):
        raise ValueError(f"{name}: expected label -> scores [n], n > 0, got {shapes}")
    if len({len(curve) for curve in curves.values()}) > 1:
        raise ValueError(f"{name}: curves of one video have a score for each of its snippets; got {shapes}")
    return curves


def _spans(name: str, truth, frames: int) -> list[tuple[float, float]]:
    """Returns the (start, end) of abnormal spans in frames, from spans or a vector of `frames` values."""
    if truth is None or len(truth) == 0:
        return []
    truth = np.asarray(truth)
    if truth.ndim == 1:
        if len(truth) != frames:
            raise ValueError(f"{name}: truth of {len(truth)} frames, scores of {frames}; check frames_per_snippet")
        edges = np.flatnonzero(np.diff(truth > 0, prepend=False, append=False))
        return list(zip(edges[::2], edges[1::2], strict=True))
    if truth.dtype.kind not in "biuf":  # matplotlib would take text for the names of places on the axis
        raise ValueError(f"{name}: spans are (start, end[, class]) in numbers, class 0 normal; got {truth[0].tolist()}")
    if truth.ndim != 2 or truth.shape[1] not in (2, 3):
        raise ValueError(f"{name}: truth is a frame vector or (start, end[, class]) rows, got {list(truth.shape)}")
    return [(row[0], row[1]) for row in truth if len(row) == 2 or row[2] != 0]


def plain(text: str, longest: int = 40) -> str:
    """Returns a single printable line, shortened in the middle, since file names may contain any characters."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(char if char.isprintable() else "?" for char in text)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return text[:head] + "…" + text[head + 1 - longest :]


def families(text: str) -> list[str]:
    """Returns the font families to draw a text in: Matplotlib's own, and installed ones for letters that it lacks.

    A letter that no font has is drawn as a box.
    """
    from matplotlib import rcParams

    return [*rcParams["font.family"], *dict.fromkeys(family for letter in text if (family := _family(letter)))]


@functools.cache
def _family(letter: str) -> str:
    """The installed font family that has a letter; empty where Matplotlib's own has it, or none."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    def held(path) -> bool:
        return get_font(path).get_char_index(ord(letter)) > 0

    if held(findfont(FontProperties())):
        return ""
    fonts = _fonts()
    found = next((font for font in fonts if held(font.fname)), None)
    if found is None:
        return ""
    fonts.remove(found)
    fonts.insert(0, found)  # where the next letter, of the same script, finds it at once
    return found.name


@functools.cache
def _fonts() -> list:
    from matplotlib.font_manager import fontManager

    fonts = [font for font in fontManager.ttflist if "Last Resort" not in font.name]  # which has a box for each letter
    return sorted(fonts, key=lambda font: (font.style, font.weight) != ("normal", 400))  # as texts are drawn: first
