"""Named ranges for Nsight and torch.profiler. Off by default; a disabled span costs one flag check.

    with profiling():                 # or AVADCLIP_FAST_NVTX=1
        with span("forward"):
            out = model(visual, audio, lengths)

When enabled, every op opens a range "op:backend" around its call, and "op:backend:backward" around its backward pass
if an operator of this library computes it. Code traced by torch.compile or torch.export has no ranges.
"""

import contextlib
import functools
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

enabled = os.environ.get("AVADCLIP_FAST_NVTX", "") not in ("", "0")

_OFF = contextlib.nullcontext()
_log = logging.getLogger("avadclip_fast")


@contextlib.contextmanager
def profiling(on: bool = True) -> Iterator[None]:
    """Enables or disables the ranges inside the block."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before


def span(name: str) -> AbstractContextManager[None]:
    """Context manager for a named range in torch.profiler and, with a GPU, in NVTX. Ranges nest.

    The name must not contain / @ , [ ] or *, which are special in Nsight Compute's filters.
    """
    return _Range(name) if enabled and not torch.compiler.is_compiling() else _OFF


class _Range:
    def __init__(self, name: str):
        self.name, self.record = name, torch.profiler.record_function(name)

    def __enter__(self) -> None:
        self.record.__enter__()
        if _nvtx():
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error: object) -> None:
        if _nvtx():
            torch.cuda.nvtx.range_pop()
        self.record.__exit__(None, None, None)


@functools.cache
def _nvtx() -> bool:
    return torch.cuda.is_available()  # torch without CUDA has no NVTX


def span_backward(name: str, out: Tensor | tuple) -> None:
    """Opens a range around the backward node of an op's first output, if it is an operator of this library.

    An op composed of torch operators gets no range: its last node would stand for the whole chain.
    """
    node = (out[0] if isinstance(out, tuple) else out).grad_fn
    if node is None or "avadclip_fast" not in node.name():
        return
    opened: list[_Range] = []

    def before(*_: object) -> None:
        opened.append(_Range(name))
        opened[-1].__enter__()

    node.register_prehook(before)
    node.register_hook(lambda *_: opened.pop().__exit__())


@contextlib.contextmanager
def trace(folder: str | Path, steps: int = 10, skip: int = 5) -> Iterator[Callable[[], None]]:
    """Writes `folder`/trace.json, a Chrome trace of a few steps; yields a function to call after every step.

        with trace("runs/teacher/profile", steps=10) as step_done:
            for batch in batches:
                with span("forward"):
                    ...
                step_done()

    Ranges are enabled inside the block. The file is written atomically after the last recorded step, and later steps
    run without the profiler. A block that ends early writes the steps recorded so far, or logs a warning if there are
    none.

    steps: number of recorded steps
    skip: number of steps before them, the last of which warms up the profiler
    Raises OSError if the folder cannot be written, ValueError if steps or skip is below one.
    """
    if steps < 1 or skip < 1:
        raise ValueError(f"trace: steps and skip must be whole numbers above zero, got {steps} and {skip}")
    path = Path(folder) / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = False

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        export(profile, path)
        written = True

    plan = torch.profiler.schedule(skip_first=skip - 1, wait=0, warmup=1, active=steps, repeat=1)
    profiler = torch.profiler.profile(activities=activities(), schedule=plan, on_trace_ready=write, acc_events=True)
    with profiling(), profiler as profile:
        yield profile.step
    if not written:
        _log.warning("%s was not written: the run ended during the %d steps before recording starts", path, skip)


def activities() -> list[torch.profiler.ProfilerActivity]:
    """Activities for torch.profiler: the CPU, and the GPU if available."""
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if torch.cuda.is_available() else [activity.CPU]


def export(profile: torch.profiler.profile, path: Path) -> None:
    """Writes a finished profile as a Chrome trace, atomically. Raises OSError."""
    temporary = path.parent / f".{secrets.token_hex(8)}.json"
    try:
        profile.export_chrome_trace(str(temporary))
        if not temporary.exists():  # torch tells its log alone, and leaves what it wrote under another name
            raise OSError(f"{path}: torch could not write the trace; is the disk full?")
        os.replace(temporary, path)
    finally:
        for left in path.parent.glob(f"{temporary.name}*"):
            left.unlink()
