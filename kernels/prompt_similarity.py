"""prompt_similarity on Triton: norms and cosine logits in one pass over the features.

    out_btc = <x_bt, p_bc> / (|x_bt| |p_bc| τ),   with |·| clamped to at least 1e-12

Traffic: the features are read once in each direction. In the backward pass, a program takes a slice of a video's
channels and loops over time: it writes that slice of the feature gradient and accumulates that of the prompt gradient.
The number of classes C is small.
"""

import torch
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv, jit, next_power_of_2
from .linear_act import precision

TINY = tl.constexpr(1e-12)


@jit
def cosine_kernel(
    x,  # [B, T, D]
    p,  # [B, C, D]
    out,  # [B, T, C]
    x_norm, p_norm,  # [B, T], [B, C] float32
    rows, width, classes, temperature, stride_xb, stride_xt, stride_xd, stride_pb, stride_pc, stride_pd,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, ROWS)
    video = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # [ROWS]
    c = tl.arange(0, CLASSES)  # [CLASSES]
    products = tl.zeros((ROWS, CLASSES), tl.float32)
    x_squares = tl.zeros((ROWS,), tl.float32)
    p_squares = tl.zeros((CLASSES,), tl.float32)
    for first in range(0, width, DEPTH):
        d = first + tl.arange(0, DEPTH)
        at_x = video * stride_xb + t.to(tl.int64)[:, None] * stride_xt + d[None, :] * stride_xd
        at_p = video * stride_pb + c[None, :] * stride_pc + d[:, None] * stride_pd
        rows_x = tl.load(x + at_x, mask=(t < rows)[:, None] & (d < width)[None, :], other=0.0)  # [ROWS, DEPTH]
        cols_p = tl.load(p + at_p, mask=(d < width)[:, None] & (c < classes)[None, :], other=0.0)  # [DEPTH, CLASSES]
        products = tl.dot(rows_x, cols_p.to(rows_x.dtype), products, input_precision=PRECISION)
        x_squares += tl.sum(rows_x.to(tl.float32) * rows_x.to(tl.float32), 1)
        p_squares += tl.sum(cols_p.to(tl.float32) * cols_p.to(tl.float32), 0)
    x_size, p_size = tl.sqrt(x_squares), tl.sqrt(p_squares)
    cosine = products / tl.maximum(x_size, TINY)[:, None] / tl.maximum(p_size, TINY)[None, :]
    inside = (t < rows)[:, None] & (c < classes)[None, :]
    at = (video * rows + t)[:, None] * classes + c[None, :]
    tl.store(out + at, (cosine / temperature).to(out.dtype.element_ty), mask=inside)
    tl.store(x_norm + video * rows + t, x_size, mask=t < rows)
    tl.store(p_norm + video * classes + c, p_size, mask=c < classes)  # every block of the video stores the same values


@jit
def cosine_grad_kernel(
    g, out,  # [B, T, C]
    x, p, x_norm, p_norm,
    dx,  # [B, T, D]
    dp,  # [B, C, D]
    rows, width, classes, temperature, stride_xb, stride_xt, stride_xd, stride_pb, stride_pc, stride_pd,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """With unit vectors x̂, p̂: dx = (g p̂ - x̂ <g, cos>) / (|x| τ), dp = (gᵀ x̂ - p̂ <g, cos>) / (|p| τ)."""
    video = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)  # [DEPTH]
    c = tl.arange(0, CLASSES)
    inside_p = (c < classes)[:, None] & (d < width)[None, :]
    at_p = video * stride_pb + c[:, None] * stride_pc + d[None, :] * stride_pd
    p_size = tl.load(p_norm + video * classes + c, mask=c < classes, other=1.0)
    p_inverse = 1 / tl.maximum(p_size, TINY)
    p_unit = tl.load(p + at_p, mask=inside_p, other=0.0).to(tl.float32) * p_inverse[:, None]  # [CLASSES, DEPTH]
    by_p = tl.zeros((CLASSES, DEPTH), tl.float32)
    along_p = tl.zeros((CLASSES,), tl.float32)  # sum over t of g cos
    for first in range(0, rows, ROWS):
        t = first + tl.arange(0, ROWS)
        at = (video * rows + t)[:, None] * classes + c[None, :]
        inside = (t < rows)[:, None] & (c < classes)[None, :]
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) / temperature  # [ROWS, CLASSES]
        along = grad * (tl.load(out + at, mask=inside, other=0.0).to(tl.float32) * temperature)
        inside_x = (t < rows)[:, None] & (d < width)[None, :]
        at_x = video * stride_xb + t.to(tl.int64)[:, None] * stride_xt + d[None, :] * stride_xd
        x_size = tl.load(x_norm + video * rows + t, mask=t < rows, other=1.0)
        x_inverse = 1 / tl.maximum(x_size, TINY)
        x_unit = tl.load(x + at_x, mask=inside_x, other=0.0).to(tl.float32) * x_inverse[:, None]  # [ROWS, DEPTH]
        by_p = tl.dot(tl.trans(grad), x_unit, by_p, input_precision=PRECISION)
        along_p += tl.sum(along, 0)
        turn = tl.where(x_size > TINY, tl.sum(along, 1), 0.0)  # a clamped norm has no radial term
        by_x = (tl.dot(grad, p_unit, input_precision=PRECISION) - x_unit * turn[:, None]) * x_inverse[:, None]
        at_dx = (video * rows + t)[:, None] * width + d[None, :]
        tl.store(dx + at_dx, by_x.to(dx.dtype.element_ty), mask=inside_x)
    by_p = (by_p - p_unit * tl.where(p_size > TINY, along_p, 0.0)[:, None]) * p_inverse[:, None]
    at_dp = (video * classes + c)[:, None] * width + d[None, :]
    tl.store(dp + at_dp, by_p.to(dp.dtype.element_ty), mask=inside_p)


def tile(classes: int) -> dict[str, int]:
    """Tile sizes of both passes: with more classes, larger ones spill."""
    rows, depth = (32, 64) if classes <= 32 else (16, 32)
    return {"ROWS": rows, "DEPTH": depth, "CLASSES": max(16, next_power_of_2(classes))}


def forward(x: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op: (out, norms of the features, norms of the prompts)."""
    (batch, rows, width), classes = x.shape, p.shape[1]
    out = x.new_empty(batch, rows, classes)
    x_norm, p_norm = (y.new_empty(y.shape[:2], dtype=torch.float32) for y in (x, p))
    if out.numel():
        sizes = tile(classes)
        cosine_kernel[batch * cdiv(rows, sizes["ROWS"]),](
            x, p, out, x_norm, p_norm, rows, width, classes, temperature, *x.stride(), *p.stride(),
            PRECISION=precision(x.dtype), **sizes, num_warps=4 if classes <= 32 else 8,
        )  # fmt: skip
    return out, x_norm, p_norm


def backward(
    g: Tensor, out: Tensor, x: Tensor, p: Tensor, x_norm: Tensor, p_norm: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients of features and prompts."""
    (batch, rows, width), classes = x.shape, p.shape[1]
    dx, dp = x.new_empty(x.shape) if out.numel() else x.new_zeros(x.shape), p.new_zeros(p.shape)
    if out.numel():
        sizes = tile(classes)
        # tf32 loses nothing on a half-precision result: its mantissa is as long as float16's.
        exact = precision(x.dtype) if x.dtype == torch.float32 else "tf32"
        cosine_grad_kernel[batch, cdiv(width, sizes["DEPTH"])](
            g.contiguous(), out, x, p, x_norm, p_norm, dx, dp, rows, width, classes, temperature,
            *x.stride(), *p.stride(), PRECISION=exact, **sizes, num_warps=4,
        )  # fmt: skip
    return dx, dp
