"""Timing of alternatives side by side, a table, and JSON with everything needed to judge it.

The alternatives take turns, round by round, and ratios are taken within a round: a machine that is slow for a while is
slow for all of them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def measure(alternatives: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of each alternative in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for round_ in range(rounds + 1):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def compare(case: str, times: dict[str, list[float]], ours: str, **counts: float) -> list[dict]:
    """One row an alternative: median, p20, p80 in ms, and how many times longer than `ours` it takes (median of the
    rounds). counts: bytes and FLOPs, by formula."""
    rows = []
    for name, seconds in times.items():
        p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(seconds, times[ours], strict=True))
        ms = {"median_ms": statistics.median(seconds) * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}
        rows.append({"case": case, "alternative": name} | ms | {"over_ours": ratio} | counts)
    return rows


def forward_backward(function: Callable, inputs: tuple, leaves: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    """A call of `function` and of the backward pass of its (first) result's sum."""

    def call() -> None:
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def main(name: str, run: Callable[[int], list[dict]]) -> None:
    """`python -m bench.NAME`: runs, prints a table, and with --json writes bench/results/NAME.json."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", action="store_true", help=f"also write bench/results/{name}.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = run(options.rounds)
    show(rows)
    if options.json:
        RESULTS.mkdir(exist_ok=True)
        record = {"bench": name, "setting": setting(), "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def show(rows: list[dict]) -> None:
    print(f"{'case':<34} {'alternative':<22} {'median':>9} {'p20':>9} {'p80':>9} {'over ours':>9}")
    for row in rows:
        ms = " ".join(f"{row[f'{key}_ms']:>9.3f}" for key in ("median", "p20", "p80"))
        print(f"{row['case']:<34} {row['alternative']:<22} {ms} {row['over_ours']:>8.2f}x")


def setting() -> dict:
    """Commit, versions and processor."""
    commit = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
