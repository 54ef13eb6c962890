"""Overlapping work on a side stream during CUDA graph capture."""

from collections.abc import Callable

import torch
from torch import Tensor


def aside(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Starts function(), which must be independent of later work, and returns a callable that yields its result.

    During CUDA graph capture, function runs on a side stream and becomes a parallel branch of the graph, also in the
    backward pass. Otherwise it runs when the callable is called, since launch-bound code gains nothing from overlap.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return function
    # Its kernels are small and depend on each other: before others they wait for few blocks of the main branch's.
    main, side = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function()

    def joined() -> Tensor:
        main.wait_stream(side)
        result.record_stream(main)  # the side stream may reuse its memory only after main is done with it
        return result

    return joined
