"""All that needs a GPU in one command: build, tests, sanitizers, benchmarks. `make gpu`, or python -m bench.gpu.

Each stage is a process of its own under a time limit. One that fails does not stop the next: the exit status, and
OUT/gpu.json, say so at the end. Logs, the test report and every benchmark's JSON go to OUT.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOTAL = 480  # seconds for everything
# What a whole step costs comes first: where time runs out, the small ops are missing.
BENCHES = (
    "step", "training", "inference", "similarity_graph", "linear_act", "gated_fusion", "window_attention",
    "distill_loss", "prompt_similarity", "attention_pool", "distance_graph", "mil_loss", "topk_mean", "uniform_pool",
    "pack_rows", "folds", "spans",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str] | None  # None: it cannot run here
    limit: float
    why: str = ""


def stages(out: Path, tune: bool) -> list[Stage]:
    python = sys.executable
    found = [
        Stage("build", [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."], 150),
        Stage("tests", [python, "-m", "pytest", "-m", "gpu", f"--junitxml={out}/tests.xml"], 180),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "tests/touch_kernels.py"]
        found.append(Stage(tool, command if sanitizer else None, 60, "" if sanitizer else "no compute-sanitizer here"))
    if tune:
        found.append(Stage("tune", [python, "-m", "avadclip_fast.cli", "tune"], 300))
    for name in BENCHES:
        found.append(
            Stage(f"bench_{name}", [python, "-m", f"bench.bench_{name}", "--device", "cuda", "--json", str(out)], 90)
        )
    return found


def run(stages: list[Stage], out: Path, total: float = TOTAL) -> dict[str, dict]:
    """Runs the stages in turn; each gets its limit, or what is left of the total. Writes OUT/gpu.json after each."""
    out.mkdir(parents=True, exist_ok=True)
    began, record = time.monotonic(), {}
    for stage in stages:
        left = total - (time.monotonic() - began)
        record[stage.name] = outcome = one(stage, min(stage.limit, left), out / f"{stage.name}.log")
        print(f"{stage.name:<24} {outcome['seconds']:>6.1f} s   {outcome['result']}", flush=True)
        (out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def one(stage: Stage, limit: float, log: Path) -> dict:
    if stage.command is None:
        return {"result": f"left out: {stage.why}", "seconds": 0.0}
    if limit <= 0:
        return {"result": "no time left", "seconds": 0.0}
    start = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
            result = "ok" if done.returncode == 0 else f"failed ({done.returncode}), see {log}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s, see {log}"
    return {"result": result, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "bench/results/gpu")
    parser.add_argument("--bench", action="store_true", help="benchmarks alone: no build, tests or sanitizers")
    parser.add_argument("--tune", action="store_true", help="first find the fastest tiles, and write kernels/configs/")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA device here; `make test` and `make bench-cpu` need none")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    chosen = [s for s in stages(Path(options.out), options.tune) if not options.bench or s.name.startswith("bench_")]
    record = run(chosen, Path(options.out), TOTAL + 300 * options.tune)
    bad = [name for name, outcome in record.items() if not outcome["result"].startswith(("ok", "left out"))]
    sys.exit(f"not well: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
