"""Named ranges for Nsight and for torch's traces. Off by default, and then a span costs one look at a flag.

    with profiling():                 # or AVADCLIP_FAST_NVTX=1
        with span("forward"):
            out = model(visual, audio, lengths)

While they are on, every op opens a range "op:backend" around its call, and "op:backend:backward" around its backward
pass where an operator of this library computes that. What torch.compile or torch.export traces has none.
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
    """Turns the ranges on inside the block, or off."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before


def span(name: str) -> AbstractContextManager[None]:
    """A range of this name: of NVTX where there is a GPU, and in the traces of torch.profiler. Ranges nest.

    No / @ , [ ] or * in a name: they have a meaning in Nsight Compute's filters.
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
    return torch.cuda.is_available()  # a torch without CUDA has no NVTX


def span_backward(name: str, out: Tensor | tuple) -> None:
    """Opens a range around the node that an op's (first) result comes from, when its gradient is computed: where it is
    an operator's of this library. (Of a chain of torch's own, the last node would be taken for the whole.)"""
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
def trace(folder: str | Path, steps: int = 10, skip: int = 5, name: str = "trace.json") -> Iterator[Callable[[], None]]:
    """Writes `folder`/`name`, a Chrome trace of a few steps, and yields the function to be called after every step.

        with trace("runs/teacher/profile", steps=10) as step_done:
            for batch in batches:
                with span("forward"):
                    ...
                step_done()

    steps: how many are recorded; skip: how many go before them, of which the last warms the profiler up. The ranges are
    on inside the block. The file is there as soon as the last of them is done, whole or not at all; what comes after
    runs without the profiler. A block that ends early leaves the steps there were; without any, nothing but a warning.
    Raises OSError where the folder cannot be written, ValueError on counts below one.
    """
    if steps < 1 or skip < 1:
        raise ValueError(f"trace: steps and skip must be whole numbers above zero, got {steps} and {skip}")
    path = Path(folder) / name
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
        _log.warning("%s was not written: the run ended within the %d steps before those to record", path, skip)


def activities() -> list[torch.profiler.ProfilerActivity]:
    """What torch's profiler is to watch: the host, and the GPU where there is one."""
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if torch.cuda.is_available() else [activity.CPU]


def export(profile: torch.profiler.profile, path: Path) -> None:
    """Writes a finished profile as a Chrome trace, whole or not at all. Raises OSError."""
    temporary = path.parent / f".{secrets.token_hex(8)}.json"
    try:
        profile.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
