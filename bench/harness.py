"""Times alternatives side by side; prints a table and writes JSON with all settings of the measurement.

The alternatives take turns in every round, and ratios are computed within a round, so that a temporarily slow machine
affects all of them. Results are checked before timing. On a GPU, kernel time is the time of a replayed CUDA graph over
several sets of inputs that together exceed the cache, and the roofs are measured in the same run. The JSON is rewritten
after every case, so that an interrupted bench keeps its results.
"""

import argparse
import hashlib
import importlib
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from avadclip_fast.data.atomic import atomic_write
from avadclip_fast.ops import _dispatch
from avadclip_fast.ops._linear_act_cpu import HAS_AMX

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
ROUNDS = 15
SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".json")
# Alternatives by torch.compile and their modes, without its own CUDA graphs since the harness captures all calls.
MODES = {"torch.compile": "default", "torch.compile, max-autotune": "max-autotune-no-cudagraphs"}
COMPILED = (*MODES, "FlexAttention")  # alternatives that are compiled first
COMPILING = 50  # seconds after which a bench compiles nothing more; bench.gpu stops it after 120
# torch.compile; only: ours beside it, as long as there is time for that; ahead: time nothing, fill its cache on disk
COMPILE = ("with", "without", "only", "ahead")
DTYPES = ("float32", "float16", "bfloat16")
AUTHORS = ("official", "loops")  # alternatives that follow the official code
# Benches whose products run on tile units (csrc/amx.h) or in AVX-512 (csrc/avx512.h) where a processor has them
PRODUCTS = ("bench_linear_act", "bench_folds", "bench_step", "bench_inference", "bench_training")
MOST_SETS = 256  # maximum number of input sets in one graph
HEAD = f"{'case':<40} {'alternative':<27} {'median':>9} {'p20':>9} {'p80':>9} {'over ours':>9} {'of floor':>8}"
Timer = Callable[[], float]  # seconds of one call


class Work(NamedTuple):
    """The minimum work, by formula: bytes that must be read and written once, and FLOPs."""

    bytes: float
    flops: float = 0


@dataclass(frozen=True)
class Bench:
    """One case of an op and its alternatives. make() draws inputs; those that require gradients get them."""

    case: str
    make: Callable[[], tuple]
    alternatives: dict[str, Callable[..., Tensor]]  # includes "reference"; ours is last
    forward: Work
    both: Work | None = None  # forward and backward; None without a backward pass
    parts: dict[str, Callable[..., object]] = field(default_factory=dict)  # parts of the op, for comparison
    waits: tuple[str, ...] = AUTHORS  # alternatives that synchronize, so no graph

    @property
    def ours(self) -> str:
        """The name of our alternative, relative to which the others are reported."""
        return list(self.alternatives)[-1]

    def only(self, names: Iterable[str]) -> "Bench":
        return replace(self, alternatives={name: self.alternatives[name] for name in names})


def served(op: str, function: Callable, inputs: tuple) -> dict[str, Callable[..., Tensor]]:
    """Returns every backend of `op` that supports function(*inputs, backend=...); last the one that users get."""
    found: dict[str, Callable[..., Tensor]] = {}
    for backend in reversed(_dispatch.ORDER):
        try:
            if backend in _dispatch.TABLE[op]:
                function(*inputs, backend=backend)
                found[backend] = partial(function, backend=backend)
        except _dispatch.BackendError:
            continue
    chosen = default_of(op, partial(function, *inputs))
    found[chosen] = found.pop(chosen)
    return found


def default_of(op: str, call: Callable[[], object]) -> str:
    """Returns the backend by which `op` is served in a call that names none: some decline what they could serve."""
    served = []

    def recorded(name: str, function: Callable, *args: object, **kwargs: object) -> object:
        served.append(name.partition(":"))
        return function(*args, **kwargs)

    with mock.patch.object(_dispatch, "ranged", recorded):
        call()
    return next(backend for name, _, backend in served if name == op)


def on_gpu() -> bool:
    """Whether cases are being created for a GPU."""
    return torch.get_default_device().type == "cuda"


def compiled(function: Callable, tuned: bool = True) -> dict[str, Callable[..., Tensor]]:
    """Returns a reference under torch.compile, in default mode and, if `tuned`, with max-autotune.

    Only on a GPU; returns {} on a CPU. Tuning takes seconds per product, and all benches together have minutes, so a
    bench tunes each kind of graph once, at the model's sizes, and not where only sizes change.
    """
    if not on_gpu():
        return {}
    modes = MODES if tuned else {"torch.compile": MODES["torch.compile"]}
    return {name: torch.compile(function, mode=mode, dynamic=False, fullgraph=True) for name, mode in modes.items()}


def leaves(inputs: tuple) -> tuple[Tensor, ...]:
    return tuple(x for x in inputs if isinstance(x, Tensor) and x.requires_grad)


def first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def forward_backward(function: Callable, inputs: tuple, wanted: tuple[Tensor, ...]) -> Callable[[], tuple]:
    """Returns a call of `function` followed by the backward pass of the sum of its (first) result."""

    def call() -> tuple:
        out = first(function(*inputs))
        return torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

    return call


def forward(function: Callable, inputs: tuple, wanted: tuple[Tensor, ...]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function(*inputs)

    return call


# Correctness


def check(bench: Bench, inputs: tuple) -> None:
    """Raises AssertionError if a result or gradient is too far from the reference in float64.

    The limit on the relative error in norm is three times the error of the reference in the same dtype, plus eps / 4,
    the cost of rounding an exact result; it is at least 3e-5, for sums of thousands of rows in another order.

    The official code is checked in float32 on inputs without equal values: it breaks ties between scores differently,
    and it rounds cosines to bfloat16 before comparing them with the threshold.
    """
    theirs = [name for name in bench.alternatives if name in AUTHORS]
    _check(bench.only(name for name in bench.alternatives if name not in theirs), inputs)
    if theirs:
        _check(bench.only(("reference", *theirs)), converted(inputs, torch.float32, apart=2**-8))


def _check(bench: Bench, inputs: tuple) -> None:
    def results(function: Callable, inputs: tuple) -> list[Tensor]:
        out = first(function(*inputs))
        if bench.both is None:
            return [out]
        # varying weights, so that no gradient cancels by symmetry
        weight = torch.linspace(1, 2, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
        return [out, *torch.autograd.grad(out, leaves(inputs), weight.to(out.dtype), allow_unused=True)]

    oracle = results(bench.alternatives["reference"], converted(inputs, torch.float64))

    def errors(function: Callable) -> list[float]:
        pairs = zip(results(function, inputs), oracle, strict=True)
        return [0.0 if x is None and y is None else relative(x.detach(), y.detach()) for x, y in pairs]

    eps = torch.finfo(next(x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point())).eps
    allowed = [max(3 * error + eps / 4, 3e-5) for error in errors(bench.alternatives["reference"])]
    for name, function in bench.alternatives.items():
        for what, (error, limit) in enumerate(zip(errors(function), allowed, strict=True)):
            part = f"gradient {what}" if what else "result"
            assert error <= limit, f"{bench.case}, {name}: {part} is {error:.1e} off in norm, allowed {limit:.1e}"


def converted(inputs: tuple, dtype: torch.dtype, apart: float = 0.0) -> tuple:
    """Copies inputs with floating-point tensors cast to `dtype`; leaves are scaled by up to 1 + apart."""

    def one(x: object) -> object:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        y = x.detach().to(dtype)
        return (y + apart * y * torch.rand_like(y)).requires_grad_() if x.requires_grad else y

    return tuple(one(x) for x in inputs)


def relative(got: Tensor, oracle: Tensor) -> float:
    return float((got.double() - oracle).norm() / oracle.norm().clamp_min(1e-30))


# Timers


def host_timer(call: Callable[[], object]) -> Timer:
    """Times a plain call on the host, until its work is done."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return timed


def graph_timer(calls: list[Callable[[], object]]) -> Timer:
    """Times the mean of all calls, replayed in one CUDA graph."""
    replays = max(1, min(5, 40 // len(calls)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up: compile kernels and fill the allocator
        for call in calls[:4] * 2:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(_kept=kept) -> float:  # keeps the outputs of the graph alive
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (replays * len(calls))

    return timed


def measure(timers: dict[str, Timer], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Returns the seconds of each alternative in each round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for round_ in range(rounds + 1):
        for name, timer in timers.items():
            seconds = timer()
            if round_:
                times[name].append(seconds)
    return times


def compare(case: str, times: dict[str, list[float]], ours: str, **counts: float | str) -> list[dict]:
    """Returns a row per alternative: median, p20 and p80 in ms, and the median ratio to `ours` over the rounds.

    counts: further values for each row, such as bytes and FLOPs by formula.
    """
    rows = []
    for name, seconds in times.items():
        # a call timed only once has no quantiles: duplicate the value
        p20, *_, p80 = statistics.quantiles(seconds * 2 if len(seconds) == 1 else seconds, n=5, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(seconds, times[ours], strict=True))
        ms = {"median_ms": statistics.median(seconds) * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3}
        rows.append({"case": case, "alternative": name} | ms | {"over_ours": ratio, "rounds": len(seconds)} | counts)
    return rows


# Cases


def prepared(
    cases: Callable[[torch.dtype], Iterable[Bench]], dtype: torch.dtype, device: str
) -> Iterator[tuple[Bench, list[tuple]]]:
    """Yields each case with its inputs, after checking all of its alternatives on them."""
    for bench, sets in drawn(cases, dtype, device):
        check(bench, sets[0])
        yield bench, sets


def drawn(
    cases: Callable[[torch.dtype], Iterable[Bench]], dtype: torch.dtype, device: str, compile: str = "with"
) -> Iterator[tuple[Bench, list[tuple]]]:
    """Yields each case with its inputs. compile: see COMPILE."""
    began = time.monotonic()
    with torch.device(device):  # only to create inputs, since it slows down every call
        benches = list(cases(dtype))
    for bench in benches:
        if bench.alternatives.keys() & {*COMPILED}:
            torch.compiler.reset()  # a function is recompiled at most eight times
            late = time.monotonic() - began > COMPILING and compile != "without"
            if late:
                print(f"{bench.case}: without torch.compile, {COMPILING} s are up", flush=True)
            if late and compile in ("only", "ahead"):
                return
            if late or compile == "without":
                bench = bench.only(name for name in bench.alternatives if name not in COMPILED)
            elif compile in ("only", "ahead"):
                beside = ("reference", *COMPILED, bench.ours)
                bench = bench.only(name for name in bench.alternatives if name in beside)
        elif compile in ("only", "ahead"):
            continue
        with torch.device(device):
            sets = input_sets(bench) if device == "cuda" and compile != "ahead" else [bench.make()]
        yield bench, sets


def run(
    cases: Callable[[torch.dtype], Iterable[Bench]], dtype: torch.dtype, device: str, rounds: int,
    compile: str = "with",
) -> Iterator[list[dict]]:  # fmt: skip
    """Yields the rows of each case: forward and backward together, and on a GPU also the forward pass alone."""
    if compile == "ahead":
        # The cache gets kernels alone, which take longest: which of them are the fastest is found again where they are
        # timed, since here something else may run beside.
        config = importlib.import_module("torch._inductor.config")
        with config.patch(fx_graph_cache=False, autotune_local_cache=False):
            for bench, sets in drawn(cases, dtype, device, compile):
                compilable(bench, sets[0])
        return
    gpu = device == "cuda"
    with torch.device(device):
        roofs = gpu_roofs() if gpu else None

    def timed(bench: Bench, sets: list[tuple]) -> Iterator[list[dict]]:
        bench = compilable(bench, sets[0])
        check(bench, sets[0])
        passes = [("f+b ", forward_backward, bench.both)] if bench.both else [("", forward, bench.forward)]
        if gpu and bench.both:
            passes.insert(0, ("f ", forward, bench.forward))
        for prefix, way, work in passes:
            functions = bench.parts | bench.alternatives
            calls = {name: [way(function, s, leaves(s)) for s in sets] for name, function in functions.items()}
            if roofs is None:
                times = measure({name: host_timer(c[0]) for name, c in calls.items()}, rounds)
                yield compare(prefix + bench.case, times, bench.ours, **work._asdict())
            else:
                rows = on_both_clocks(prefix + bench.case, calls, bench, rounds, **work._asdict())
                yield with_floor(rows, work, roofs, size_of(sets) < cache_size())

    yield from all_of(partial(timed, *case) for case in drawn(cases, dtype, device, compile))


def compilable(bench: Bench, inputs: tuple) -> Bench:
    """Compiles what torch.compile is to, for both passes. Returns the bench without what it fails on, and says so."""
    failed = set()
    for name in bench.alternatives.keys() & {*COMPILED}:
        began, function = time.monotonic(), bench.alternatives[name]
        try:
            forward(function, inputs, ())()
            if bench.both:
                forward_backward(function, inputs, leaves(inputs))()
            told = f"compiled in {time.monotonic() - began:.1f} s"
        except Exception as error:  # a kernel that does not fit the chip, for one; ours are timed all the same
            failed.add(name)
            told = f"left out, {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"{bench.case}, {name}: {told}", flush=True)
    return bench.only(name for name in bench.alternatives if name not in failed)


def all_of(parts: Iterable[Callable[[], Iterable[list[dict]]]]) -> Iterator[list[dict]]:
    """Yields the rows of all parts. If one fails, the others are measured nevertheless, and its error raised last."""
    failed = []
    for part in parts:
        try:
            yield from part()
        except Exception as error:
            traceback.print_exc()
            failed.append(error.with_traceback(None))  # which would keep its tensors
    if failed:
        raise failed[0]


def on_both_clocks(case: str, calls: dict[str, list], bench: Bench, rounds: int, **counts: float) -> list[dict]:
    """Returns rows by kernel time, or by host time for alternatives that cannot be captured in a graph."""
    waits = calls.keys() if bench.ours in bench.waits else calls.keys() & set(bench.waits)
    kernels = measure({name: graph_timer(c) for name, c in calls.items() if name not in waits}, rounds)
    latency = measure({name: host_timer(c[0]) for name, c in calls.items()}, rounds)
    by_host = compare(case, latency, bench.ours, clock="host", **counts)
    by_graph = compare(case, kernels, bench.ours, clock="graph", **counts) if kernels else []
    found = {row["alternative"]: row for row in (*by_host, *by_graph)}  # graph times take precedence
    return [found[row["alternative"]] | {"call_ms": row["median_ms"]} for row in by_host]


def input_sets(bench: Bench) -> list[tuple]:
    """Draws enough inputs that a round over them finds none in the GPU cache, but at most MOST_SETS."""
    drawn = [bench.make()]
    more = 2 * cache_size() // max(size_of(drawn), 1)
    return drawn + [bench.make() for _ in range(min(MOST_SETS - 1, more))]


def size_of(sets: Iterable[tuple]) -> int:
    """Returns the total size of inputs in bytes."""
    return sum(x.nbytes for inputs in sets for x in inputs if isinstance(x, Tensor))


def cache_size() -> int:
    """Returns the size of the GPU's L2 cache in bytes."""
    return torch.cuda.get_device_properties(0).L2_cache_size


def with_floor(rows: list[dict], work: Work, roofs: dict[str, float], in_cache: bool) -> list[dict]:
    """Adds the ratio of the roofline minimum to kernel times, unless inputs fit the cache, which is faster."""
    if in_cache:
        return [row | {"in_cache": True} for row in rows]
    floor = max(work.bytes / roofs["copy_bytes_per_s"], work.flops / roofs["matmul_flops_per_s"]) * 1e3
    told = {"floor_ms": floor, "roofs": roofs}
    return [row | told | {"of_floor": floor / row["median_ms"]} if row["clock"] == "graph" else row for row in rows]


def gpu_roofs() -> dict[str, float]:
    """Measures the copy bandwidth (bytes read and written per second) and bfloat16 matmul FLOP/s of this GPU.

    The copy multiplies on the way, which makes it a kernel: a plain one is a memcpy node of the graph, and takes half
    as long again (4.27 and 2.71 TB/s on an H200).
    """
    source = torch.randn(2**28, dtype=torch.bfloat16)
    target, side = torch.empty_like(source), 8192
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16)
    timers = {
        "copy": graph_timer([lambda: torch.mul(source, 1.5, out=target)]),
        "matmul": graph_timer([lambda: a @ b]),
    }
    seconds = {name: statistics.median(times) for name, times in measure(timers).items()}
    return {
        "copy_bytes_per_s": 2 * source.nbytes / seconds["copy"],
        "matmul_flops_per_s": 2 * side**3 / seconds["matmul"],
    }


# Records


def main(name: str, cases: Callable[[torch.dtype], Iterator[Bench]]) -> None:
    """Entry point of `python -m bench.NAME`: runs the cases, prints a table, and with --json writes NAME.json."""
    command(name, lambda o: run(cases, getattr(torch, o.dtype), o.device, o.rounds, o.compile))


def command(
    name: str, rows_of: Callable[[argparse.Namespace], Iterable[list[dict]]], dtypes: Sequence[str] = DTYPES
) -> None:
    """Command line of a bench. rows_of: yields the rows of each case when they are measured. dtypes: it can be run in,
    none if its cases have dtypes of their own."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 on a GPU",
                        choices=DTYPES)  # fmt: skip
    parser.add_argument("--compile", choices=COMPILE, default="with", help="torch.compile on a GPU; default: with")
    parser.add_argument("--json", nargs="?", const=RESULTS, type=Path, metavar="FOLDER",
                        help=f"also write FOLDER/{name}.json{' (_amx.json: with AMX)' if name in PRODUCTS else ''}; "
                        "default: bench/results, of a GPU bench/results/gpu")  # fmt: skip
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: a median with its spread wants 2 at least")
    if options.threads is not None and options.threads < 1:
        parser.error("--threads: 1 at least")
    if options.dtype and options.dtype not in dtypes:
        parser.error(f"--dtype: {name} {'takes ' + ' or '.join(dtypes) if dtypes else 'has cases of its own dtypes'}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU here that torch can use; leave it out to measure the CPU")
    if options.json is RESULTS and options.device == "cuda":  # beside the records of a processor, not in their place
        options.json = RESULTS / "gpu"
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.threads:
        torch.set_num_threads(options.threads)
    whole_float32()
    # A processor without tile units keeps records of its own.
    tiles = HAS_AMX and options.device == "cpu" and name in PRODUCTS
    path = options.json and options.json / f"{name}{'_amx' if tiles else ''}.json"
    record = {
        "bench": name,
        "setting": setting(name, options),
        "rows": [],
    }  # before results are written, which may change the git state
    torch.manual_seed(0)
    print(HEAD, flush=True)
    for rows in rows_of(options):
        show(rows)
        record["rows"] += rows
        if path:
            write(path, record | {"cut": True})  # stays set if the bench is interrupted
    if path:
        write(path, record)


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(record, indent=1, sort_keys=True) + "\n")


def whole_float32() -> None:
    """Disables tf32, so that float32 means float32; cuDNN convolutions use tf32 by default."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def show(rows: list[dict]) -> None:
    for row in rows:
        ms = " ".join(f"{row[f'{key}_ms']:>9.3f}" for key in ("median", "p20", "p80"))
        floor = "in cache" if row.get("in_cache") else f"{row['of_floor']:>8.0%}" if "of_floor" in row else ""
        print(f"{row['case']:<40} {row['alternative']:<27} {ms} {row['over_ours']:>8.2f}x {floor}".rstrip(), flush=True)


def read(name: str) -> dict:
    """Returns a committed record of `RESULTS`."""
    return read_file(RESULTS / f"{name}.json")


def read_file(path: Path) -> dict:
    """Returns a record. Ends the process if it is no JSON, such as one that was copied in part."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read: {error}; copy or measure it again, or take it back from git")


def setting(name: str, options: argparse.Namespace) -> dict:
    """Returns the commit, versions, processor, and hash of the measured sources."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    facts = {
        "commit": commit or None,
        "source": source_hash(options.device, name),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if options.device == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return facts


def source_hash(device: str, bench: str) -> str:
    """Returns a hash of the kernels that a bench runs on a device, and of the references they are compared to."""
    op = bench.removeprefix("bench_")
    alone = (ROOT / f"avadclip_fast/reference/{op}.py").exists()
    own = f"{op}*" if alone else "*"  # a whole step or model
    patterns = [f"avadclip_fast/reference/{own}.py"]
    patterns += {
        "cpu": [f"csrc/{own}_cpu.cpp"],
        "cuda": ["csrc/*.cu*", "csrc/*.h", "kernels/**/*"],  # they include one another
    }[device]
    paths = {path for pattern in patterns for path in ROOT.glob(pattern) if path.suffix in SOURCES}
    texts = with_included({path for path in paths if path.name != "__init__.py"})
    digest = hashlib.sha256()
    for path, text in sorted(texts.items()):
        if alone or not path.name.startswith("uniform_pool"):  # pooling happens before training steps and inference
            digest.update(path.name.encode() + text.encode())
    return digest.hexdigest()[:16]


def with_included(paths: Iterable[Path]) -> dict[Path, str]:
    """Returns what is measured of these files, and of those beside them that they include or import."""
    texts: dict[Path, str] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path not in texts:
            texts[path] = text = measured(path.read_text())
            names = re.findall(r'^#include "(.+)"', text, re.M) + [
                f"{name}.py" for name in re.findall(r"^from \.(\w+) import", text, re.M)
            ]
            waiting += [path.parent / name for name in names]
    return texts


def measured(text: str) -> str:
    """Removes code that only tests compile: the branches of `#ifdef AVADCLIP_EMULATED_TILES`."""
    kept, emulated = [], None
    for line in text.splitlines(keepends=True):
        if line.rstrip() == "#ifdef AVADCLIP_EMULATED_TILES":
            emulated = True
        elif emulated is not None and line.rstrip() == "#else":
            emulated = False
        elif emulated is not None and line.rstrip() == "#endif":
            emulated = None
        elif not emulated:
            kept.append(line)
    return "".join(kept)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
