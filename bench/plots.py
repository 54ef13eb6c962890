"""Plots of benchmarks: how many times as long the alternatives take, and how near kernels come to the roofs."""

from collections.abc import Sequence
from pathlib import Path

from avadclip_fast.engine.plots import COLOURS, DPI, save

MARKS = "osD^vPX*<"
ROW = 0.24  # inches of a case
LEGEND = 5  # names in a line


def ratios(path: Path, rows: Sequence[dict]) -> None:
    """Writes one PNG: a line a case, a mark for each alternative at how many times as long as ours it takes.

    rows: of `harness.compare`. Left of 1, and shaded, is what is faster than ours.
    """
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["alternative"] for row in rows if row["over_ours"] != 1))
    figure = Figure(figsize=(8, 1.3 + ROW * len(cases)), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    for i, name in enumerate(names):
        found = [(row["over_ours"], cases.index(row["case"])) for row in rows if row["alternative"] == name]
        x, y = zip(*found, strict=True)
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)]}
        ax.scatter(x, y, s=26, label=name, zorder=3, **style)
    ax.set_xscale("log")
    least, most = ax.get_xlim()
    ax.axvspan(min(least, 0.8), 1, color="0.92", zorder=0)
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set(xlim=(min(least, 0.8), most), xlabel="times as long as ours, in the same run", ylim=(len(cases) - 0.4, -0.6))
    ax.set_yticks(range(len(cases)), cases, fontsize=8)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="x", color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=min(len(names), LEGEND), loc="outside upper center")
    save(figure, path)


def roofline(path: Path, records: Sequence[dict]) -> None:
    """Writes one PNG: FLOP/s over FLOPs a byte of the kernel that is ours in each case, under the roofs of its run.

    records: JSON of benches on a GPU, with `bytes`, `flops` and the roofs in each row. A case without FLOPs, such as a
    copy, has no place here.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    ax = figure.subplots()
    reached: list[float] = []
    for i, record in enumerate(records):
        ours = [row for row in record["rows"] if row["over_ours"] == 1 and row.get("flops") and "roofs" in row]
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
    ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must be moved", ylabel="TFLOP/s")
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    save(figure, path)
