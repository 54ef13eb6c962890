"""What was found in a video as one picture: score over time, events, who scored what, key frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .detect import Detection, Event, time_code
from .plots import COLOURS, DPI, TRUTH_COLOUR, save

SPACE = 0.08  # of the width of a plot: what a name takes


def timeline(path: str | Path, detection: Detection, frames: Mapping[int, np.ndarray]) -> None:
    """Writes one PNG. frames: snippet -> image (H, W, 3) uint8, shown above the curve in order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9.0, 4.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(detection.name, fontsize=10, parse_math=False)
    grid = figure.add_gridspec(2, max(1, len(frames)), height_ratios=(1, 1.5))
    for column, (snippet, image) in enumerate(sorted(frames.items())):
        ax = figure.add_subplot(grid[0, column])
        ax.imshow(image)
        ax.set_title(f"{time_code(detection.times[snippet])[:-2]}  {detection.scores[snippet]:.2f}", fontsize=8)
        ax.set_axis_off()
    ax = figure.add_subplot(grid[1, :])
    edges = detection.edges
    low, high = -0.1, 1.12
    events = detection.events()
    spans = [(event.start, event.end - event.start) for event in events]
    ax.broken_barh(spans, (low, high - low), facecolor=TRUTH_COLOUR, alpha=0.3, linewidth=0)
    for middle, name in _apart(events, SPACE * (edges[-1] - edges[0])):
        ax.text(middle, 1.04, name, ha="center", fontsize=8, clip_on=True, parse_math=False)
    for part in detection.parts:
        if part.by != "teacher":
            span = edges[[part.start, part.end]]
            label = f"{part.by}: {part.why}"
            ax.plot(span, [-0.05, -0.05], color=COLOURS[1], linewidth=4, solid_capstyle="butt", label=label)
    ax.step(edges, np.append(detection.scores, detection.scores[-1]), where="post", color=COLOURS[0], label="score")
    ax.step(
        edges, np.append(detection.thresholds, detection.thresholds[-1]), where="post", color="0.4", linewidth=0.8,
        linestyle="--", label="threshold",
    )  # fmt: skip
    ax.set(xlim=(edges[0], edges[-1]), ylim=(low, high), xlabel="time (s)", ylabel="1 - p(normal)")
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    save(figure, path)


def _apart(events: Sequence[Event], space: float) -> list[tuple[float, str]]:
    """(middle, name) of events whose names do not cover one another: hours may hold hundreds. The highest go first."""
    shown: list[tuple[float, str]] = []
    for event in sorted(events, key=lambda event: -event.score):
        middle = (event.start + event.end) / 2
        if all(abs(middle - other) >= space for other, _ in shown):
            shown.append((middle, event.name))
    return shown
