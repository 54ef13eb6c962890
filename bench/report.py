"""Writes the figures in README and docs from bench/results/*.json, so that no number is typed by hand.

python -m bench.report              rewrites the text between <!-- figures: NAME --> and <!-- end -->, and the plots
python -m bench.report --check      fails if a page does not match the JSON
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from . import fightsurv, harness, plots
from .harness import RESULTS, ROOT, read, read_file

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
OPERATIONS = ("topk_mean", "mil_loss", "distance_graph", "similarity_graph", "uniform_pool")
OPERATIONS += ("linear_act", "linear_act_amx")


def operations() -> str:
    """Returns a table of our time per case, and the relative time of each alternative in the same run."""
    lines = ["| op | case | ours, ms | times as long in the same run |", "|---|---|---|---|"]
    records = {f"`{op}`".replace("_amx`", "` (AMX)"): read(f"bench_{op}") for op in OPERATIONS}
    for name, record in records.items():
        rows = record["rows"]
        for case in dict.fromkeys(row["case"] for row in rows):
            *others, ours = [row for row in rows if row["case"] == case]
            ratios = "; ".join(f"{row['alternative']} {row['over_ours']:.1f}" for row in others)
            lines.append(f"| {name} | {case} | {ours['median_ms']:.2f} | {ratios} |")
    return "\n".join(lines) + _where(*records.values(), names=records)


def steps(name: str, unit: str = "s") -> str:
    """Returns a table of whole steps against the official code. unit: of times, "s" or "ms"."""
    record = read(name)
    columns = ("official code", "this library", "in bfloat16", "masked", "masked, bfloat16")
    lines = [f"| step | {' | '.join(f'{column}, {unit}' for column in columns)} |", "|---|---|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        rows = {row["alternative"]: row for row in record["rows"] if row["case"] == case}
        if "official" not in rows:
            continue  # a comparison of bfloat16 steps on a GPU
        ours = ("ours", "ours, bfloat16", "ours, masked", "ours, masked, bfloat16")
        scale = {"s": 1e-3, "ms": 1}[unit]
        cells = [f"{rows['official']['median_ms'] * scale:.2f}"]
        for name in ours:
            times = rows["official"]["over_ours"] / rows[name]["over_ours"]
            cells.append(f"{rows[name]['median_ms'] * scale:.2f} ({times:.2f} ×)")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + _where(record)


def inference(name: str) -> str:
    record = read(name)
    lines = ["| inference | official code, ms | this library, ms | ratio |", "|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        rows = {row["alternative"]: row for row in record["rows"] if row["case"] == case}
        official, ours = rows["official"], rows["ours"]
        lines.append(
            f"| {case} | {official['median_ms']:.0f} | {ours['median_ms']:.0f} | {official['over_ours']:.2f} |"
        )
    return "\n".join(lines) + _where(record)


def demo() -> str:
    record = read("demo")
    lines = ["| | AP | AUC | detection mAP |", "|---|---|---|---|"]
    for name, row in record["results"].items():
        lines.append(f"| {name} | {100 * row['ap']:.1f} | {100 * row['auc']:.1f} | {row['detection']:.1f} |")
    return "\n".join(lines) + f"\n\n{record['seconds']} s on {record['threads']} threads, torch {record['torch']}.\n"


def gpu() -> str:
    """Returns a table of a run of bench.gpu, one of its whole steps and the roofline, or says that there was no run."""
    records, compiled = gpu_records("gpu"), gpu_records("gpu/compiled")
    if not records:
        return "No GPU has timed them yet.\n"
    lines = ["| | case | ms | of floor | times as long in the same run |", "|---|---|---|---|---|"]
    for bench in dict.fromkeys([*records, *compiled]):
        alone, beside = (found.get(bench, {"rows": []})["rows"] for found in (records, compiled))
        for case in dict.fromkeys(row["case"] for row in (*alone, *beside)):
            rows = [row for row in alone if row["case"] == case]
            same = [row for row in beside if row["case"] == case]
            rows += [row for row in same if row["alternative"] in harness.COMPILED] if rows else same
            ours = next(row for row in rows if row["over_ours"] == 1)
            ratios = "; ".join(f"{row['alternative']} {row['over_ours']:.1f}" for row in rows if row is not ours)
            floor = "in cache" if ours.get("in_cache") else f"{ours['of_floor']:.0%}" if "of_floor" in ours else ""
            name = bench.removeprefix("bench_")
            lines.append(f"| `{name}` | {case} | {ours['median_ms']:.3f} | {floor} | {ratios} |")
    steps = [row for found in (records, compiled) if "bench_step" in found for row in found["bench_step"]["rows"]]
    if steps:
        lines += ["", "| step | | ms | kernels | waits for the GPU | memory, GB |", "|---|---|---|---|---|---|"]
    for row in steps:
        counts = f"{row['kernels']} | {row['waits']} | {row['memory_bytes'] / 1e9:.1f}"
        lines.append(f"| {row['case']} | {row['alternative']} | {row['median_ms']:.2f} | {counts} |")
    called = [f"`{name.removeprefix('bench_')}`" for name in records]
    called += [f"`{name.removeprefix('bench_')}` (torch.compile)" for name in compiled]
    where = _where(*records.values(), *compiled.values(), names=called)
    return "\n".join(lines) + where + "\n![roofline](performance-roofline.png)\n"


def gpu_records(folder: str) -> dict[str, dict]:
    """Returns the records in a folder of the results by bench, whole steps and models first."""
    found = {path.stem: read_file(path) for path in sorted((RESULTS / folder).glob("bench_*.json"))}
    whole = ("bench_step", "bench_training", "bench_inference")
    return {name: found[name] for name in sorted(found, key=lambda name: name not in whole)}


def _where(*records: dict, names: Iterable[str] = ()) -> str:
    """Returns the machine of the records, whether kernels have changed since, and whether cases are missing.

    names: what the records are called, by default the name of their bench
    """
    found: dict[str, list[str]] = {}
    called = list(names) or [f"`{record['bench'].removeprefix('bench_')}`" for record in records]
    for record, shown in zip(records, called, strict=True):
        setting, name = record["setting"], record["bench"]
        device = "cuda" if setting["gpu"] else "cpu"
        machine = setting["gpu"] or f"{setting['cpu']}, {setting['threads']} threads"
        where = f"{machine}, torch {setting['torch']}."
        stale = setting.get("source") != harness.source_hash(device, name)
        where += " **Stale**: the kernels have changed since." * stale
        where += f" **Cut short**: cases of {name} are missing." * bool(record.get("cut"))
        found.setdefault(where, []).append(shown)
    lines = list(found) if len(found) == 1 else [f"{', '.join(names)}: {where}" for where, names in found.items()]
    return "\n\n" + "\n\n".join(textwrap.fill(line, 120) for line in lines) + "\n"


FIGURES: dict[str, Callable[[], str]] = {
    "operations": operations,
    "steps": lambda: steps("bench_step"),
    "steps-amx": lambda: steps("bench_step_amx"),
    "inference": lambda: inference("bench_inference"),
    "inference-amx": lambda: inference("bench_inference_amx"),
    "demo": demo,
    "gpu": gpu,
    "gpu-steps": lambda: steps("gpu/bench_step", "ms"),
    "fightsurv": lambda: fightsurv.table(read("fightsurv")) + "\n",
    "fightsurv-heads": lambda: fightsurv.heads_table(read("fightsurv")) + "\n",
    "fightsurv-missing": lambda: fightsurv.missing_table(read("fightsurv")) + "\n",
    "fightsurv-repeats": lambda: fightsurv.repeats_table(read("fightsurv_ablation")) + "\n",
    "fightsurv-linear": lambda: fightsurv.linear_table(read("fightsurv_ablation")) + "\n",
    "fightsurv-teacher": lambda: fightsurv.ablation_table(read("fightsurv_ablation"), "teacher") + "\n",
    "fightsurv-student": lambda: fightsurv.ablation_table(read("fightsurv_ablation"), "student") + "\n",
    "fightsurv-told": lambda: fightsurv.told_table(read("fightsurv_told")) + "\n",
    "fightsurv-why": lambda: fightsurv.ablation_table(read("fightsurv_ablation"), "why") + "\n",
    "fightsurv-measures": lambda: fightsurv.measures_table(read("fightsurv_ablation")) + "\n",
    "fightsurv-calibration": lambda: fightsurv.calibration_table(read("fightsurv_ablation"), read("fightsurv")) + "\n",
}


def draw(folder: Path) -> None:
    """Draws the plots of docs/performance.md. Without results on a GPU, there is no roofline."""
    # Of one processor: the table has those with AMX, too.
    drawn = [row for op in OPERATIONS if "amx" not in op for row in _named(read(f"bench_{op}"))]
    plots.ratios(folder / "performance-operations.png", drawn)
    plots.speedups(folder / "performance-steps.png", [*read("bench_step")["rows"], *read("bench_inference")["rows"]])
    if timed := gpu_records("gpu"):
        plots.roofline(folder / "performance-roofline.png", list(timed.values()))


def _named(record: dict) -> list[dict]:
    """Returns the rows of an op, with its name before each case."""
    op = record["bench"].removeprefix("bench_")
    return [{**row, "case": f"{op}: {row['case'].removeprefix('f+b ')}"} for row in record["rows"]]


def rendered(text: str) -> str:
    """Returns a page with every block rewritten. Raises KeyError on an unknown figure."""
    return BLOCK.sub(lambda block: block[1] + FIGURES[block["name"]](), text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    if not check:
        draw(ROOT / "docs")
    if check and stale:
        sys.exit(f"{', '.join(stale)}: figures differ from bench/results; run python -m bench.report")
    print("rewritten: " + ", ".join(stale) if stale else "every figure is what the JSON says")


if __name__ == "__main__":
    main()
