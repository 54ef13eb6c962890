"""prefix_attention: causal self-attention of sequences that share their first rows."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_counts, check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason

LONGEST, WIDTH = 32, 64  # of a prefix or sequence, and of a head: what a program holds without spilling registers


def _triton(qkv: Tensor, prefix: int, rows: int, heads: int) -> Tensor:
    return torch.ops.avadclip_fast.prefix_attention(qkv, prefix, rows, heads)[0]


def _triton_supports(qkv: Tensor, prefix: int, rows: int, heads: int) -> str | None:
    if max(prefix, rows) > LONGEST:
        return f"it takes a prefix and sequences of up to {LONGEST} rows, not {max(prefix, rows)}"
    if qkv.shape[1] > 3 * WIDTH * heads:
        return f"it takes heads of up to {WIDTH} channels, not {qkv.shape[1] // 3 // heads}"
    return triton_reason(qkv)


_dispatch.register("prefix_attention", "reference", without_autocast(reference.prefix_attention))
_dispatch.register("prefix_attention", "triton", _triton, _triton_supports)

# lse: log of each softmax's denominator, float32 (heads, N).
torch.library.define(
    "avadclip_fast::prefix_attention", "(Tensor qkv, int prefix, int rows, int heads) -> (Tensor out, Tensor lse)"
)
torch.library.define(
    "avadclip_fast::prefix_attention_backward",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int prefix, int rows, int heads) -> Tensor",
)

implement("prefix_attention", "prefix_attention", "forward")
implement("prefix_attention_backward", "prefix_attention", "backward")


@torch.library.register_fake("avadclip_fast::prefix_attention")
def _(qkv, prefix, rows, heads):
    count, width = qkv.shape[0], qkv.shape[1] // 3
    return qkv.new_empty(count, width), qkv.new_empty(heads, count, dtype=torch.float32)


@torch.library.register_fake("avadclip_fast::prefix_attention_backward")
def _(grad, qkv, out, lse, prefix, rows, heads):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, *ctx.sizes = inputs
    ctx.save_for_backward(qkv, *output)


def _backward(ctx, grad):
    dqkv = torch.ops.avadclip_fast.prefix_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    return dqkv, None, None, None


differentiable("prefix_attention", _backward, _save, one_result=True)
differentiable_once("prefix_attention", "prefix_attention_backward")


def prefix_attention(qkv: Tensor, prefix: int, rows: int, heads: int = 1, backend: str | None = None) -> Tensor:
    """Causal self-attention of C sequences that share their first P rows, of which only one copy is kept.

        out_i = sum_j softmax_j(<q_i, k_j> / sqrt(W / heads)) v_j    over j <= i in the prefix or in i's own sequence

    qkv: (N, 3W) floating point, queries, keys and values side by side; N = P + C·S: the prefix, then the sequences
    prefix: P >= 1, the rows that all sequences share
    rows: S >= 1, the rows of each sequence after the prefix
    heads: must divide W
    Returns (N, W) in qkv's dtype; N = 0 gives no rows.
    Raises ValueError on an invalid shape, dtype, `prefix`, `rows` or `heads`.
    Precision: scores and softmax in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    width = check_tensors("prefix_attention", ("qkv", qkv, "N 3W"))["W"]
    check_counts("prefix_attention", prefix=prefix, rows=rows, heads=heads)
    count = qkv.shape[0]
    if count and (count < prefix or (count - prefix) % rows):
        expected = f"[{prefix} + C·{rows}, 3W]"
        raise ValueError(f"prefix_attention: qkv must have shape {expected}, got {list(qkv.shape)}")
    if width % heads or width == 0:
        raise ValueError(f"prefix_attention: heads={heads} must divide the width {width}, which must be above zero")
    return _dispatch.run("prefix_attention", backend, qkv, prefix, rows, heads)
