"""similarity_graph on Triton: graph weights computed one tile of cosines at a time, and products with them.

    s_ij = <x_i, x_j> / (|x_i| |x_j| + 1e-20),   w_ij = s_ij > threshold ? exp(s_ij) : 1,   A_ij = w_ij / sum_j w_ij

Cosines lie in [-1, 1], so the softmax needs no running maximum. A program has all w of its rows in registers if the
video fits one tile; else it loops over tiles, stores w, and divides by the row sum at the end. The backward pass
recovers the graph from A and the row sums: an edge is an entry with w > 1, its cosine is log w, and w is symmetric.
Traffic: the features are read twice (then from L2), A is written once and read a few times. The only other T x T tensor
is dA.

    dA -> r_i = sum_j A_ij dA_ij
    m_ij = w_ij ((dA_ij - r_i) / sum_j w_ij + (dA_ji - r_j) / sum_i w_ij) on edges between two rows, else 0
    dx_i = (sum_j m_ij x_j / |x_j|  -  x_i / |x_i| sum_j m_ij s_ij) / |x_i|
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import linear_act
from ._sizes import cdiv, jit, next_power_of_2
from .linear_act import precision

EPS = tl.constexpr(1e-20)


@triton.jit
def place(lengths, rows, ROWS: tl.constexpr):
    """The program's video, its first row, the video's length, and where its columns end.

    That is at the length, or at 0 for rows that are all padding: they have nothing to compute.
    """
    blocks = tl.cdiv(rows, ROWS)
    video, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS
    valid = tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    return video, first, valid, tl.where(first < valid, valid, 0)


@triton.jit
def tile(matrix, row, column, stride_row, stride_column, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers [ROWS, COLS] to matrix[row.., column..]: 64-bit to the corner, then 32-bit, which saves registers."""
    corner = tl.cast(row, tl.int64) * stride_row + tl.cast(column, tl.int64) * stride_column
    return matrix + corner + (tl.arange(0, ROWS)[:, None] * stride_row + tl.arange(0, COLS)[None, :] * stride_column)


@jit
def norms_kernel(
    x,  # [B, T, D]
    norms,  # [B, T] float32: |x_i|, and 0 beyond the length
    lengths,
    rows, width, count, stride_b, stride_t, stride_d,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (m < count) & (m % rows < tl.load(lengths + m // rows, mask=m < count, other=0))
    at = (m // rows).to(tl.int64) * stride_b + (m % rows).to(tl.int64) * stride_t
    there = x + at[:, None] + d.to(tl.int64)[None, :] * stride_d
    value = tl.load(there, mask=inside[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)  # [ROWS, COLS]
    tl.store(norms + m, tl.sqrt(tl.sum(value * value, 1)), mask=m < count)


@triton.jit
def exponentials(
    x, size_i, norms, i, j, valid, end, width, threshold, stride_t, stride_d,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """w [ROWS, COLS] float32 of the rows from i and the columns from j on of a video; 0 beyond its length."""
    rows, columns = i + tl.arange(0, ROWS), j + tl.arange(0, COLS)
    size_j = tl.load(norms + columns, mask=columns < valid, other=0.0)
    products = tl.zeros((ROWS, COLS), tl.float32)
    for channel in range(0, tl.where(j < end, width, 0), DEPTH):
        there = (channel + tl.arange(0, DEPTH) < width)[None, :]
        x_i = tl.load(
            tile(x, i, channel, stride_t, stride_d, ROWS, DEPTH), mask=(rows < valid)[:, None] & there, other=0.0
        )
        x_j = tl.load(
            tile(x, j, channel, stride_t, stride_d, COLS, DEPTH), mask=(columns < valid)[:, None] & there, other=0.0
        )
        products = tl.dot(x_i, x_j.T, products, input_precision=PRECISION)
    cosines = products / (size_i[:, None] * size_j[None, :] + EPS)
    w = tl.exp(tl.where(cosines <= threshold, 0.0, cosines))  # propagates NaN
    return tl.where((rows < valid)[:, None] & (columns < valid)[None, :], w, 0.0)


@triton.jit
def weights_kernel(
    x,  # [B, T, D]
    norms,  # [B, T] float32
    weights,  # [B, T, T] float32
    sums,  # [B, T] float32: sum_j w_ij
    lengths,  # [B]
    rows, width, threshold, stride_b, stride_t, stride_d,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: one tile of COLS columns holds all of the video's."""
    video, i, valid, end = place(lengths, rows, ROWS)
    x, weights = x + video * stride_b, weights + video * rows * rows
    norms, sums = norms + video * rows, sums + video * rows
    own, columns = i + tl.arange(0, ROWS), tl.arange(0, COLS)
    size_i = tl.load(norms + own, mask=own < valid, other=0.0)
    if WHOLE:
        w = exponentials(
            x, size_i, norms, i, 0, valid, end, width, threshold, stride_t, stride_d, PRECISION, ROWS, COLS, DEPTH
        )
        total = tl.sum(w, 1)
        w = w * (1 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(tile(weights, i, 0, rows, 1, ROWS, COLS), w, mask=(own < rows)[:, None] & (columns < rows)[None, :])
    else:
        total = tl.zeros((ROWS,), tl.float32)
        for j in range(0, end, COLS):
            w = exponentials(
                x, size_i, norms, i, j, valid, end, width, threshold, stride_t, stride_d, PRECISION, ROWS, COLS, DEPTH
            )
            total += tl.sum(w, 1)
            inside = (own < rows)[:, None] & (j + columns < rows)[None, :]
            tl.store(tile(weights, i, j, rows, 1, ROWS, COLS), w, mask=inside)
        tl.debug_barrier()  # the loop below reads weights stored by other threads of the program
        inverse = (1 / tl.where(total == 0.0, 1.0, total))[:, None]
        for j in range(0, rows, COLS):
            at, column = tile(weights, i, j, rows, 1, ROWS, COLS), (j + columns)[None, :]
            w = tl.load(at, mask=(own < rows)[:, None] & (column < end), other=0.0)
            tl.store(at, w * inverse, mask=(own < rows)[:, None] & (column < rows))
    tl.store(sums + own, total, mask=own < rows)


@triton.jit
def along_kernel(
    g,  # [B, T, T]: dA
    weights, lengths,
    along,  # [B, T] float32: sum_j A_ij dA_ij
    rows,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    video, i, valid, end = place(lengths, rows, ROWS)
    g, weights, along = g + video * rows * rows, weights + video * rows * rows, along + video * rows
    own = i + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for j in range(0, end, COLS):
        columns = j + tl.arange(0, COLS)
        # A mask that ends at the tensor lets whole vectors be loaded; what is beyond the length is dropped below.
        there = (own < rows)[:, None] & (columns < rows)[None, :]
        a = tl.load(tile(weights, i, j, rows, 1, ROWS, COLS), mask=there, other=0.0)
        grad = tl.load(tile(g, i, j, rows, 1, ROWS, COLS), mask=there, other=0.0)
        total += tl.sum(tl.where((own < valid)[:, None] & (columns < valid)[None, :], a * grad, 0.0), 1)
    tl.store(along + own, total, mask=own < rows)


@triton.jit
def to_tf32(x):
    """float32 rounded to tf32's 11 bits, to which Hopper's products truncate: those errors have one sign and add up."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # the sum could turn a NaN into a number


@triton.jit
def features_grad_kernel(
    g,  # [B, T, T]: dA
    weights, sums, along, norms, x, lengths,
    dx,  # [B, T, D]
    rows, width, threshold, stride_b, stride_t, stride_d,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Each program computes a block of rows and a slice of channels, all of them if WHOLE.

    m_ij / |x_j| is rounded before it is both multiplied by x_j and projected on s_ij: rows alike have sums that nearly
    cancel, and a rounding in one of them alone would be large against what is left.
    """
    video, i, valid, end = place(lengths, rows, ROWS)
    g, weights = g + video * rows * rows, weights + video * rows * rows
    sums, along, norms, x = sums + video * rows, along + video * rows, norms + video * rows, x + video * stride_b
    first = tl.program_id(1) * DEPTH
    own, d = i + tl.arange(0, ROWS), first + tl.arange(0, DEPTH)
    size_i = tl.load(norms + own, mask=own < valid, other=0.0)
    inverse_i = 1 / tl.where(size_i == 0.0, 1.0, size_i)  # a zero row has no edges
    total_i = tl.load(sums + own, mask=own < valid, other=1.0)
    along_i = tl.load(along + own, mask=own < valid, other=0.0)
    least = 0.5 + 0.5 * tl.exp(threshold)  # halfway between a non-edge's weight, 1, and that of the weakest edge
    pull = tl.zeros((ROWS, DEPTH), tl.float32)  # sum_j m_ij x_j / |x_j|
    slope = tl.zeros((ROWS,), tl.float32)  # sum_j m_ij s_ij
    for j in range(0, end, COLS):
        columns = j + tl.arange(0, COLS)
        size_j = tl.load(norms + columns, mask=columns < valid, other=0.0)
        total_j = tl.load(sums + columns, mask=columns < valid, other=1.0)
        along_j = tl.load(along + columns, mask=columns < valid, other=0.0)
        there = (own < rows)[:, None] & (columns < rows)[None, :]
        # Loaded first: Triton lays m out as the last tile is, and along its rows only this one meets bank conflicts.
        back = tl.load(tile(g, i, j, 1, rows, ROWS, COLS), mask=there, other=0.0)  # dA_ji
        w = tl.load(tile(weights, i, j, rows, 1, ROWS, COLS), mask=there, other=0.0) * total_i[:, None]
        forth = tl.load(tile(g, i, j, rows, 1, ROWS, COLS), mask=there, other=0.0)
        m = (forth - along_i[:, None]) * (1 / total_i)[:, None] + (back - along_j[None, :]) * (1 / total_j)[None, :]
        # A row's cosine with itself is 1 whatever the row is: it has no gradient, and here is none that cancels.
        edge = (w > least) & (own[:, None] != columns[None, :]) & (own < valid)[:, None] & (columns < valid)[None, :]
        m = tl.where(edge, m * w * (1 / tl.where(size_j == 0.0, 1.0, size_j))[None, :], 0.0)
        x_j = tl.load(
            tile(x, j, first, stride_t, stride_d, COLS, DEPTH),
            mask=(columns < valid)[:, None] & (d < width)[None, :],
            other=0.0,
        )
        if x.dtype.element_ty == tl.bfloat16:
            factor = m.to(tl.bfloat16)
            m = factor.to(tl.float32)
        else:
            m = to_tf32(m) if PRECISION == "tf32" else m
            factor, x_j = m, x_j.to(tl.float32)
        if not WHOLE:
            slope += tl.sum(m * size_j[None, :] * tl.log(tl.where(edge, w, 1.0)), 1)
        pull = tl.dot(factor, x_j, pull, input_precision=PRECISION)
    at_i, there = tile(x, i, first, stride_t, stride_d, ROWS, DEPTH), (own < valid)[:, None] & (d < width)[None, :]
    if WHOLE:
        slope = tl.sum(pull * tl.load(at_i, mask=there, other=0.0), 1) * inverse_i  # s_ij = <x_i, x_j> / (|x_i| |x_j|)
        tl.debug_barrier()  # x_i is read again: keeping it takes more registers than there are
    x_i = tl.load(at_i, mask=there, other=0.0)
    grad = (pull - x_i * (inverse_i * slope)[:, None]) * inverse_i[:, None]
    grad = tl.where((own < valid)[:, None], grad, 0.0)  # masked loads are not enough: 0 · NaN = NaN
    at = tile(dx + video * rows * width, i, first, width, 1, ROWS, DEPTH)
    tl.store(at, grad.to(dx.dtype.element_ty), mask=(own < rows)[:, None] & (d < width)[None, :])


@triton.jit
def product_kernel(
    a,  # [B, M, K]
    b,  # [B, K, N]
    out,  # [B, M, N]
    lengths,
    rows, inner, columns,
    stride_ab, stride_am, stride_ak, stride_bb, stride_bk, stride_bn,
    INNER_VALID: tl.constexpr, COLUMNS_VALID: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = a · b for each video, zero beyond its length.

    Rows always end at the video's length, the reduction does with INNER_VALID, and columns do with COLUMNS_VALID.
    a is cast to b's dtype, as the reference casts the weights to the dtype of the values.
    """
    video, m, valid, end = place(lengths, rows, ROWS)
    n = tl.program_id(1) * COLS
    own, across = m + tl.arange(0, ROWS), n + tl.arange(0, COLS)
    depth = end if INNER_VALID else tl.where(end == 0, 0, inner)
    breadth = valid if COLUMNS_VALID else columns
    a, b = a + video * stride_ab, b + video * stride_bb
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, depth, DEPTH):
        within = k + tl.arange(0, DEPTH)
        # Rows of padding are zeroed below and columns of it meet zeros, so the mask may end at the tensor, which lets
        # whole vectors be loaded.
        left = tl.load(
            tile(a, m, k, stride_am, stride_ak, ROWS, DEPTH),
            mask=(own < rows)[:, None] & (within < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            tile(b, k, n, stride_bk, stride_bn, DEPTH, COLS),
            mask=(within < depth)[:, None] & (across < breadth)[None, :],
            other=0.0,
        )
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION)
    acc = tl.where((own < valid)[:, None], acc, 0.0)  # masked loads are not enough: 0 · NaN = NaN
    at = tile(out + video * rows * columns, m, n, columns, 1, ROWS, COLS)
    tl.store(at, acc.to(out.dtype.element_ty), mask=(own < rows)[:, None] & (across < columns)[None, :])


def forward(x: Tensor, lengths: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of the op: float32 weights (B, T, T), norms (B, T) and row sums (B, T)."""
    batch, rows, width = x.shape
    weights = x.new_empty(batch, rows, rows, dtype=torch.float32)
    norms, sums = (x.new_empty(batch, rows, dtype=torch.float32) for _ in range(2))
    if weights.numel():
        # Before the weights: were a tile of features both multiplied and squared, Triton would keep it in one buffer,
        # which the next copy may overwrite while sm_90's asynchronous products still read it (bench/aot_triton.py
        # looks). It also brings the features into the L2 cache.
        cols = next_power_of_2(max(1, width))
        side = max(1, 4096 // cols)
        norms_kernel[cdiv(batch * rows, side),](
            x, norms, lengths, rows, width, batch * rows, *x.stride(), ROWS=side, COLS=cols
        )
        exact = precision(x.dtype)
        if x.dtype == torch.float32 and exact == "ieee":  # such dots run on operands in registers
            side, cols, depth, warps, stages = 32, 32, 32, 4, 2
        else:  # up to 256 rows in one tile, two programs a multiprocessor; in a loop, so wide a tile's registers spill
            side, depth, warps, stages = 64, 64 // x.element_size(), 8, 4
            cols = max(64, next_power_of_2(rows)) if rows <= 256 else 128
        depth = min(depth, max(16, next_power_of_2(width)))
        weights_kernel[batch * cdiv(rows, side),](
            x, norms, weights, sums, lengths, rows, width, threshold, *x.stride(),
            PRECISION=exact, ROWS=side, COLS=cols, DEPTH=depth, WHOLE=rows <= cols, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return weights, norms, sums


def backward(
    g: Tensor, x: Tensor, lengths: Tensor, weights: Tensor, norms: Tensor, sums: Tensor, threshold: float
) -> Tensor:
    """Gradient of the features, given that of the weights."""
    batch, rows, width = x.shape
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx
    g, along = g.contiguous(), torch.empty_like(sums)
    side, cols = 16, min(256, next_power_of_2(rows))
    along_kernel[batch * cdiv(rows, side),](g, weights, lengths, along, rows, ROWS=side, COLS=cols, num_warps=4)
    exact = "tf32" if x.dtype == torch.float16 else precision(x.dtype)  # tf32 has float16's mantissa and m's range
    if x.dtype == torch.bfloat16:  # as many channels as registers hold: every slice makes m anew
        deepest = 512 if linear_act._chip(x.device)[0] == "sm_90" else 256
        side, depth = 64, min(deepest, max(64, next_power_of_2(width)))
    else:
        side, depth = 32, 64 if exact == "ieee" else 128
    features_grad_kernel[batch * cdiv(rows, side), cdiv(width, depth)](
        g, weights, sums, along, norms, x, lengths, dx, rows, width, threshold, *x.stride(),
        PRECISION=exact, ROWS=side, COLS=32, DEPTH=depth, WHOLE=width <= depth, num_warps=8, num_stages=3,
    )  # fmt: skip
    return dx


def mix(weights: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The second half of the op: weights · values, (B, T, E)."""
    return _product(weights, values, lengths, values.shape[2], values.dtype, inner_valid=True)


def mix_backward(g: Tensor, weights: Tensor, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weights (float32) and values."""
    by_weights = _product(g, values.mT, lengths, values.shape[1], torch.float32, columns_valid=True)
    return by_weights, _product(weights.mT, g, lengths, values.shape[2], values.dtype, inner_valid=True)


def _product(a, b, lengths, columns, dtype, inner_valid=False, columns_valid=False) -> Tensor:
    batch, rows, inner = a.shape
    out = b.new_empty(batch, rows, columns, dtype=dtype)
    if out.numel():
        cols = 32 if b.dtype == torch.float32 else min(256, max(64, next_power_of_2(columns)))
        product_kernel[batch * cdiv(rows, 64), cdiv(columns, cols)](
            a, b, out, lengths, rows, inner, columns, *a.stride(), *b.stride(),
            INNER_VALID=inner_valid, COLUMNS_VALID=columns_valid,
            PRECISION=precision(b.dtype), ROWS=64, COLS=cols, DEPTH=32, num_warps=8, num_stages=4,
        )  # fmt: skip
    return out
