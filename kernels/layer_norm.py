"""LayerNorm on Triton, over rows [M, I]: out = (x - mean) / std · weight + bias, statistics in float32.

It precedes products of linear_act and the keys of window_attention, and writes rows in their dtype.
"""

import torch
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv, jit, next_power_of_2
from .column_sums import column_sums

EPS = tl.constexpr(1e-5)


@jit
def norm_kernel(
    x,  # [M, I]
    weight, bias,  # [I]
    out,  # [M, I], contiguous
    mean, rstd,  # [M] float32
    count, width, stride_m, stride_d,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COLS covers the full width."""
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (m < count)[:, None] & (d < width)[None, :]
    at = m.to(tl.int64)[:, None] * stride_m + d[None, :] * stride_d
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(value, 1) / width  # [ROWS]
    centred = tl.where(inside, value - mu[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + EPS)
    tl.store(mean + m, mu, mask=m < count)
    tl.store(rstd + m, scale, mask=m < count)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    result = centred * scale[:, None] * w + b
    tl.store(out + m.to(tl.int64)[:, None] * width + d[None, :], result.to(out.dtype.element_ty), mask=inside)


@jit
def norm_grad_kernel(
    g,  # [M, I], contiguous
    x,  # [M, I]
    weight,  # [I]
    mean, rstd,  # [M] float32
    plus,  # [M, I], contiguous, which is added to dx, or None
    dx,  # [M, I], contiguous, or None
    sums,  # [programs, 2, I] float32: those of g·x̂ and of g over the program's rows, or None
    count, width, stride_m, stride_d,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g·weight - mean(g·weight) - x̂ mean(g·weight·x̂)), x̂ = (x - mean) rstd."""
    d = tl.arange(0, COLS)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
    by_weight, by_bias = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        m = block * ROWS + tl.arange(0, ROWS)
        inside = (m < count)[:, None] & (d < width)[None, :]
        at = m.to(tl.int64)[:, None]
        grad = tl.load(g + at * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at * stride_m + d[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(mean + m, mask=m < count, other=0.0)[:, None]
        scale = tl.load(rstd + m, mask=m < count, other=0.0)[:, None]
        normed = tl.where(inside, (value - mu) * scale, 0.0)
        if sums is not None:
            by_weight += grad * normed
            by_bias += grad
        if dx is not None:
            grad = grad * w
            along = tl.sum(grad * normed, 1)[:, None] / width
            result = scale * (grad - tl.sum(grad, 1)[:, None] / width - normed * along)
            if plus is not None:
                result += tl.load(plus + at * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + at * width + d[None, :], result.to(dx.dtype.element_ty), mask=inside)
    if sums is not None:
        at = sums + tl.program_id(0) * 2 * width + d
        tl.store(at, tl.sum(by_weight, 0), mask=d < width)
        tl.store(at + width, tl.sum(by_bias, 0), mask=d < width)


def forward(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., I] -> (out in `dtype`, stats: float32 [2, M] of mean and 1/std)."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    count = rows.shape[0]
    out, stats = x.new_empty(x.shape, dtype=dtype), x.new_empty(2, count, dtype=torch.float32)
    if x.numel():
        cols = next_power_of_2(width)
        side = max(1, 4096 // cols)
        norm_kernel[cdiv(count, side),](
            rows, weight, bias, out, stats[0], stats[1], count, width, *rows.stride(), ROWS=side, COLS=cols
        )
    return out, stats


def backward(
    g: Tensor, x: Tensor, weight: Tensor, stats: Tensor, needs: list[bool], plus: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those of x, or of the other two, are empty where `needs` is False.

    plus: [..., I] or None, a gradient that x has besides, and that is added to this one
    """
    nothing = weight.new_empty(0)
    if not any(needs):
        return nothing, nothing, nothing
    if x.numel() == 0:
        return tuple(
            torch.zeros_like(t) if need else nothing for t, need in zip((x, weight, weight), needs, strict=True)
        )
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    count = rows.shape[0]
    summed = needs[1] or needs[2]
    dx = torch.empty_like(rows, memory_format=torch.contiguous_format) if needs[0] else None
    cols = next_power_of_2(width)
    side = max(1, 1024 // cols)
    blocks = cdiv(count, side)
    programs = min(1024, blocks) if summed else blocks
    sums = x.new_empty(programs, 2, width, dtype=torch.float32) if summed else None
    norm_grad_kernel[programs,](
        g.reshape(-1, width).contiguous(), rows, weight, stats[0], stats[1],
        None if plus is None else plus.reshape(-1, width).contiguous(), dx, sums,
        count, width, *rows.stride(), ROWS=side, COLS=cols, num_warps=2,
    )  # fmt: skip
    totals = column_sums(sums.flatten(1), weight.dtype).view(2, width) if summed else None
    return (
        nothing if dx is None else dx.view(x.shape),
        *(totals[i].clone() if needs[1 + i] else nothing for i in range(2)),  # outputs share no memory
    )
