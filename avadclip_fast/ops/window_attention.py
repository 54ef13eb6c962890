"""window_attention: block-diagonal self-attention."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_counts, check_lengths, check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason


def longest(dtype: torch.dtype) -> int:
    """The longest window that Triton takes. A program holds the scores of whole windows: longer ones would spill."""
    return 64 if dtype == torch.float32 else 128


def _triton(q, k, v, window: int, heads: int, lengths: Tensor | None, residual: Tensor | None) -> Tensor:
    return torch.ops.avadclip_fast.window_attention(q, k, v, window, heads, lengths, residual)


def _triton_supports(q, k, v, window: int, heads: int, lengths: Tensor | None, residual: Tensor | None) -> str | None:
    if min(window, q.shape[1]) > longest(q.dtype):
        return f"it takes windows of up to {longest(q.dtype)} snippets of {q.dtype}, not {min(window, q.shape[1])}"
    if not q.dtype == k.dtype == v.dtype:
        return "q, k and v differ in dtype"
    return triton_reason(q, *(() if residual is None else (residual,)))


_dispatch.register("window_attention", "reference", without_autocast(reference.window_attention))
_dispatch.register("window_attention", "triton", _triton, _triton_supports)

torch.library.define(
    "avadclip_fast::window_attention",
    "(Tensor q, Tensor k, Tensor v, SymInt window, int heads, Tensor? lengths, Tensor? residual) -> Tensor",
)
torch.library.define(
    "avadclip_fast::window_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, SymInt window, int heads, Tensor? lengths)"
    " -> (Tensor, Tensor, Tensor)",
)

implement("window_attention", "window_attention", "forward")
implement("window_attention_backward", "window_attention", "backward")


@torch.library.register_fake("avadclip_fast::window_attention")
def _(q, k, v, window, heads, lengths, residual):
    return q.new_empty(q.shape, dtype=q.dtype if residual is None else torch.promote_types(q.dtype, residual.dtype))


@torch.library.register_fake("avadclip_fast::window_attention_backward")
def _(grad, q, k, v, window, heads, lengths):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, ctx.window, ctx.heads, lengths, _ = inputs
    ctx.save_for_backward(q, k, v, lengths)


def _backward(ctx, grad):
    q, k, v, lengths = ctx.saved_tensors
    dq, dk, dv = torch.ops.avadclip_fast.window_attention_backward(grad, q, k, v, ctx.window, ctx.heads, lengths)
    return dq, dk, dv, None, None, None, grad if ctx.needs_input_grad[6] else None


differentiable("window_attention", _backward, _save)
differentiable_once("window_attention", "window_attention_backward")


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    heads: int = 1,
    lengths: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention within windows of consecutive snippets (official code of arXiv 2504.04495).

        out_i = sum_j softmax_j(<q_i, k_j> / sqrt(D / heads)) v_j + residual_i   over j with i // window == j // window

    q, k, v: (B, T, D) floating point; queries, keys and values
    window: snippets per window, >= 1; if it does not divide T, the last window is shorter
    heads: must divide D
    lengths: (B,) int, to exclude keys t >= lengths[b] and zero those rows of the sum, or None
    residual: (B, T, D) or None
    Returns (B, T, D) in the inputs' dtype; under autocast, where dtypes may differ, in the widest.
    Raises ValueError on invalid shapes, dtypes, devices, lengths, `window` or `heads`.
    Precision: scores and softmax in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors(
        "window_attention",
        ("q", q, "B T D"),
        ("k", k, "B T D"),
        ("v", v, "B T D"),
        ("residual", residual, "B T D"),
        optional=("residual",),
    )
    check_counts("window_attention", window=window, heads=heads)
    if sizes["D"] % heads:
        raise ValueError(f"window_attention: heads={heads} must divide the width {sizes['D']}")
    check_lengths("window_attention", lengths, sizes["B"], sizes["T"], q.device)
    if window >= sizes["T"] > 0:
        window = sizes["T"]  # the same, but the reference pads to whole windows
    return _dispatch.run("window_attention", backend, q, k, v, window, heads, lengths, residual)
