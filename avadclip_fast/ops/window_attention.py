"""window_attention: block-diagonal self-attention."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_positive, check_tensors

_dispatch.register("window_attention", "reference", reference.window_attention)


def window_attention(
    qkv: Tensor, window: int, heads: int = 1, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Self-attention inside windows of consecutive snippets: i attends to j only if i // window == j // window.

        out_i = sum_j softmax_j(<q_i, k_j> / sqrt(D / heads)) v_j

    qkv: (B, T, 3D) floating point: queries, keys and values side by side
    window: snippets per window; where it does not divide T the last window is shorter
    heads: must divide D
    lengths: (B,) int; keys t >= lengths[b] are then left out, and rows t >= lengths[b] of out are 0
    Returns (B, T, D) in qkv's dtype. Raises ValueError on shapes, numbers or lengths that do not fit.
    Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("window_attention", ("qkv", qkv, "B T 3D"))
    check_positive("window_attention", window=window, heads=heads)
    if sizes["D"] % heads:
        raise ValueError(f"window_attention: heads={heads} must divide the width {sizes['D']}")
    check_lengths("window_attention", lengths, sizes["B"], sizes["T"], qkv.device)
    return _dispatch.run("window_attention", backend, qkv, window, heads, lengths)
