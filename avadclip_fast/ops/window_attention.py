"""window_attention: block-diagonal self-attention."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_counts, check_lengths, check_tensors
from ._derivatives import differentiable_once
from ._triton import implement, triton_reason

LONGEST = 128  # a Triton program holds the scores of whole windows


def _triton(qkv: Tensor, window: int, heads: int, lengths: Tensor | None) -> Tensor:
    return torch.ops.avadclip_fast.window_attention(qkv, window, heads, lengths)


def _triton_supports(qkv: Tensor, window: int, heads: int, lengths: Tensor | None) -> str | None:
    if min(window, qkv.shape[1]) > LONGEST:
        return f"it takes windows of up to {LONGEST} snippets, not {min(window, qkv.shape[1])}"
    return triton_reason(qkv)


_dispatch.register("window_attention", "reference", without_autocast(reference.window_attention))
_dispatch.register("window_attention", "triton", _triton, _triton_supports)

torch.library.define(
    "avadclip_fast::window_attention", "(Tensor qkv, SymInt window, int heads, Tensor? lengths) -> Tensor"
)
torch.library.define(
    "avadclip_fast::window_attention_backward",
    "(Tensor grad, Tensor qkv, SymInt window, int heads, Tensor? lengths) -> Tensor",
)

implement("window_attention", "window_attention", "forward")
implement("window_attention_backward", "window_attention", "backward")


@torch.library.register_fake("avadclip_fast::window_attention")
def _(qkv, window, heads, lengths):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@torch.library.register_fake("avadclip_fast::window_attention_backward")
def _(grad, qkv, window, heads, lengths):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, ctx.window, ctx.heads, lengths = inputs
    ctx.save_for_backward(qkv, lengths)


def _backward(ctx, grad):
    qkv, lengths = ctx.saved_tensors
    grad = torch.ops.avadclip_fast.window_attention_backward(grad, qkv, ctx.window, ctx.heads, lengths)
    return grad, None, None, None


torch.library.register_autograd("avadclip_fast::window_attention", _backward, setup_context=_save)
differentiable_once("window_attention", "window_attention_backward")


def window_attention(
    qkv: Tensor, window: int, heads: int = 1, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Self-attention within windows of consecutive snippets (official code of arXiv 2504.04495).

        out_i = sum_j softmax_j(<q_i, k_j> / sqrt(D / heads)) v_j      over j with i // window == j // window

    qkv: (B, T, 3D) floating point; queries, keys and values concatenated
    window: snippets per window, >= 1; if it does not divide T, the last window is shorter
    heads: must divide D
    lengths: (B,) int, to exclude keys t >= lengths[b] and zero those rows of out, or None
    Returns (B, T, D) in qkv's dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths, `window` or `heads`.
    Precision: scores and softmax in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("window_attention", ("qkv", qkv, "B T 3D"))
    check_counts("window_attention", window=window, heads=heads)
    if sizes["D"] % heads:
        raise ValueError(f"window_attention: heads={heads} must divide the width {sizes['D']}")
    check_lengths("window_attention", lengths, sizes["B"], sizes["T"], qkv.device)
    return _dispatch.run("window_attention", backend, qkv, window, heads, lengths)
