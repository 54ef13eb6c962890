"""Work beside work: on a stream of its own while a CUDA graph is recorded."""

from collections.abc import Callable

import torch
from torch import Tensor


def aside(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Begins function(), which needs nothing of what is computed meanwhile; what it returns gives the result.

    In a CUDA graph that is being recorded the two become branches that run side by side, in the backward pass too.
    Otherwise, where the host's launches leave no room for it, function runs when its result is asked for.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return function
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = function()

    def joined() -> Tensor:
        main.wait_stream(side)
        result.record_stream(main)  # its memory is the side stream's to use again, but not before main is through
        return result

    return joined
