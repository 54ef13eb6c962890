"""Plots the detection in a video: score over time, events, the model that scored each part, and key frames."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .detect import Detection, Event, time_code
from .plots import COLOURS, DPI, TITLE_PER_INCH, TRUTH_COLOUR, families, legend_below, light_grid, plain, save

WIDTH = 9.0  # inches
PLOT = 8.0  # inches, a little less than what the labels beside the plot leave of it
SPACE = 0.15  # inches between event names
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)  # of time, seconds
TICKS = 10  # at most


def timeline(path: str | Path, detection: Detection, frames: Mapping[int, np.ndarray]) -> None:
    """Writes one PNG. frames: snippet index -> image (H, W, 3) uint8, shown above the curve in order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    figure = Figure((WIDTH, 4.6), dpi=DPI, layout="constrained")
    title = plain(detection.name, int(WIDTH * TITLE_PER_INCH))
    figure.suptitle(title, fontsize=10, fontfamily=families(title), parse_math=False)
    grid = figure.add_gridspec(2, max(1, len(frames)), height_ratios=(1, 1.5))
    for column, (snippet, image) in enumerate(sorted(frames.items())):
        ax = figure.add_subplot(grid[0, column])
        ax.imshow(image)
        ax.set_title(f"{time_code(detection.times[snippet])[:-2]}  score {detection.scores[snippet]:.2f}", fontsize=8)
        ax.set_axis_off()
    ax = figure.add_subplot(grid[1, :])
    edges, scores, thresholds, _ = detection.curve()
    low, high = -0.1, 1.12
    events = detection.events()
    spans = [(event.start, event.end - event.start) for event in events]
    if spans:
        ax.broken_barh(spans, (low, high - low), facecolor=TRUTH_COLOUR, alpha=0.3, linewidth=0, label="event")
    _name_events(ax, FigureCanvasAgg(figure).get_renderer(), events, edges[0], edges[-1])
    unheard: dict[str, list[float]] = {}  # label -> starts and ends of the parts, with a hole after each
    for part, start, end in detection.timed_parts():
        if part.by != "teacher":
            unheard.setdefault(f"{part.by}: {part.why}", []).extend((start, end, np.nan))
    for colour, (label, times) in zip(COLOURS[1:], unheard.items(), strict=False):
        ax.plot(times, np.full(len(times), -0.05), color=colour, linewidth=4, solid_capstyle="butt", label=label)
    ax.step(edges, np.append(scores, scores[-1]), where="post", color=COLOURS[0], label="score")
    ax.step(
        edges, np.append(thresholds, thresholds[-1]), where="post", color="0.4", linewidth=0.8, linestyle="--",
        label="threshold",
    )  # fmt: skip
    ax.set(xlim=(edges[0], edges[-1]), ylim=(low, high), ylabel="1 - p(normal)")
    hours = edges[-1] >= 3600
    step = next((step for step in STEPS if (edges[-1] - edges[0]) / step <= TICKS), STEPS[-1])
    ax.xaxis.set_major_locator(MultipleLocator(step))
    ax.xaxis.set_major_formatter(lambda x, _: _clock(x, hours, decimals=step < 1))
    ax.set_xlabel("time (h:mm:ss)" if hours else "time (m:ss)")
    light_grid(ax)
    handles, labels = ax.get_legend_handles_labels()
    legend_below(figure, handles, labels, columns=len(labels), fontsize=8)
    save(figure, path)


def _name_events(ax: Any, renderer: Any, events: Sequence[Event], start: float, end: float) -> None:
    """Writes the names of events above the curve, which goes from start to end (seconds)."""
    from matplotlib.font_manager import FontProperties

    inch = (end - start) / PLOT  # seconds

    @functools.cache  # a day has thousands of events, of a few names
    def width(name: str) -> float:
        pixels = renderer.get_text_width_height_descent(name, FontProperties(family=families(name), size=8), False)[0]
        return (pixels / DPI + SPACE) * inch

    for middle, name in _apart(events, start, end, width):
        ax.text(middle, 1.04, name, ha="center", fontsize=8, fontfamily=families(name), clip_on=True, parse_math=False)


def _apart(events: Sequence[Event], start: float, end: float, width: Callable[[str], float]) -> list[tuple[float, str]]:
    """Returns (middle, name) of the events whose names fit without overlap, highest scores first.

    start, end: of the plot, which no name leaves. width: of a name, in the same unit. Long videos may have hundreds of
    events.
    """
    shown: list[tuple[float, str]] = []
    for event in sorted(events, key=lambda event: -event.score):
        called = plain(event.name)
        half = width(called) / 2
        middle = max(start + half, min((event.start + event.end) / 2, end - half))
        if all(abs(middle - other) >= half + width(name) / 2 for other, name in shown):
            shown.append((middle, called))
    return shown


def _clock(seconds: float, hours: bool, decimals: bool) -> str:
    """Formats seconds as m:ss or h:mm:ss, with tenths if asked for."""
    tenths = round(abs(seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    text = f"{minutes // 60}:{minutes % 60:02}" if hours else f"{minutes}"
    return ("-" if seconds < 0 and tenths else "") + f"{text}:{rest // 10:02}" + (f".{rest % 10}" if decimals else "")
