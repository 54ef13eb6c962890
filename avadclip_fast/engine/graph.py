"""Runs a step of training or scoring as one CUDA graph, recorded once per batch size and replayed for every batch.

A step launches hundreds of kernels, many of which take less time than their launch. A graph launches them all at once.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..device import current

REHEARSALS = 2  # warm-up calls: the first compiles kernels and creates moments, the second allocates like later steps

Result = TypeVar("Result")


def recordable(device: torch.device) -> bool:
    """Whether steps on `device` can be recorded."""
    return device.type == "cuda"


def changed_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the tensors that a step changes: the parameters and, once they exist, their moments."""
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return [*(p for group in optimizer.param_groups for p in group["params"]), *moments]


class StepGraph:
    """Runs function(*inputs) as a CUDA graph, one for each set of input shapes.

        step = StepGraph(train_on, changed=lambda: changed_by(optimizer))
        step.record(index)                   # before the first step, once for every shape
        torch.manual_seed(seed)              # a replay draws the same numbers as a plain call
        losses = step(index)                 # overwritten by the next replay of this shape

    function: must not synchronize with the device, must change tensors in place, and must draw from the default
    generator; every replay returns the same tensors, with new values. It runs on the GPU of its first input, which
    need not be the current one.
    changed: returns the tensors that the function changes, by default none. Recording has no net effect on them:
    existing tensors get their values back, and tensors that the first call creates, such as AdamW's moments, are set to
    zero.
    """

    def __init__(self, function: Callable[..., Any], changed: Callable[[], Iterable[Tensor]] = tuple):
        self.function, self.changed = function, changed
        self.recorded: dict[tuple, tuple[tuple[Tensor, ...], Callable[[], None], Any]] = {}
        self.pool: tuple[int, int] | None = None  # memory pool, shared by graphs that never run at the same time

    def record(self, *inputs: Tensor) -> None:
        """Records the graph for inputs of these shapes unless it exists. The inputs may hold any valid values."""
        if _shapes(inputs) in self.recorded:
            return
        kept = tuple(x.clone() for x in inputs)
        # A graph recorded on the current GPU would hold nothing of what runs on another, and its replays do nothing.
        with current(inputs[0].device) if inputs else contextlib.nullcontext():
            with _unchanged(self.changed):
                rehearse(lambda: self.function(*kept))
            replay, result, self.pool = capture(lambda: self.function(*kept), self.pool)
        self.recorded[_shapes(inputs)] = kept, replay, result

    def __call__(self, *inputs: Tensor) -> Any:
        kept, replay, result = self.recorded[_shapes(inputs)]
        for own, given in zip(kept, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        replay()
        return result


def rehearse(function: Callable[[], object]) -> None:
    """Warms up a function on a side stream, as CUDA graph capture requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*capturable=True.*")  # AdamW warns if called outside a capture
        for _ in range(REHEARSALS):
            function()
    torch.cuda.current_stream().wait_stream(side)


def capture(function: Callable[[], Result], pool) -> tuple[Callable[[], None], Result, tuple[int, int]]:
    """Captures a call on the current GPU. Returns the replay function, the result, and the memory pool."""
    graph, stream = torch.cuda.CUDAGraph(), _capturing(torch.cuda.current_device())
    # Other threads may use the GPU meanwhile: their work is neither captured nor an error.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result, graph.pool()


@functools.cache
def _capturing(device: int) -> torch.cuda.Stream:
    """The stream of a GPU's captures, one for all, as sharing a pool requires. torch's own stays on the first GPU."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _unchanged(tensors: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    before = {x: x.detach().clone() for x in tensors()}
    yield
    with torch.no_grad():
        for x in tensors():
            if x in before:
                x.copy_(before[x])
            else:
                x.zero_()


def _shapes(inputs: Iterable[Tensor]) -> tuple:
    return tuple((x.shape, x.dtype) for x in inputs)
