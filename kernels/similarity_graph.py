"""similarity_graph on Triton: graph weights computed one tile of cosines at a time, and products with them.

    s_ij = <x_i, x_j> / (|x_i| |x_j| + 1e-20),   w_ij = s_ij > threshold ? exp(s_ij) : 1,   A_ij = w_ij / sum_j w_ij

Cosines lie in [-1, 1], so the softmax needs no running maximum: a program loops over a row of tiles, stores w, and
divides by the row sum at the end. The backward pass recovers the graph from A and the row sums: an edge is an entry
with w > 1, and its cosine is log w. Traffic: the features are read twice (then from L2), A is written once and read a
few times. The only other T x T tensors are gradients.

    dA -> dw_ij = (dA_ij - sum_j A_ij dA_ij) / sum_j w_ij,   ds_ij = w_ij dw_ij on edges, else 0
    m = ds + dsᵀ,   dx_i = (sum_j m_ij x_j / |x_j|  -  x_i / |x_i| sum_j m_ij s_ij) / |x_i|
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_act import precision

EPS = tl.constexpr(1e-20)


@triton.jit
def place(lengths, rows, ROWS: tl.constexpr):
    """The program's video, its block of rows [ROWS], the video's length, and where its columns end.

    That is at the length, or at 0 for rows that are all padding: they have nothing to compute.
    """
    blocks = tl.cdiv(rows, ROWS)
    video, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS
    valid = tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    return video, first + tl.arange(0, ROWS), valid, tl.where(first < valid, valid, 0)


@triton.jit
def weights_kernel(
    x,  # [B, T, D]
    norms,  # [B, T] float32: |x_i|
    weights,  # [B, T, T] float32
    sums,  # [B, T] float32: sum_j w_ij
    lengths,  # [B]
    rows, width, threshold, stride_b, stride_t, stride_d,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    video, i, valid, end = place(lengths, rows, ROWS)
    own = video * stride_b + i.to(tl.int64)[:, None] * stride_t
    size_i = tl.load(norms + video * rows + i, mask=i < valid, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, end, ROWS):
        j = first + tl.arange(0, ROWS)
        other = video * stride_b + j.to(tl.int64)[:, None] * stride_t
        size_j = tl.load(norms + video * rows + j, mask=j < valid, other=0.0)
        products = tl.zeros((ROWS, ROWS), tl.float32)
        for channel in range(0, width, DEPTH):
            d = channel + tl.arange(0, DEPTH)
            x_i = tl.load(x + own + d[None, :] * stride_d, mask=(i < valid)[:, None] & (d < width)[None, :], other=0.0)
            x_j = tl.load(
                x + other + d[None, :] * stride_d, mask=(j < valid)[:, None] & (d < width)[None, :], other=0.0
            )
            products = tl.dot(x_i, tl.trans(x_j), products, input_precision=PRECISION)
        cosines = products / (size_i[:, None] * size_j[None, :] + EPS)
        w = tl.exp(tl.where(cosines <= threshold, 0.0, cosines))  # propagates NaN
        inside = (i < valid)[:, None] & (j < valid)[None, :]
        total += tl.sum(tl.where(inside, w, 0.0), 1)
        tl.store(weights + (video * rows + i)[:, None] * rows + j[None, :], w, mask=inside)
    tl.store(sums + video * rows + i, total, mask=i < rows)
    tl.debug_barrier()  # the loop below reads weights stored by other threads of the program
    for first in range(0, rows, ROWS):
        j = first + tl.arange(0, ROWS)
        at = (video * rows + i)[:, None] * rows + j[None, :]
        w = tl.load(weights + at, mask=(i < valid)[:, None] & (j < valid)[None, :], other=0.0)
        w = w / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(weights + at, w, mask=(i < rows)[:, None] & (j < rows)[None, :])


@triton.jit
def softmax_grad_kernel(
    g,  # [B, T, T]: dA
    weights, sums, lengths,
    ds,  # [B, T, T] float32
    rows, threshold,
    ROWS: tl.constexpr,
):  # fmt: skip
    video, i, valid, end = place(lengths, rows, ROWS)
    along = tl.zeros((ROWS,), tl.float32)  # sum_j A_ij dA_ij
    for first in range(0, end, ROWS):
        j = first + tl.arange(0, ROWS)
        at = (video * rows + i)[:, None] * rows + j[None, :]
        there, inside = (i < rows)[:, None] & (j < rows)[None, :], (i < valid)[:, None] & (j < valid)[None, :]
        a = tl.load(weights + at, mask=there, other=0.0)
        along += tl.sum(tl.where(inside, a * tl.load(g + at, mask=there, other=0.0), 0.0), 1)
    total = tl.load(sums + video * rows + i, mask=i < valid, other=1.0)
    least = 0.5 + 0.5 * tl.exp(threshold)  # halfway between a non-edge's weight, 1, and that of the weakest edge
    for first in range(0, end, ROWS):
        j = first + tl.arange(0, ROWS)
        at = (video * rows + i)[:, None] * rows + j[None, :]
        there = (i < rows)[:, None] & (j < rows)[None, :]
        a = tl.load(weights + at, mask=there, other=0.0)
        slope = a * (tl.load(g + at, mask=there, other=0.0) - along[:, None])
        slope = tl.where(a * total[:, None] > least, slope, 0.0)  # beyond the length a is 0, and no edge
        tl.store(ds + at, slope, mask=there)


@triton.jit
def features_grad_kernel(
    ds, weights, sums, norms, x, lengths,
    dx,  # [B, T, D]
    rows, width, stride_b, stride_t, stride_d,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Each program computes a block of rows and a slice of channels."""
    video, i, valid, end = place(lengths, rows, ROWS)
    d = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    size_i = tl.load(norms + video * rows + i, mask=i < valid, other=0.0)
    total = tl.load(sums + video * rows + i, mask=i < valid, other=1.0)
    pull = tl.zeros((ROWS, DEPTH), tl.float32)  # sum_j m_ij x_j / |x_j|
    along = tl.zeros((ROWS,), tl.float32)  # sum_j m_ij s_ij
    for first in range(0, end, ROWS):
        j = first + tl.arange(0, ROWS)
        there, inside = (i < rows)[:, None] & (j < rows)[None, :], (i < valid)[:, None] & (j < valid)[None, :]
        forth = (video * rows + i)[:, None] * rows + j[None, :]
        back = (video * rows + j)[None, :] * rows + i[:, None]
        m = tl.load(ds + forth, mask=there, other=0.0) + tl.load(ds + back, mask=there, other=0.0)  # [ROWS, ROWS]
        m = tl.where(inside, m, 0.0)
        # Non-edges have m = 0 and w = 1, so log(w) contributes nothing.
        w = tl.load(weights + forth, mask=there, other=0.0) * total[:, None]
        along += tl.sum(tl.where(m == 0.0, 0.0, m * tl.log(tl.where(inside, w, 1.0))), 1)
        size_j = tl.load(norms + video * rows + j, mask=j < valid, other=0.0)
        at = video * stride_b + j.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_d
        x_j = tl.load(x + at, mask=(j < valid)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        x_j = x_j / tl.where(size_j == 0.0, 1.0, size_j)[:, None]  # a zero row has no edges
        pull = tl.dot(m, x_j, pull, input_precision=PRECISION)
    inverse = 1 / tl.where(size_i == 0.0, 1.0, size_i)
    at = video * stride_b + i.to(tl.int64)[:, None] * stride_t + d[None, :] * stride_d
    x_i = tl.load(x + at, mask=(i < valid)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    slope = (pull - x_i * (inverse * along)[:, None]) * inverse[:, None]
    slope = tl.where((i < valid)[:, None], slope, 0.0)  # masked loads are not enough: 0 · NaN = NaN
    at = (video * rows + i)[:, None] * width + d[None, :]
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=(i < rows)[:, None] & (d < width)[None, :])


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
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    depth = end if INNER_VALID else tl.where(end == 0, 0, inner)
    breadth = valid if COLUMNS_VALID else columns
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        at_a = video * stride_ab + m.to(tl.int64)[:, None] * stride_am + k.to(tl.int64)[None, :] * stride_ak
        at_b = video * stride_bb + k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
        # Rows of padding are zeroed below and columns of it meet zeros, so the mask may end at the tensor, which lets
        # whole vectors be loaded.
        left = tl.load(a + at_a, mask=(m < rows)[:, None] & (k < inner)[None, :], other=0.0)  # [ROWS, DEPTH]
        right = tl.load(b + at_b, mask=(k < depth)[:, None] & (n < breadth)[None, :], other=0.0)  # [DEPTH, COLS]
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION)
    acc = tl.where((m < valid)[:, None], acc, 0.0)  # masked loads are not enough: 0 · NaN = NaN
    at = (video * rows + m)[:, None] * columns + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


def forward(x: Tensor, lengths: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of the op: float32 weights (B, T, T), norms (B, T) and row sums (B, T)."""
    batch, rows, width = x.shape
    weights = x.new_empty(batch, rows, rows, dtype=torch.float32)
    sums = x.new_empty(batch, rows, dtype=torch.float32)
    # Before the kernel: were a tile of features both multiplied and squared there, Triton would keep it in one buffer,
    # which the next copy may overwrite while sm_90's asynchronous products still read it (bench/aot_triton.py looks).
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    if weights.numel():
        exact = precision(x.dtype)
        side = 32 if x.dtype == torch.float32 and exact == "ieee" else 64  # "ieee" dots run on operands in registers
        deepest = 64 if x.dtype != torch.float32 else 32 if exact == "ieee" else 16
        depth = min(deepest, max(16, triton.next_power_of_2(width)))
        weights_kernel[batch * triton.cdiv(rows, side),](
            x, norms, weights, sums, lengths, rows, width, threshold, *x.stride(),
            PRECISION=exact, ROWS=side, DEPTH=depth, num_warps=side // 8, num_stages=2,
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
    ds = torch.empty_like(weights)
    softmax_grad_kernel[batch * triton.cdiv(rows, 32),](
        g.contiguous(), weights, sums, lengths, ds, rows, threshold, ROWS=32, num_warps=4
    )
    exact = precision(x.dtype) if x.dtype == torch.float32 else "tf32"  # same mantissa length as float16
    features_grad_kernel[batch * triton.cdiv(rows, 32), triton.cdiv(width, 128)](
        ds, weights, sums, norms, x, lengths, dx, rows, width, *x.stride(),
        PRECISION=exact, ROWS=32, DEPTH=128, num_warps=8, num_stages=2,
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
        cols = 32 if b.dtype == torch.float32 else 64
        product_kernel[batch * triton.cdiv(rows, 64), triton.cdiv(columns, cols)](
            a, b, out, lengths, rows, inner, columns, *a.stride(), *b.stride(),
            INNER_VALID=inner_valid, COLUMNS_VALID=columns_valid,
            PRECISION=precision(b.dtype), ROWS=64, COLS=cols, DEPTH=32, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out
