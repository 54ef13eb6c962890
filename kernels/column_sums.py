"""Sums over the rows of a matrix on Triton: the gradient of a bias, and what ends other sums in a fixed order.

    out_n = sum_m x_mn, in float32

Torch sums a few hundred rows with a single warp for 128 columns. Here blocks of rows are summed first, then their sums.
"""

import torch
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv, jit, next_power_of_2

GROUP = 64  # rows of a block, at least: few, so that enough blocks are under way to keep memory busy
ALONE = 1024  # rows that a single pass sums


@jit
def column_sums_kernel(
    x,  # [M, N]
    out,  # [groups, N]
    count, width, group, stride_m, stride_n,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[i] = the sum of the rows of group i, `group` of them."""
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = tl.program_id(0).to(tl.int64) * group
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, group, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = ((row < group) & (first + row < count))[:, None] & (n < width)[None, :]
        at = (first + row)[:, None] * stride_m + n[None, :] * stride_n
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
    at = tl.program_id(0).to(tl.int64) * width + n
    tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=n < width)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, N] of any strides -> [N] in that dtype, rounded once."""
    count, width = x.shape
    if not x.numel():
        return x.new_zeros(width, dtype=dtype)
    if count > ALONE:
        group = max(GROUP, next_power_of_2(count // ALONE))
        groups = cdiv(count, group)
        sums = x.new_empty(groups, width, dtype=torch.float32)
        column_sums_kernel[groups, cdiv(width, 128)](x, sums, count, width, group, *x.stride(), ROWS=32, COLS=128)
        x, count = sums, groups
    out = x.new_empty(width, dtype=dtype)
    column_sums_kernel[1, cdiv(width, 32)](x, out, count, width, count, *x.stride(), ROWS=128, COLS=32)
    return out
