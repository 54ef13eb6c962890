"""add_act on Triton: a sum and its activation in one pass, and their gradient in another.

    out = act(x + r),   d = g act'(x + r), the gradient of both

Traffic: two tensors are read and one is written. The backward pass reads g, and the result for ReLU, which has the sign
of the sum, or else both summands, as to write the sum in the forward pass would cost as much.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv, jit, next_power_of_2
from .linear_act import activate, activate_grad


@triton.jit
def load(x, video, t, d, inside, stride_b, stride_t, stride_d):
    """x[video, t, d] as float32 [ROWS, COLS]."""
    at = (video * stride_b + t * stride_t)[:, None] + d[None, :] * stride_d
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@jit
def add_act_kernel(
    x, r,  # [B, T, D], r None for the activation alone
    out,  # [B·T, D]
    count, rows, width, stride_xb, stride_xt, stride_xd, stride_rb, stride_rt, stride_rd,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    video, t = (row // rows).to(tl.int64), (row % rows).to(tl.int64)
    inside = (row < count)[:, None] & (d < width)[None, :]  # [ROWS, COLS]
    y = load(x, video, t, d, inside, stride_xb, stride_xt, stride_xd)
    if r is not None:
        y += load(r, video, t, d, inside, stride_rb, stride_rt, stride_rd)
    at = row.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(out + at, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@jit
def add_act_grad_kernel(
    g,  # [B, T, D] gradient of out
    x,  # [B, T, D] a summand, or out where r is None
    r,  # [B, T, D], or None
    dy,  # [B·T, D]
    count, rows, width, stride_gb, stride_gt, stride_gd, stride_xb, stride_xt, stride_xd,
    stride_rb, stride_rt, stride_rd,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    video, t = (row // rows).to(tl.int64), (row % rows).to(tl.int64)
    inside = (row < count)[:, None] & (d < width)[None, :]  # [ROWS, COLS]
    y = load(x, video, t, d, inside, stride_xb, stride_xt, stride_xd)
    if r is not None:
        y += load(r, video, t, d, inside, stride_rb, stride_rt, stride_rd)
    grad = load(g, video, t, d, inside, stride_gb, stride_gt, stride_gd) * activate_grad(y, ACTIVATION)
    tl.store(dy + row.to(tl.int64)[:, None] * width + d[None, :], grad.to(dy.dtype.element_ty), mask=inside)


def tile(count: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, and a tile's sides: 2048 elements, of which a thread has 16, two loads of 16 bytes in bf16."""
    cols = min(next_power_of_2(width), 256)
    side = 2048 // cols
    return (cdiv(count, side), cdiv(width, cols)), {"ROWS": side, "COLS": cols}


def forward(x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """The op: x, residual [B, T, D] -> [B, T, D]. Without residual, the activation of x."""
    _, rows, width = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel():
        count = x.shape[0] * rows
        grid, sides = tile(count, width)
        strides = (0, 0, 0) if residual is None else residual.stride()
        add_act_kernel[grid](
            x, residual, out, count, rows, width, *x.stride(), *strides,
            ACTIVATION=activation, **sides, num_warps=4,
        )  # fmt: skip
    return out


def backward(g: Tensor, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """The gradient of x + residual; without residual, x is the result of ReLU."""
    _, rows, width = x.shape
    dy = g.new_empty(g.shape)
    if g.numel():
        count = x.shape[0] * rows
        grid, sides = tile(count, width)
        strides = (0, 0, 0) if residual is None else residual.stride()
        add_act_grad_kernel[grid](
            g, x, residual, dy, count, rows, width, *g.stride(), *x.stride(), *strides,
            ACTIVATION=activation, **sides, num_warps=4,
        )  # fmt: skip
    return dy
