"""Side streams during CUDA graph capture, which become branches of the graph, also in the backward pass.

Without capture, work runs where it stands: launch-bound code gains nothing from overlap. It does so in the same order,
so that gradients add up to the same bits.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

FIRST = -1  # the priority of kernels that are small and depend on each other: their blocks run before others that wait

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])

_started: ContextVar[tuple[torch.cuda.Event, torch.cuda.Stream] | None] = ContextVar("_started", default=None)


def aside(name: str, function: Callable[[], Result], priority: int = 0) -> Callable[[], Result]:
    """Runs function(), of which later work is independent, and returns a callable that yields its result.

    During capture, function runs on a side stream, beside what comes before that callable is called.
    name: of the branch; those of one name that leave the same stream wait for each other
    """
    if not _capturing():
        result = function()
        return lambda: result
    main = torch.cuda.current_stream()
    side = _side(main, name, priority)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function()
    return lambda: _joined(main, side, result)


@contextlib.contextmanager
def branching() -> Iterator[None]:
    """Lets what `early` gets inside the block run beside anything in it, during capture."""
    if not _capturing():
        yield
        return
    main = torch.cuda.current_stream()
    before = _started.set((main.record_event(), _side(main, "early", FIRST)))
    try:
        yield
    finally:
        _started.reset(before)


def early(function: Callable[[], Result]) -> Result:
    """function(), which must depend on nothing but what was there before `branching`, such as on weights alone.

    Preparing weights takes several small kernels, each of which is shorter than the gaps around it. During capture in
    such a block, they are a branch that starts where the block does, and has ended long before its result is needed.
    """
    if not _capturing() or (started := _started.get()) is None:
        return function()
    start, side = started
    side.wait_event(start)
    with torch.cuda.stream(side):
        result = function()
    return _joined(torch.cuda.current_stream(), side, result)


def _capturing() -> bool:
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _side(main: torch.cuda.Stream, name: str, priority: int) -> torch.cuda.Stream:
    """The same one for every capture: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(main.device, priority=priority)


def _joined(main: torch.cuda.Stream, side: torch.cuda.Stream, result: Result) -> Result:
    main.wait_stream(side)
    for x in (result,) if isinstance(result, Tensor) else result:
        x.record_stream(main)  # the side stream may reuse its memory only after main is done with it
    return result
