"""Runs everything that needs a GPU: build, tests, sanitizers, benchmarks. `make gpu`, or python -m bench.gpu.

Each stage is a separate process with a time limit. A failing stage does not stop the next ones, unless it is the build;
the exit status and OUT/gpu.json report it at the end. Logs, the test report and the JSON of every benchmark are kept in
build/gpu, and are packed into OUT/gpu.tar.gz after every stage, so that only two files need to be copied from the
machine.

torch.compile takes longer than everything that it is compared with. Beside the tests, it compiles kernels into its
cache on disk. Every benchmark runs without it first, those of operations in one process; those that have it run once
more, with it, in the time that is left, for which a lack of time is no failure. Their JSON is in the folder compiled/.
"""

import argparse
import contextlib
import fnmatch
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build/gpu"
CONFIGS = ROOT / "kernels/configs"
TOTAL = 470  # seconds for all stages; eight minutes with startup and packing
GRACE = 20  # seconds of a limit for a clean exit: pytest waits over ten for busy processes before it reports failures
# Tests spend most of their time compiling kernels, each in one thread. References need only a few threads.
PARALLEL = ["-n", "12", "--dist", "load"]
THREADS = ["env", "OMP_NUM_THREADS=2"]
# Every tensor is then an allocation of its own, so that memcheck sees an access that is just outside of it.
UNCACHED = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
FEW_ROUNDS = {"step": "3", "inference": "3"}  # for slow benches, as in `make bench-cpu`
# Whole steps come first, so that only small ops are missing if time runs out.
WHOLE = ("step", "training", "inference")
OPERATIONS = (
    "similarity_graph", "linear_act", "gated_fusion", "window_attention", "add_act", "prefix_attention", "distill_loss",
    "prompt_similarity", "attention_pool", "distance_graph", "mil_loss", "topk_mean", "uniform_pool", "pack_rows",
    "folds", "spans",
)  # fmt: skip
NOT_COMPILED = ("training", "inference", "pack_rows", "folds", "spans")  # have no torch.compile beside them
COMPILED = "_compiled"  # ends the names of stages with torch.compile
AHEAD = 3  # processes in which it compiles beside the tests
UNTIMED = "untimed"


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str] | None  # None if it cannot run here
    limit: float
    why: str = ""
    group: str = ""  # stages of one group, in which nothing is timed, run at the same time


def stages(work: Path, tune: bool) -> list[Stage]:
    python = sys.executable
    tests = [python, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short", f"--junitxml={work}/tests.xml"]
    if importlib.util.find_spec("xdist"):
        tests = [*THREADS, *tests, *PARALLEL]
    # Limits are a few times what an H200 and 16 cores take: build 30 s, and once kernels are compiled, tests 76 s and
    # memcheck_triton 47 s. memcheck takes 9 s and racecheck 19 s alone, but run beside tests that compile.
    found = [
        Stage("build", [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."], 120),
        # Its log tells the GPU, the versions and which backend serves each op: what the other records are of.
        Stage("env", [python, "-m", "avadclip_fast", "env"], 60, group=UNTIMED),
        Stage("kernels", [*THREADS, python, "-m", "bench.compile_kernels"], 120, group=UNTIMED),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")

    def sanitized(
        name: str, tool: str, how: list[str], backend: str, limit: float, *part: str, **settings: str
    ) -> Stage:
        touching = [python, "tests/touch_kernels.py", backend, *part]
        command = [*how, sanitizer, "--tool", tool, "--error-exitcode", "9", *touching]
        why = "" if sanitizer else "no compute-sanitizer here"
        return Stage(name, command if sanitizer else None, limit, why, **settings)

    found.append(sanitized("memcheck", "memcheck", UNCACHED, "cuda", 150, group=UNTIMED))
    found.append(sanitized("racecheck", "racecheck", [], "cuda", 150, group=UNTIMED))
    # What compiles fast comes first here: max-autotune takes over a minute for an op with large products.
    operations = [name for name in reversed(OPERATIONS) if name not in NOT_COMPILED]
    for part in range(AHEAD):
        names = [*operations[part::AHEAD], "--", "--device", "cuda", "--compile", "ahead"]
        # As long as the tests: what is compiled after them is waited for.
        found.append(Stage(f"ahead_{part}", [python, "-m", "bench.operations", *names], 110, group=UNTIMED))
    found.append(Stage("tests", tests, 190, group=UNTIMED))  # the longest of these, and so the last
    if tune:
        found.append(Stage("tune", [python, "-m", "avadclip_fast", "tune"], 300))
    timed = ["--device", "cuda", "--json"]
    for name in WHOLE:
        command = [python, "-m", f"bench.bench_{name}", *timed, str(work), "--compile", "without"]
        found.append(Stage(f"bench_{name}", command + rounds(name), 120))
    command = [python, "-m", "bench.operations", *OPERATIONS, "--", *timed, str(work), "--compile", "without"]
    found.append(Stage("bench_operations", command, 240))
    beside = [*timed, str(work / "compiled"), "--compile", "only"]
    with_compile = [
        Stage(f"bench_operations{COMPILED}", [python, "-m", "bench.operations", *operations, "--", *beside], 240),
        Stage(f"bench_step{COMPILED}", [python, "-m", "bench.bench_step", *beside, *rounds("step")], 200),
    ]
    # After the tests, which have compiled these kernels: here it would take minutes. Half of the operators each.
    halves = [
        sanitized(f"memcheck_triton_{half}", "memcheck", UNCACHED, "triton", 150, f"{half}/2", group="triton")
        for half in (1, 2)
    ]
    return [*found, *halves, *with_compile]


def rounds(name: str) -> list[str]:
    return ["--rounds", FEW_ROUNDS[name]] if name in FEW_ROUNDS else []


def together(stages: Iterable[Stage]) -> list[list[Stage]]:
    """Groups the stages that run at the same time."""
    groups = itertools.groupby(stages, key=lambda stage: stage.group or stage.name)
    return [list(group) for _, group in groups]


def run(stages: list[Stage], out: Path, total: float = TOTAL, work: Path = WORK) -> dict[str, dict]:
    """Runs the stages in order, each within its limit and the remaining total. Writes the files in OUT after each."""
    shutil.rmtree(work, ignore_errors=True)  # from an earlier run
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    began, record = time.monotonic(), {}
    for group in together(stages):
        left = total - (time.monotonic() - began)
        if record.get("build", {"result": "ok"})["result"] != "ok":  # what is installed is not what is here
            group = [replace(stage, command=None, why="the build failed") for stage in group]
        # Each is waited for in a thread, so that its time and its limit are its own, not those of the ones before it.
        with ThreadPoolExecutor(len(group)) as pool, contextlib.ExitStack() as running:
            outcomes = {
                stage.name: running.enter_context(started(stage, min(stage.limit, left), work / f"{stage.name}.log"))
                for stage in group
            }
            waited = {name: pool.submit(outcome) for name, outcome in outcomes.items()}
            for name, future in waited.items():
                record[name] = found = future.result()
                print(f"{name:<32} {found['seconds']:>6.1f} s   {found['result']}", flush=True)
                if name == "tune":
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


@contextlib.contextmanager
def started(stage: Stage, limit: float, log: Path) -> Iterator[Callable[[], dict]]:
    """Starts a stage, and yields a function that waits for its end and returns the outcome.

    limit: seconds from the start; at the end of the block the stage and all that it has started are gone.
    """
    if stage.command is None:
        yield lambda: {"result": f"left out: {stage.why}", "seconds": 0.0}
        return
    if limit <= 0:
        yield lambda: {"result": "no time left", "seconds": 0.0}
        return
    start, grace, ending = time.monotonic(), min(GRACE, limit / 2), contextlib.ExitStack()
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def outcome() -> dict:
        try:
            code = process.wait(max(0, start + limit - grace - time.monotonic()))
            result = "ok" if code == 0 else f"failed ({code}), see {log.name}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s, see {log.name}"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        ending.close()
        return {"result": result, "seconds": round(time.monotonic() - start, 1)}

    @ending.callback
    def end() -> None:  # of the whole process group, so that nothing runs beside the next stage
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    try:
        yield outcome
    finally:
        ending.close()


def well(name: str, result: str) -> bool:
    """Whether a stage ended well; those with torch.compile do where their time was up."""
    unhurried = name.endswith(COMPILED) or name.startswith("ahead_")
    return result.startswith(("ok", "left out")) or (unhurried and result.startswith(("stopped", "no time")))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench/results/gpu"))
    parser.add_argument("--bench", action="store_true", help="benchmarks alone, and their kernels: no build or tests")
    parser.add_argument("--stages", nargs="+", metavar="PATTERN", help=f"only these, such as build 'bench_*{COMPILED}'")
    parser.add_argument("--seconds", type=float, help=f"for all stages; default: {TOTAL}, 300 more with --tune")
    parser.add_argument("--tune", action="store_true", help="first find the fastest tiles, and write kernels/configs/")
    options = parser.parse_args()
    if options.out.resolve().is_relative_to(WORK):
        parser.error(f"--out: {WORK} is emptied, choose another folder")
    if options.seconds is not None and not options.seconds > 0:
        parser.error("--seconds: above 0")
    # "tune" is a stage only with --tune
    patterns = options.stages or (["env", "kernels", "tune", "bench_*"] if options.bench else ["*"])
    chosen = [s for s in stages(WORK, options.tune) if any(fnmatch.fnmatch(s.name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"--stages: none of {', '.join(s.name for s in stages(WORK, options.tune))}")
    import torch

    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA device here; `make test` and `make bench-cpu` need none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench.gpu: stopped"))  # also ends the running stage
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    total = TOTAL + 300 * options.tune if options.seconds is None else options.seconds
    record = run(chosen, options.out, total)
    bad = [name for name, outcome in record.items() if not well(name, outcome["result"])]
    sys.exit(f"not well: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
