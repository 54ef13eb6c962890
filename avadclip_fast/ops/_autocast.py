"""References under torch.autocast."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def without_autocast(reference: Callable) -> Callable:
    """Keeps a reference in the precision of its inputs, as the kernels are: a bf16 cosine would miss the threshold."""

    @functools.wraps(reference)
    def run(x: Tensor, *args, **kwargs):
        if not torch.is_autocast_enabled(x.device.type):
            return reference(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, *args, **kwargs)

    return run
