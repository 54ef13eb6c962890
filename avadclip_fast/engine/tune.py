"""Finds the fastest tiles of the GEMM kernels on this GPU and writes them to the table, configs/linear_act.json.

A launch keeps the default unless a candidate is at least 2 % faster, since smaller gains are noise. Configurations that
spill registers are rejected. Compiling takes longer than timing, so candidates are compiled in parallel. After tuning,
run the tests and bench.aot_triton, which cover the committed table.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from ..data.atomic import atomic_write
from ..kernels import gated_fusion, linear_act

B, T, D, C = 96, 256, 512, 7  # the paper's training step

LAUNCHERS = ((linear_act, "gemm"), (linear_act, "weight_grad"), (gated_fusion, "gates"), (gated_fusion, "gemm"))
KERNELS = ((linear_act, "gemm_kernel"), (linear_act, "weight_grad_kernel"), (gated_fusion, "gates_kernel"))
GAIN = 1.02  # repeated timings of one kernel differ by this factor


TILES = {  # rows, cols, depth, warps
    "gemm": (
        (128, 128, 64, 8), (128, 128, 64, 4), (128, 256, 64, 8), (256, 128, 64, 8), (64, 256, 64, 4), (64, 128, 64, 4),
        (64, 64, 64, 4),
    ),
    "weight_grad": (
        (128, 128, 64, 8), (128, 128, 64, 4), (128, 256, 64, 8), (256, 128, 64, 8), (64, 128, 64, 4),
        (128, 128, 128, 8),
    ),
    "gates": ((128, 64, 64, 8), (128, 128, 64, 8), (64, 64, 64, 4), (64, 128, 64, 8)),
}  # fmt: skip


def gemms(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields (name, forward and backward pass) of each call; device "meta" allocates no memory."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def linear(
        outputs: int, width: int = D, taps: int = 0, activation="none", residual=False, dot=False,
        dilation=1, causal=False, lengths=False, transposed=False, dropout=False, shape=(B, T),
    ) -> Callable[[], None]:  # fmt: skip
        def run() -> None:
            x = draw(*shape, width)
            weight = draw(width, outputs).T if transposed else draw(outputs, width, *((taps,) if taps else ()))
            u = draw(outputs) if dot else None
            r = draw(*shape, outputs) if residual else None
            n = torch.full((B,), T, device=device) if lengths else None
            mask = torch.ones(*shape, outputs, device=device, dtype=torch.bool) if dropout else None
            keep = dot or activation == "quick_gelu" or (activation == "relu" and residual)
            out, y = linear_act.forward(
                x, weight, draw(outputs), activation, r, dilation, causal, n, u, keep, mask, 1.1
            )
            linear_act.backward(
                torch.ones_like(out), x, weight, activation, dilation, causal, n, u, y if keep else out,
                [True, True, True, dot], mask if keep else None, 1.1,  # `out` tells what ReLU's dropout dropped
            )  # fmt: skip

        return run

    def fusion() -> None:
        weights = [draw(*shape) for shape in ((D, 2 * D), (D,), (D, 2 * D), (D,), (D, D), (D,))]
        visual, audio = draw(B, T, D), draw(B, T, D)
        out, *saved = gated_fusion.forward(visual, audio, *weights, True)
        gated_fusion.backward(torch.ones_like(out), visual, audio, *weights[::2], *saved)

    yield "qkv", linear(3 * D)
    yield "queries", linear(D)
    yield "projection", linear(D, residual=True)
    yield "mlp", linear(4 * D, activation="quick_gelu")
    yield "mlp projection", linear(D, 4 * D, residual=True)
    yield "binary head", linear(4 * D, activation="quick_gelu", dot=True)
    yield "prompt layer", linear(4 * D, activation="quick_gelu", shape=(B, C))
    yield "graph weights", linear(D, transposed=True)
    yield "graph convolution", linear(D, taps=5)
    yield "graph convolution, lengths", linear(D, taps=5, lengths=True)
    yield "uncertainty", linear(D, taps=3, activation="relu", residual=True)
    yield "uncertainty, lengths", linear(D, taps=3, activation="relu", residual=True, lengths=True)
    yield "audio", linear(D, taps=2, activation="relu", dilation=4, causal=True, dropout=True)
    yield "fusion", fusion


def candidates(kind: str, default: dict) -> Iterator[dict]:
    """Yields the candidates: each tile with two prefetch depths, large GEMM tiles also with persistent programs."""
    narrow = 64 // default["depth"]  # float32 blocks have half the channels
    for rows, cols, depth, warps in TILES[kind]:
        tile = {"rows": rows, "cols": cols, "depth": depth // narrow, "warps": warps}
        for stages in (3, 4):
            yield {**default, **tile, "stages": stages}
            if kind == "gemm" and rows * cols >= 128 * 128:
                yield {**default, **tile, "stages": stages, "persistent": True}


def launches(dtype: torch.dtype, only: str) -> dict[str, tuple[str, dict, Callable[[], object]]]:
    """Runs the calls and returns bucket -> (kind, default configuration, the first launch in this bucket)."""
    found: dict[str, tuple[str, dict, Callable]] = {}
    asked: list[tuple[str, str, dict]] = []

    def note(kind, x, rows, outputs, width):
        chip, _ = linear_act._chip(x.device)
        default = linear_act.default_config(kind, chip, x.dtype, rows, outputs)
        asked.append((linear_act.bucket(kind, x.dtype, rows, outputs, width), kind, default))
        return default

    def keep(launcher):
        def run(*args, **named):
            result = launcher(*args, **named)
            bucket, kind, default = asked[-1]
            found.setdefault(bucket, (kind, default, lambda: launcher(*args, **named)))
            return result

        return run

    with contextlib.ExitStack() as stack:
        for module in (linear_act, gated_fusion):
            stack.enter_context(mock.patch.object(module, "config", note))
        for module, name in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, name, keep(getattr(module, name))))
        for name, run in gemms(dtype, "cuda"):
            if only in name:
                run()
    return found


class Spills:
    """Wraps a kernel and counts the registers that its launches spill."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        def launch(*args, **named):
            self.count += self.kernel[grid](*args, **named).n_spills

        return launch


class Ahead:
    """Wraps a kernel and compiles it for each launch in a thread pool, without launching it."""

    def __init__(self, kernel, pool: Executor):
        self.kernel, self.pool = kernel, pool

    def __getitem__(self, grid):
        def launch(*args, **named):
            self.pool.submit(self.kernel.warmup, *args, grid=grid, **named)

        return launch


@contextlib.contextmanager
def under(config: dict, stand_in: Callable[[Any], Any]) -> Iterator[list]:
    """Inside the block, launches use this configuration and every kernel is replaced by `stand_in(kernel)`."""
    with contextlib.ExitStack() as stack:
        for module in (linear_act, gated_fusion):
            stack.enter_context(mock.patch.object(module, "config", lambda *_: config))
        yield [
            stack.enter_context(mock.patch.object(module, name, stand_in(getattr(module, name))))
            for module, name in KERNELS
        ]


def compile_ahead(launch: Callable[[], object], configs: Iterable[dict]) -> None:
    """Compiles a launch with all configurations in parallel. A configuration that fails raises later, when timed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for config in configs:
            with under(config, lambda kernel: Ahead(kernel, pool)):
                launch()


def microseconds(launch: Callable[[], object], config: dict) -> float | None:
    """Returns the median time with a configuration, by graph replay; None if it spills or does not fit the chip."""
    with under(config, Spills) as watched:
        try:
            launch()
        except triton.runtime.errors.OutOfResources:
            return None
        if any(kernel.count for kernel in watched):
            return None
        return triton.testing.do_bench_cudagraph(launch, rep=10, return_mode="median") * 1e3


def tune(dtype: torch.dtype = torch.bfloat16, only: str = "", say: Callable[[str], None] = print) -> dict[str, dict]:
    """Times every candidate for every launch and adds the winners to this chip's table; returns the added entries.

    only: substring of the names of the calls to tune, see `gemms`. say: prints a line per launch. Requires a GPU that
    Triton supports.
    """
    chip, _ = linear_act._chip(torch.device("cuda"))
    table = json.loads(linear_act.CONFIGS.read_text())
    measured = {}
    for bucket, (kind, default, launch) in launches(dtype, only).items():
        base = microseconds(launch, default)
        assert base is not None, f"{bucket}: the default spills, or does not fit this chip"
        best = base
        chosen = default
        worth_trying = list(candidates(kind, default))
        compile_ahead(launch, worth_trying)
        for config in [*worth_trying, None]:
            config = config or {**chosen, "tma": False}  # finally, the best one without TMA descriptors
            took = microseconds(launch, config)
            if took is not None and took * GAIN < best:
                best, chosen = took, config
        say(f"{bucket}: default {base:.1f} us, best {best:.1f} us {chosen}")
        measured[bucket] = {**chosen, "us": round(best, 2)}
        # saved after each launch, so that an interrupted run keeps its results
        table[chip] = dict(sorted({**table.get(chip, {}), **measured}.items()))
        with atomic_write(linear_act.CONFIGS, "w") as file:
            file.write(json.dumps(table, indent=1) + "\n")
    return measured
