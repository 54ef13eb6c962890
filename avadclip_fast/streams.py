"""Side streams during CUDA graph capture, which become branches of the graph, also in the backward pass.

Without capture, work runs where it stands: launch-bound code gains nothing from overlap. It does so in the same order,
so that gradients add up to the same bits.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

FIRST = -1  # the priority of kernels that are small and depend on each other: their blocks run before others that wait

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


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

    def joined() -> Result:
        main.wait_stream(side)
        for x in (result,) if isinstance(result, Tensor) else result:
            x.record_stream(main)  # the side stream may reuse its memory only after main is done with it
        return result

    return joined


def _capturing() -> bool:
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _side(main: torch.cuda.Stream, name: str, priority: int) -> torch.cuda.Stream:
    """The same one for every capture: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(main.device, priority=priority)
