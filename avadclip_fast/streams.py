"""Side streams during CUDA graph capture, which become branches of the graph, also in the backward pass.

Without capture, work runs in place: launch-bound code gains nothing from overlap. The order is the same, so gradients
are equal bit for bit.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

FIRST = -1  # the priority of kernels that are small and depend on each other: their blocks run before others that wait

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def aside(name: str, function: Callable[[], Result], priority: int = 0) -> Callable[[], Result]:
    """Runs function() and returns a callable that yields its result; work before that call must not depend on it.

    During capture, function runs on a side stream, in parallel with that work.
    name: of the branch; branches of one name from the same stream wait for each other
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
