"""Dropout masks."""

import torch
from torch import Tensor

from ._triton import implement, triton_reason

torch.library.define("avadclip_fast::keep", "(Tensor seed, SymInt[] shape, float p) -> Tensor")
implement("keep", "keep", "forward")


@torch.library.register_fake("avadclip_fast::keep")
def _(seed, shape, p):
    return seed.new_empty(shape, dtype=torch.bool)


def keep(x: Tensor, p: float) -> Tensor:
    """A random mask of x's shape and device, False for a share p of the elements (rounded to 1/65536)."""
    by_kernel = triton_reason(x) is None
    if torch.compiler.is_compiling() or not 0 < p < 1 or not (by_kernel or x.device.type == "cpu"):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    if by_kernel:
        seed = torch.empty((), dtype=torch.int64, device=x.device).random_()  # a graph's replays draw others
        return torch.ops.avadclip_fast.keep(seed, x.shape, p)
    # Torch draws one number after the other on a CPU; here each draw of 64 bits serves four elements.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)  # over all of int16
    return uniform >= min(round(p * 2**16), 2**16 - 1) - 2**15
