"""prefix_attention on Triton: a program per sequence and head, and one more for the prefix, all in one launch.

    P = softmax over j <= i in the prefix or i's sequence of <q_i, k_j> / sqrt(H),   out = P v,   H = W / heads
    dP = g vᵀ,   dS = P (dP - <g, out>),   dq = dS k / sqrt(H),   dk = dSᵀ q / sqrt(H),   dv = Pᵀ g

A sequence and the prefix fit a tile each, so a softmax has no running maximum. Backward: P comes from the saved log of
its denominator. The prefix's program sums dk and dv over the rows of all sequences, in their order: no atomics.
q, k and v are read where the projection has put them, and their gradients are written as one tensor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sizes import next_power_of_2
from .linear_act import precision


@triton.jit
def load_head(x, first, i, count, width, channel, d, head_width, stride):
    """x[first + i, channel + d] as [ROWS, COLS]; zero where i >= count, and beyond the head."""
    at = (first + i).to(tl.int64)[:, None] * stride + (channel + d)[None, :]
    return tl.load(x + at, mask=(i < count)[:, None] & (d < head_width)[None, :], other=0.0)


@triton.jit
def place(sequence, sequences, prefix, rows):
    """The first row of a program's sequence, how many rows it has, and how many of the prefix it sees as well."""
    is_prefix = sequence == sequences
    first = tl.where(is_prefix, 0, prefix + sequence * rows)
    return first, tl.where(is_prefix, prefix, rows), tl.where(is_prefix, 0, prefix)


@triton.jit
def prefix_kernel(
    qkv,  # [N, 3W]
    out,  # [N, W]
    lse,  # [heads, N] float32
    total, width, heads, sequences, prefix, rows, stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program computes one head of the rows of a sequence, or of the prefix."""
    head, head_width = tl.program_id(1), width // heads
    first, count, seen = place(tl.program_id(0), sequences, prefix, rows)
    channel, root = head * head_width, tl.sqrt(head_width.to(tl.float32))
    i, p, d = tl.arange(0, ROWS), tl.arange(0, FIRST), tl.arange(0, DEPTH)
    q = load_head(qkv, first, i, count, width, channel, d, head_width, stride)  # [ROWS, DEPTH]
    k = load_head(qkv, first, i, count, width, width + channel, d, head_width, stride)
    v = load_head(qkv, first, i, count, width, 2 * width + channel, d, head_width, stride)
    prefix_k = load_head(qkv, 0, p, seen, width, width + channel, d, head_width, stride)  # [FIRST, DEPTH]
    prefix_v = load_head(qkv, 0, p, seen, width, 2 * width + channel, d, head_width, stride)
    own = tl.dot(q, tl.trans(k), input_precision=PRECISION) / root  # [ROWS, ROWS]
    own = tl.where(i[:, None] >= i[None, :], own, -float("inf"))
    before = tl.dot(q, tl.trans(prefix_k), input_precision=PRECISION) / root  # [ROWS, FIRST]
    before = tl.where((p < seen)[None, :], before, -float("inf"))
    highest = tl.maximum(tl.max(own, 1), tl.max(before, 1))  # finite, as a row sees itself
    own, before = tl.exp(own - highest[:, None]), tl.exp(before - highest[:, None])
    sum = tl.sum(own, 1) + tl.sum(before, 1)
    mixed = tl.dot((own / sum[:, None]).to(v.dtype), v, input_precision=PRECISION)  # [ROWS, DEPTH]
    mixed = tl.dot((before / sum[:, None]).to(v.dtype), prefix_v, mixed, input_precision=PRECISION)
    at = (first + i).to(tl.int64)[:, None] * width + (channel + d)[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=(i < count)[:, None] & (d < head_width)[None, :])
    tl.store(lse + head.to(tl.int64) * total + first + i, highest + tl.log(sum), mask=i < count)


@triton.jit
def load_queries(
    qkv, g, out, lse, first, i, count, total, width, head, channel, d, head_width, stride,
):  # fmt: skip
    """q and g [ROWS, DEPTH], and float32 lse and <g, out> [ROWS], of the rows first + i; zero where i >= count."""
    q = load_head(qkv, first, i, count, width, channel, d, head_width, stride)
    grad = load_head(g, first, i, count, width, channel, d, head_width, width)
    result = load_head(out, first, i, count, width, channel, d, head_width, width)
    log_sum = tl.load(lse + head.to(tl.int64) * total + first + i, mask=i < count, other=0.0)
    return q, grad, log_sum, tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)


@triton.jit
def pairs(q, g, log_sum, along, k, v, sees, root, PRECISION: tl.constexpr):
    """P and dS / sqrt(H) [QUERIES, KEYS] of some queries and keys, in their dtype, zero unless `sees`."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) / root
    p = tl.where(sees, tl.exp(scores - log_sum[:, None]), 0.0)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    return p.to(q.dtype), (p * (dp - along[:, None]) / root).to(q.dtype)


@triton.jit
def prefix_grad_kernel(
    g,  # [N, W]
    qkv,  # [N, 3W]
    out,  # [N, W]
    lse,  # [heads, N] float32
    dqkv,  # [N, 3W]
    total, width, heads, sequences, prefix, rows, stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program computes one head of the gradients of a sequence's rows, or of the prefix's."""
    head, head_width = tl.program_id(1), width // heads
    first, count, seen = place(tl.program_id(0), sequences, prefix, rows)
    channel, root = head * head_width, tl.sqrt(head_width.to(tl.float32))
    i, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    k = load_head(qkv, first, i, count, width, width + channel, d, head_width, stride)  # [ROWS, DEPTH]
    v = load_head(qkv, first, i, count, width, 2 * width + channel, d, head_width, stride)
    q, grad, log_sum, along = load_queries(
        qkv, g, out, lse, first, i, count, total, width, head, channel, d, head_width, stride
    )
    inside = (i < count)[:, None]
    p, ds = pairs(q, grad, log_sum, along, k, v, inside & (i[:, None] >= i[None, :]), root, PRECISION)  # [ROWS, ROWS]
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)  # [ROWS, DEPTH]
    dv = tl.dot(tl.trans(p), grad, input_precision=PRECISION)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    for start in range(0, seen, FIRST):  # a sequence's queries, and the keys of the prefix
        j = start + tl.arange(0, FIRST)
        keys = load_head(qkv, 0, j, seen, width, width + channel, d, head_width, stride)  # [FIRST, DEPTH]
        values = load_head(qkv, 0, j, seen, width, 2 * width + channel, d, head_width, stride)
        _, change = pairs(q, grad, log_sum, along, keys, values, inside & (j < seen)[None, :], root, PRECISION)
        dq = tl.dot(change, keys, dq, input_precision=PRECISION)
    at = (first + i).to(tl.int64)[:, None] * 3 * width + (channel + d)[None, :]
    stored = inside & (d < head_width)[None, :]
    tl.store(dqkv + at, dq.to(dqkv.dtype.element_ty), mask=stored)

    others = tl.where(seen == 0, total - prefix, 0)
    for start in range(0, others, BLOCK):  # the prefix's keys, and the queries of all sequences, in their order
        j = start + tl.arange(0, BLOCK)
        later, later_grad, later_sum, later_along = load_queries(
            qkv, g, out, lse, prefix, j, others, total, width, head, channel, d, head_width, stride
        )  # [BLOCK, DEPTH]
        sees = (j < others)[:, None] & (i < count)[None, :]
        weight, change = pairs(later, later_grad, later_sum, later_along, k, v, sees, root, PRECISION)  # [BLOCK, ROWS]
        dk = tl.dot(tl.trans(change), later, dk, input_precision=PRECISION)
        dv = tl.dot(tl.trans(weight), later_grad, dv, input_precision=PRECISION)

    tl.store(dqkv + at + width, dk.to(dqkv.dtype.element_ty), mask=stored)
    tl.store(dqkv + at + 2 * width, dv.to(dqkv.dtype.element_ty), mask=stored)


def _launch(qkv: Tensor, prefix: int, rows: int, heads: int) -> tuple[tuple[int, int], tuple, dict]:
    """The grid, the sizes and the tiles of both kernels."""
    total, width = qkv.shape[0], qkv.shape[1] // 3
    sequences = (total - prefix) // rows
    tile = max(16, next_power_of_2(max(prefix, rows)))  # 16: the least that tl.dot takes
    tiles = {
        "PRECISION": precision(qkv.dtype),
        "ROWS": tile,
        "FIRST": max(16, next_power_of_2(prefix)),
        "DEPTH": max(16, next_power_of_2(width // heads)),
        "num_warps": 4 if tile == 16 and qkv.dtype != torch.float32 else 8,  # else registers would spill
        "num_stages": 1,  # loops are too short to load ahead, which takes registers
    }
    return (sequences + 1, heads), (total, width, heads, sequences, prefix, rows, qkv.stride(0)), tiles


def forward(qkv: Tensor, prefix: int, rows: int, heads: int) -> tuple[Tensor, Tensor]:
    """qkv [N, 3W] -> out [N, W], and the logs of the softmax's denominators, float32 [heads, N]."""
    count, width = qkv.shape[0], qkv.shape[1] // 3
    out, lse = qkv.new_empty(count, width), qkv.new_empty(heads, count, dtype=torch.float32)
    if out.numel():
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        grid, sizes, tiles = _launch(qkv, prefix, rows, heads)
        prefix_kernel[grid](qkv, out, lse, *sizes, **tiles)
    return out, lse


def backward(g: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, prefix: int, rows: int, heads: int) -> Tensor:
    """g and out [N, W], qkv [N, 3W] -> the gradient of qkv."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if out.numel():
        qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        grid, sizes, tiles = _launch(qkv, prefix, rows, heads)
        block = 16 if qkv.dtype == torch.float32 else 32
        prefix_grad_kernel[grid](g.to(qkv.dtype).contiguous(), qkv, out, lse, dqkv, *sizes, BLOCK=block, **tiles)
    return dqkv
