"""Plots of benchmarks: times of the alternatives relative to ours, kernels in a roofline, and bars of any numbers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from avadclip_fast.engine.plots import COLOURS, DPI, legend_below, light_grid, save

MARKS = "osD^vPX*<"
SHADES = (*COLOURS, "#8C510A", "#7F7F7F", "#F0E442")  # one per marker
ROW = 0.28  # inches per case
NEAR = 0.05  # of the logarithmic axis: markers nearer than this would cover each other
APART = 0.26  # rows between such markers
BAR = 0.16  # inches per bar
GAP = 0.8  # bars between groups
LEGEND = 5  # names per line
OFFICIAL = "official"


def ratios(path: Path, rows: Sequence[dict]) -> None:
    """Writes one PNG with a line per case and a marker per alternative at its time relative to ours.

    rows: from `harness.compare`. The shaded area left of 1 is faster than ours.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["alternative"] for row in rows if row["over_ours"] != 1))
    figure = Figure(figsize=(8, 1.3 + ROW * len(cases)), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    others = [row for row in rows if row["alternative"] in names]
    least, most = (limit(1.0, *(row["over_ours"] for row in others)) for limit in (min, max))
    least, most = min(least / 1.15, 0.8), most * 1.15
    places = [(row["over_ours"], cases.index(row["case"])) for row in others]
    heights = _heights(places, NEAR * math.log(most / least))
    for i, name in enumerate(names):
        style = {"color": SHADES[i % len(SHADES)], "marker": MARKS[i % len(MARKS)]}
        found = [(row["over_ours"], y) for row, y in zip(others, heights, strict=True) if row["alternative"] == name]
        ax.scatter(*zip(*found, strict=True), s=26, label=name, zorder=3, **style)
    ax.axvspan(least, 1, color="0.92", zorder=0)
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set(xscale="log", xlim=(least, most), ylim=(len(cases) - 0.4, -0.6))
    ax.set_xlabel("time / this library's time, in the same run (grey: faster than it)")
    ax.set_yticks(range(len(cases)), cases, fontsize=8)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    light_grid(ax, "x")
    figure.legend(frameon=False, fontsize=8, ncols=min(len(names), LEGEND), loc="outside upper center")
    save(figure, path)


def speedups(path: Path, rows: Sequence[dict]) -> None:
    """Writes one PNG with a group of bars per case: how many times as fast as the official code each variant is.

    rows: from `harness.compare`. Cases without the official code are left out.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    times: dict[str, dict[str, float]] = {}  # case -> alternative -> time over ours, as in the tables
    for row in rows:
        times.setdefault(row["case"], {})[row["alternative"]] = row["over_ours"]
    times = {case: found for case, found in times.items() if OFFICIAL in found}
    names = [name for name in dict.fromkeys(row["alternative"] for row in rows) if name != OFFICIAL]
    count = sum(len(found) - 1 for found in times.values())
    figure = Figure(figsize=(8, 1.2 + BAR * (count + GAP * len(times))), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    y, middles, most = 0.0, [], 1.0
    for found in times.values():
        here = [name for name in names if name in found]
        for k, name in enumerate(here):
            ratio = found[OFFICIAL] / found[name]
            ax.barh(y + k, ratio, 0.9, color=SHADES[names.index(name) % len(SHADES)], zorder=2)
            ax.annotate(f"{ratio:.1f}", (ratio, y + k), (3, 0), textcoords="offset points", va="center", fontsize=7)
            most = max(most, ratio)
        middles.append(y + (len(here) - 1) / 2)
        y += len(here) + GAP
    ax.axvline(1, color="0.4", linewidth=1, zorder=3)
    ax.set(xlim=(0, most * 1.06), ylim=(y - GAP / 2, -0.5 - GAP / 2))
    ax.set_xlabel("times as fast as the official code (line: 1), in the same run")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yticks(middles, list(times), fontsize=8)
    light_grid(ax, "x")
    labels = ["this library" + name.removeprefix("ours") if name.startswith("ours") else name for name in names]
    figure.legend(
        [Patch(color=SHADES[i % len(SHADES)]) for i in range(len(names))], labels, frameon=False, fontsize=8,
        ncols=min(len(names), LEGEND), loc="outside upper center",
    )  # fmt: skip
    save(figure, path)


def _heights(places: Sequence[tuple[float, float]], near: float) -> list[float]:
    """Returns y of each place (x, row), with places of one row nearer than `near` in log x one below the other."""
    order = sorted(range(len(places)), key=lambda i: (places[i][1], places[i][0]))
    groups: list[list[int]] = []
    for i in order:
        x, row = places[i]
        last = places[groups[-1][-1]] if groups else (math.inf, -1)
        if row == last[1] and math.log(x / last[0]) < near:
            groups[-1].append(i)
        else:
            groups.append([i])
    heights = [row for _, row in places]
    for group in groups:
        for k, i in enumerate(group):
            heights[i] += APART * (k - (len(group) - 1) / 2)
    return heights


def roofline(path: Path, records: Sequence[dict]) -> None:
    """Writes one PNG: a roofline of FLOP/s over FLOPs per byte of our kernel in each case, with the roofs of its run.

    records: JSON of benches on a GPU, with `bytes`, `flops` and the roofs in each row. Cases without FLOPs, such as
    copies, and those whose bytes are not counted, as in bench_folds, are omitted. Raises ValueError if no case remains.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    reached: list[float] = []
    for i, record in enumerate(records):
        counted = [row for row in record["rows"] if row.get("flops") and row.get("bytes") and "roofs" in row]
        ours = [row for row in counted if row["over_ours"] == 1]
        if not ours:
            continue
        x = [row["flops"] / row["bytes"] for row in ours]
        y = [row["flops"] / row["median_ms"] * 1e-9 for row in ours]  # TFLOP/s
        reached += x
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)]}
        ax.scatter(x, y, s=30, label=record["bench"].removeprefix("bench_"), zorder=3, **style)
        roofs = ours[0]["roofs"]
        copy, matmul = roofs["copy_bytes_per_s"], roofs["matmul_flops_per_s"]
        span = [min(x) / 4, matmul / copy, max(*x, matmul / copy) * 4]
        ax.plot(span, [min(copy * at, matmul) * 1e-12 for at in span], color="0.6", linewidth=0.8, zorder=1)
    if not reached:
        raise ValueError("no row has bytes, FLOPs and roofs: was it measured on a GPU?")
    ax.plot([], [], color="0.6", linewidth=0.8, label="roofs: copy and matrix product, in the same run")
    ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must be moved", ylabel="TFLOP/s")
    light_grid(ax)
    ax.legend(frameon=False, fontsize=8)
    save(figure, path)


def bar_groups(
    path: Path, panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], title: str, axis: str
) -> None:
    """Writes one PNG with one panel per title, one below the other: grouped horizontal bars with error bars.

    panels: title -> group -> label -> (value, spread); a label has the same colour in every group.
    title: of the figure, above the panels. axis: label of the common x axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = list(dict.fromkeys(label for groups in panels.values() for bars in groups.values() for label in bars))
    rows = [len(groups) for groups in panels.values()]
    longest = max(len(group) for groups in panels.values() for group in groups)
    size = 4.2 + 0.075 * longest, 1.1 + 0.3 * len(rows) + 0.42 * sum(rows)  # inches
    figure = Figure(size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    height = 0.8 / len(labels)
    for ax, (name, groups) in zip(axes, panels.items(), strict=True):
        for j, bars in enumerate(groups.values()):
            shown = [label for label in labels if label in bars]
            for i, label in enumerate(shown):
                value, spread = bars[label]
                at = j + (i - (len(shown) - 1) / 2) * height  # centred on the group's name
                ax.barh(
                    at, value, height, xerr=spread, color=COLOURS[labels.index(label) % len(COLOURS)],
                    error_kw={"linewidth": 0.8},
                )  # fmt: skip
        ax.set_yticks(range(len(groups)), list(groups))
        ax.set_ylim(len(groups) - 0.45, -0.55)
        light_grid(ax, "x")
        ax.set_axisbelow(True)
        ax.set_title(name, fontsize=10)
    axes[-1].set(xlim=(0, None), xlabel=axis)
    figure.suptitle(title, fontsize=11)
    handles = [Patch(color=COLOURS[i % len(COLOURS)]) for i in range(len(labels))]
    legend_below(figure, handles, labels, columns=len(labels), fontsize=8)
    save(figure, path)
