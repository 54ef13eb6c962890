"""A training step as one CUDA graph: recorded once for each size of a batch, then replayed on what its inputs hold.

A step launches hundreds of kernels, many of which take less time than a launch. A graph launches them all at once.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from . import distributed

REHEARSALS = 2  # the first compiles kernels and makes AdamW's moments, the second allocates what every later one does


def refusal(device: torch.device) -> str | None:
    """Why steps on `device` cannot be recorded, or None."""
    if device.type != "cuda":
        return f"only a GPU's work can be, and this is {device.type}"
    if distributed.world() > 1:
        return "each of several processes weighs its part of a batch anew"
    return None


def changed_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that its steps change: the parameters and, once there are some, their moments."""
    moments = [x for state in optimizer.state.values() for x in state.values()]
    return [*(p for group in optimizer.param_groups for p in group["params"]), *moments]


class StepGraph:
    """function(*inputs) -> Tensor, as a graph for each set of input shapes.

        step = StepGraph(train_on, changed=lambda: changed_by(optimizer))
        step.record(index)                   # before the first step, with an example of every shape to come
        torch.manual_seed(seed)              # a replay draws what a plain call would
        losses = step(index)                 # lies where the next replay of this shape will write

    function: reads nothing of the device on the host, changes tensors in place, and draws from the default generator.
    changed: gives the tensors that it changes. Recording leaves them as they are: those that it finds get their values
    back, those that were made by the first call, as AdamW's moments are, become zero.
    """

    def __init__(self, function: Callable[..., Tensor], changed: Callable[[], Iterable[Tensor]]):
        self.function, self.changed = function, changed
        self.recorded: dict[tuple, tuple[tuple[Tensor, ...], Callable[[], None], Tensor]] = {}
        self.pool: tuple[int, int] | None = None  # of memory: graphs that take turns share it

    def record(self, *inputs: Tensor) -> None:
        """Makes the graph for inputs of these shapes, if it is not there. The values are only to be fit to compute."""
        if _shapes(inputs) in self.recorded:
            return
        kept = tuple(x.clone() for x in inputs)
        with _unchanged(self.changed):
            rehearse(lambda: self.function(*kept))
        replay, result, self.pool = capture(lambda: self.function(*kept), self.pool)
        self.recorded[_shapes(inputs)] = kept, replay, result

    def __call__(self, *inputs: Tensor) -> Tensor:
        kept, replay, result = self.recorded[_shapes(inputs)]
        for own, given in zip(kept, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        replay()
        return result


def rehearse(function: Callable[[], object]) -> None:
    """Calls it a few times on a stream of its own, as recording wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*capturable=True.*")  # AdamW, of being called without being recorded
        for _ in range(REHEARSALS):
            function()
    torch.cuda.current_stream().wait_stream(side)


def capture(function: Callable[[], Tensor], pool) -> tuple[Callable[[], None], Tensor, tuple[int, int]]:
    """Records a call. Returns what replays it, its result, and the memory pool it lies in."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: what they do is not recorded, nor an error.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result, graph.pool()


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
