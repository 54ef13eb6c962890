"""The binary head on Triton: out = <QuickGELU(x Wᵀ + b), dot> + <x, direct>, from a plain product and one pass.

In the backward pass, the gradient of `out` is one more column beside those of the pre-activation, and `direct` one more
row of the weight: so the products that give the gradients of x and W also give what <x, direct> adds.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..streams import FIRST, aside
from ._sizes import cdiv, jit
from .linear_act import activate, activation_grad

EXTRA = 16  # columns beside those of the pre-activation, of which one is used: rows stay aligned, as Triton knows by 16


@triton.jit
def dot_rows(x, factors, row, inside, width, ROWS: tl.constexpr, COLS: tl.constexpr, ACTIVATION: tl.constexpr):
    """[ROWS]: <act(x[row]), factors> of a contiguous x [M, width]."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, width, COLS):
        d = first + tl.arange(0, COLS)
        at = row.to(tl.int64)[:, None] * width + d[None, :]
        value = tl.load(x + at, mask=inside[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        factor = tl.load(factors + d, mask=d < width, other=0.0).to(tl.float32)
        total += activate(value, ACTIVATION) * factor[None, :]
    return tl.sum(total, 1)


@jit
def head_kernel(
    y,  # [M, N] pre-activation
    x,  # [M, D]
    dot, direct,  # [N], [D]
    out,  # [M]
    count, outputs, width,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = dot_rows(y, dot, row, row < count, outputs, ROWS, COLS, "quick_gelu")
    total += dot_rows(x, direct, row, row < count, width, ROWS, COLS, "none")
    tl.store(out + row, total.to(out.dtype.element_ty), mask=row < count)


def forward(x: Tensor, weight: Tensor, bias: Tensor, dot: Tensor, direct: Tensor) -> tuple[Tensor, Tensor]:
    """The op: x [..., D], weight [N, D] -> (out [...], y [M, N] the pre-activation)."""
    outputs, width = weight.shape
    rows = x.reshape(-1, width).contiguous()
    y, out = F.linear(rows, weight, bias), x.new_empty(x.shape[:-1])
    if count := rows.shape[0]:
        tile = (4, 512)
        head_kernel[cdiv(count, tile[0]),](
            y, rows, dot, direct, out, count, outputs, width, ROWS=tile[0], COLS=tile[1], num_warps=4
        )
    return out, y


def backward(
    g: Tensor, x: Tensor, weight: Tensor, dot: Tensor, direct: Tensor, y: Tensor, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, dot and direct; empty where `needs` is False."""
    outputs, width = weight.shape
    rows = x.reshape(-1, width)
    if not rows.shape[0]:
        like = (x, weight, weight[:, 0], dot, direct)
        return tuple(t.new_zeros(t.shape if need else 0) for t, need in zip(like, needs, strict=True))
    g = g.reshape(-1).contiguous()
    wide = y.new_empty(rows.shape[0], outputs + EXTRA)
    wide[:, outputs:] = F.pad(g[:, None], (0, EXTRA - 1))
    _, by_bias, by_dot = activation_grad(g, y, "quick_gelu", dot, None, 1.0, weight, needs[2], out=wide[:, :outputs])
    nothing = weight.new_empty(0)
    both = aside("weights", lambda: wide.T @ rows if needs[1] or needs[4] else nothing, FIRST)
    by_x = nothing
    if needs[0]:
        tall = torch.cat([weight, direct[None], weight.new_zeros(EXTRA - 1, width)])
        by_x = (wide @ tall).view(x.shape)
    by_both = both()  # [N + EXTRA, D]
    return (
        by_x,
        by_both[:outputs] if needs[1] else nothing,
        nothing if by_bias is None else by_bias,
        by_dot if needs[3] else nothing,
        by_both[outputs].clone() if needs[4] else nothing,  # results share no memory
    )
