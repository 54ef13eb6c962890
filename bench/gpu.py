"""Runs everything that needs a GPU: build, tests, sanitizers, benchmarks. `make gpu`, or python -m bench.gpu.

Each stage is a separate process with a time limit. A failing stage does not stop the next ones; the exit status and
OUT/gpu.json report it at the end. Logs, the test report and the JSON of every benchmark are kept in build/gpu, and are
packed into OUT/gpu.tar.gz after every stage, so that only two files need to be copied from the machine.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build/gpu"
CONFIGS = ROOT / "kernels/configs"
TOTAL = 470  # seconds for all stages; eight minutes with startup and packing
GRACE = 10  # seconds of a limit reserved for a clean exit, in which pytest reports failures so far
# Tests spend most of their time compiling kernels, each in one thread. References need only a few threads.
PARALLEL = ["-n", "8", "--dist", "load"]
THREADS = ["env", "OMP_NUM_THREADS=2"]
FEW_ROUNDS = {"step": "4", "inference": "4"}  # for slow benches, as in `make bench-cpu`
# Whole steps come first, so that only small ops are missing if time runs out.
BENCHES = (
    "step", "training", "inference", "similarity_graph", "linear_act", "gated_fusion", "window_attention",
    "distill_loss", "prompt_similarity", "attention_pool", "distance_graph", "mil_loss", "topk_mean", "uniform_pool",
    "pack_rows", "folds", "spans",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str] | None  # None if it cannot run here
    limit: float
    why: str = ""


def stages(work: Path, tune: bool) -> list[Stage]:
    python = sys.executable
    tests = [python, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short", f"--junitxml={work}/tests.xml"]
    if importlib.util.find_spec("xdist"):
        tests = [*THREADS, *tests, *PARALLEL]
    found = [
        Stage("build", [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."], 150),
        Stage("tests", tests, 180),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "tests/touch_kernels.py"]
        found.append(Stage(tool, command if sanitizer else None, 60, "" if sanitizer else "no compute-sanitizer here"))
    if tune:
        found.append(Stage("tune", [python, "-m", "avadclip_fast.cli", "tune"], 300))
    for name in BENCHES:
        command = [python, "-m", f"bench.bench_{name}", "--device", "cuda", "--json", str(work)]
        if name in FEW_ROUNDS:
            command += ["--rounds", FEW_ROUNDS[name]]
        found.append(Stage(f"bench_{name}", command, 90))
    return found


def run(stages: list[Stage], out: Path, total: float = TOTAL, work: Path = WORK) -> dict[str, dict]:
    """Runs the stages in order, each within its limit and the remaining total. Writes the files in OUT after each."""
    shutil.rmtree(work, ignore_errors=True)  # from an earlier run
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    began, record = time.monotonic(), {}
    for stage in stages:
        left = total - (time.monotonic() - began)
        record[stage.name] = outcome = one(stage, min(stage.limit, left), work / f"{stage.name}.log")
        print(f"{stage.name:<24} {outcome['seconds']:>6.1f} s   {outcome['result']}", flush=True)
        if stage.name == "tune":
            shutil.copytree(CONFIGS, work / "configs", dirs_exist_ok=True)
        (work / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        bring(work, out)
    return record


def bring(work: Path, out: Path) -> None:
    """Copies gpu.json and packs all files, replacing each of the two output files atomically."""
    shutil.copy(work / "gpu.json", out / "gpu.json.new")
    with tarfile.open(out / "gpu.tar.gz.new", "w:gz") as tar:
        for path in sorted(work.iterdir()):
            tar.add(path, path.name)
    for name in ("gpu.json", "gpu.tar.gz"):
        (out / f"{name}.new").replace(out / name)


def one(stage: Stage, limit: float, log: Path) -> dict:
    if stage.command is None:
        return {"result": f"left out: {stage.why}", "seconds": 0.0}
    if limit <= 0:
        return {"result": "no time left", "seconds": 0.0}
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(limit - min(GRACE, limit / 2))
            result = "ok" if code == 0 else f"failed ({code}), see {log.name}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s, see {log.name}"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, limit / 2))
        finally:  # kill the whole process group, so that nothing runs beside the next stage
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"result": result, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench/results/gpu"))
    parser.add_argument("--bench", action="store_true", help="benchmarks alone: no build, tests or sanitizers")
    parser.add_argument("--tune", action="store_true", help="first find the fastest tiles, and write kernels/configs/")
    options = parser.parse_args()
    if options.out.resolve().is_relative_to(WORK):
        parser.error(f"--out: {WORK} is emptied, choose another folder")
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA device here; `make test` and `make bench-cpu` need none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench.gpu: stopped"))  # also ends the running stage
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    chosen = [s for s in stages(WORK, options.tune) if not options.bench or s.name.startswith("bench_")]
    record = run(chosen, options.out, TOTAL + 300 * options.tune)
    bad = [name for name, outcome in record.items() if not outcome["result"].startswith(("ok", "left out"))]
    sys.exit(f"not well: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
