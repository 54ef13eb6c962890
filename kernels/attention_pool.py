"""attention_pool on Triton: a logit-weighted sum over time, then L2 normalisation.

    g_b = sum_t logits_bt x_bt,   out_b = g_b / max(|g_b|, 1e-12)

Traffic: the features are read once in each direction. In the forward pass, a program handles a slice of a video's
channels; in the backward pass, a block of a video's rows, for which it writes the gradients of features and logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv, jit

TINY = tl.constexpr(1e-12)


@jit
def pool_kernel(
    x,  # [B, T, D]
    logits,  # [B, T]
    pooled,  # [B, D] float32
    lengths,  # [B], or None
    rows, width, stride_xb, stride_xt, stride_xd, stride_lb, stride_lt,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    video = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    valid = rows
    if lengths is not None:
        valid = tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, valid, ROWS):
        t = first + tl.arange(0, ROWS)
        weight = tl.load(logits + video * stride_lb + t * stride_lt, mask=t < valid, other=0.0).to(tl.float32)
        at = video * stride_xb + t.to(tl.int64)[:, None] * stride_xt + d[None, :] * stride_xd
        inside = (t < valid)[:, None] & (d < width)[None, :]
        total += weight[:, None] * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
    tl.store(pooled + video * width + d, tl.sum(total, 0), mask=d < width)


@triton.jit
def squared_norm(pooled, video, width, COLS: tl.constexpr):
    squares = tl.zeros((COLS,), tl.float32)
    for first in range(0, width, COLS):
        d = first + tl.arange(0, COLS)
        part = tl.load(pooled + video * width + d, mask=d < width, other=0.0)
        squares += part * part
    return tl.sum(squares, 0)


@triton.jit
def direction_kernel(pooled, out, width, COLS: tl.constexpr):
    """pooled [B, D] float32 -> out [B, D], one program per video."""
    video = tl.program_id(0).to(tl.int64)
    size = tl.sqrt(squared_norm(pooled, video, width, COLS))
    size = tl.where(size < TINY, TINY, size)  # unlike tl.maximum, propagates NaN
    for first in range(0, width, COLS):
        d = first + tl.arange(0, COLS)
        part = tl.load(pooled + video * width + d, mask=d < width, other=0.0)
        tl.store(out + video * width + d, (part / size).to(out.dtype.element_ty), mask=d < width)


@jit
def pool_grad_kernel(
    g,  # [B, D]
    pooled, x, logits,
    dx,  # [B, T, D]
    d_logits,  # [B, T]
    lengths, rows, width, stride_xb, stride_xt, stride_xd, stride_lb, stride_lt,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """d_pooled = (g - u <u, g>) / |pooled|, u = pooled / |pooled|;   dx = logits d_pooled, d_logits = <x, d_pooled>."""
    blocks = tl.cdiv(rows, ROWS)
    video = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    valid = rows
    if lengths is not None:
        valid = tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    # Rounded exactly: g - u <u, g> may cancel, and is then as wrong as u's length.
    size = tl.sqrt_rn(squared_norm(pooled, video, width, COLS))
    # A clamped norm has no radial term to remove.
    inverse = tl.where(size > TINY, tl.div_rn(1.0, tl.maximum(size, TINY)), 0.0)
    along = tl.zeros((COLS,), tl.float32)
    for first in range(0, width, COLS):
        d = first + tl.arange(0, COLS)
        unit = tl.load(pooled + video * width + d, mask=d < width, other=0.0) * inverse
        along += unit * tl.load(g + video * width + d, mask=d < width, other=0.0).to(tl.float32)
    turn = tl.sum(along, 0)  # <u, g>
    weight = tl.load(logits + video * stride_lb + t * stride_lt, mask=t < valid, other=0.0).to(tl.float32)
    by_logits = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, width, COLS):
        d = first + tl.arange(0, COLS)
        grad = tl.load(g + video * width + d, mask=d < width, other=0.0).to(tl.float32)
        grad -= tl.load(pooled + video * width + d, mask=d < width, other=0.0) * inverse * turn
        grad /= tl.maximum(size, TINY)  # [COLS]
        at = video * stride_xb + t.to(tl.int64)[:, None] * stride_xt + d[None, :] * stride_xd
        inside = (t < valid)[:, None] & (d < width)[None, :]
        by_logits += tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * grad[None, :]
        at_dx = (video * rows + t)[:, None] * width + d[None, :]
        by_x = tl.where((t < valid)[:, None], weight[:, None] * grad[None, :], 0.0)
        tl.store(dx + at_dx, by_x.to(dx.dtype.element_ty), mask=(t < rows)[:, None] & (d < width)[None, :])
    by_logits = tl.where(t < valid, tl.sum(by_logits, 1), 0.0)  # masked loads are not enough: 0 · NaN = NaN
    tl.store(d_logits + video * rows + t, by_logits.to(d_logits.dtype.element_ty), mask=t < rows)


def forward(x: Tensor, logits: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The op: (out, the pooled sums before normalisation)."""
    batch, rows, width = x.shape
    out, pooled = x.new_empty(batch, width), x.new_empty(batch, width, dtype=torch.float32)
    if out.numel():
        tile = (32, 64)
        pool_kernel[batch, cdiv(width, tile[1])](
            x, logits, pooled, lengths, rows, width, *x.stride(), *logits.stride(), ROWS=tile[0], COLS=tile[1]
        )
        direction_kernel[batch,](pooled, out, width, COLS=512)
    return out, pooled


def backward(g: Tensor, pooled: Tensor, x: Tensor, logits: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of features and logits."""
    batch, rows, width = x.shape
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(logits)
    dx, d_logits = x.new_empty(x.shape), logits.new_empty(logits.shape)
    tile = (8, 256)
    pool_grad_kernel[batch * cdiv(rows, tile[0]),](
        g.contiguous(), pooled, x, logits, dx, d_logits, lengths, rows, width, *x.stride(), *logits.stride(),
        ROWS=tile[0], COLS=tile[1],
    )  # fmt: skip
    return dx, d_logits
