"""window_attention on Triton: a tile holds as many whole windows as fit, so no softmax spans two programs.

    P = softmax over j in i's window of <q_i, k_j> / sqrt(H),   out = P v + residual,   H = D / heads
    dP = g vᵀ,   dS = P (dP - <dP, P>),   dq = dS k / sqrt(H),   dk = dSᵀ q / sqrt(H),   dv = Pᵀ g

A single head can have 512 channels, so they are processed in slices: a first pass accumulates the tile's scores over
the slices, a second computes and stores the output slice by slice, and no program ever holds a full row. Traffic per
row: 3D read (4D with a residual) and D written; backward, 4D read and 3D written (the second pass reads from L2). A
non-finite value spreads to the other windows of its tile, but never to other videos.
"""

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import linear_act
from ._sizes import cdiv, jit, next_power_of_2
from .linear_act import add_product, precision


@triton.jit
def load_slice(x, video, t, valid, channel, d, head_width, stride_b, stride_t, stride_d):
    """x[video, t, channel + d] as [ROWS, DEPTH], zero beyond the valid rows and the head width."""
    at = video * stride_b + t.to(tl.int64)[:, None] * stride_t + (channel + d)[None, :] * stride_d
    return tl.load(x + at, mask=(t < valid)[:, None] & (d < head_width)[None, :], other=0.0)


@triton.jit
def softmax(scores, t, valid, window, head_width):
    """float32 P [ROWS, ROWS] from <q, k>: zero outside each row's window and beyond the valid rows."""
    near = (t // window)[:, None] == (t // window)[None, :]
    near = near & (t < valid)[:, None] & (t < valid)[None, :]
    scores = tl.where(near, scores / tl.sqrt(head_width.to(tl.float32)), -float("inf"))
    highest = tl.max(scores, 1)
    weights = tl.where(near, tl.exp(scores - tl.where(highest == -float("inf"), 0.0, highest)[:, None]), 0.0)
    total = tl.sum(weights, 1)
    return weights / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def place(rows, heads, step, ROWS: tl.constexpr):
    """The program's video, head, and rows [ROWS]; tile rows beyond its whole windows are set to T, which masks them."""
    tiles = tl.cdiv(rows, step)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    video = (tl.program_id(0) // tiles // heads).to(tl.int64)
    i = tl.arange(0, ROWS)
    return video, head, tl.where(i < step, tile * step + i, rows)


@jit
def window_kernel(
    q, k, v,  # [B, T, D]
    residual,  # [B, T, D], or None
    out,  # [B, T, D]
    lengths,  # [B], or None
    rows, width, heads, window, step,
    stride_qb, stride_qt, stride_qd, stride_kb, stride_kt, stride_kd, stride_vb, stride_vt, stride_vd,
    stride_rb, stride_rt, stride_rd,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    video, head, t = place(rows, heads, step, ROWS)
    head_width = width // heads
    first = head * head_width
    valid = rows
    if lengths is not None:
        valid = tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    for channel in range(0, head_width, DEPTH):
        d = channel + tl.arange(0, DEPTH)
        queries = load_slice(q, video, t, valid, first, d, head_width, stride_qb, stride_qt, stride_qd)  # [ROWS, DEPTH]
        keys = load_slice(k, video, t, valid, first, d, head_width, stride_kb, stride_kt, stride_kd)
        scores = add_product(queries, tl.trans(keys), scores, PRECISION)
    p = softmax(scores, t, valid, window, head_width).to(v.dtype.element_ty)
    for channel in range(0, head_width, DEPTH):
        d = channel + tl.arange(0, DEPTH)
        values = load_slice(v, video, t, valid, first, d, head_width, stride_vb, stride_vt, stride_vd)
        mixed = tl.dot(p, values, input_precision=PRECISION)  # [ROWS, DEPTH]
        if residual is not None:
            mixed += load_slice(residual, video, t, rows, first, d, head_width, stride_rb, stride_rt, stride_rd)
        at = (video * rows + t)[:, None] * width + (first + d)[None, :]
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=(t < rows)[:, None] & (d < head_width)[None, :])


@jit
def window_grad_kernel(
    g,  # [B, T, D]
    q, k, v,  # [B, T, D]
    dq, dk, dv,  # [B·T, D], channels contiguous
    lengths,
    rows, width, heads, window, step, stride_dq, stride_dk, stride_dv, stride_gb, stride_gt, stride_gd,
    stride_qb, stride_qt, stride_qd, stride_kb, stride_kt, stride_kd, stride_vb, stride_vt, stride_vd,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    video, head, t = place(rows, heads, step, ROWS)
    head_width = width // heads
    first = head * head_width
    valid = rows
    if lengths is not None:
        valid = tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    scores = tl.zeros((ROWS, ROWS), tl.float32)
    dp = tl.zeros((ROWS, ROWS), tl.float32)
    for channel in range(0, head_width, DEPTH):
        d = channel + tl.arange(0, DEPTH)
        queries = load_slice(q, video, t, valid, first, d, head_width, stride_qb, stride_qt, stride_qd)  # [ROWS, DEPTH]
        keys = load_slice(k, video, t, valid, first, d, head_width, stride_kb, stride_kt, stride_kd)
        scores = add_product(queries, tl.trans(keys), scores, PRECISION)
        values = load_slice(v, video, t, valid, first, d, head_width, stride_vb, stride_vt, stride_vd)
        grad = load_slice(g, video, t, valid, first, d, head_width, stride_gb, stride_gt, stride_gd)
        dp = add_product(grad.to(values.dtype), tl.trans(values), dp, PRECISION)
    p = softmax(scores, t, valid, window, head_width)
    ds = p * (dp - tl.sum(dp * p, 1)[:, None]) / tl.sqrt(head_width.to(tl.float32))
    p, ds = p.to(v.dtype.element_ty), ds.to(v.dtype.element_ty)
    for channel in range(0, head_width, DEPTH):
        d = channel + tl.arange(0, DEPTH)
        row, column = (video * rows + t)[:, None], (first + d)[None, :]
        inside = (t < rows)[:, None] & (d < head_width)[None, :]
        keys = load_slice(k, video, t, valid, first, d, head_width, stride_kb, stride_kt, stride_kd)
        change = tl.dot(ds, keys, input_precision=PRECISION)  # [ROWS, DEPTH]
        tl.store(dq + row * stride_dq + column, change.to(dq.dtype.element_ty), mask=inside)
        queries = load_slice(q, video, t, valid, first, d, head_width, stride_qb, stride_qt, stride_qd)
        change = tl.dot(tl.trans(ds), queries, input_precision=PRECISION)
        tl.store(dk + row * stride_dk + column, change.to(dk.dtype.element_ty), mask=inside)
        grad = load_slice(g, video, t, valid, first, d, head_width, stride_gb, stride_gt, stride_gd)
        change = tl.dot(tl.trans(p), grad.to(p.dtype), input_precision=PRECISION)
        tl.store(dv + row * stride_dv + column, change.to(dv.dtype.element_ty), mask=inside)


def tile(window: int, head_width: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes, and the rows (step) that whole windows fill. With 4 warps or deeper slices, registers spill."""
    rows = max(32 if dtype == torch.float32 else 64, next_power_of_2(window))
    deepest = 16 if dtype == torch.float32 or rows > 64 else 64
    depth = min(deepest, max(16, next_power_of_2(head_width)))
    return {"step": rows // window * window, "ROWS": rows, "DEPTH": depth}


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, heads: int, lengths: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The op: q, k, v and residual (B, T, D) of any strides -> (B, T, D)."""
    batch, rows, width = q.shape
    out = q.new_empty(q.shape, dtype=q.dtype if residual is None else torch.promote_types(q.dtype, residual.dtype))
    window = min(window, rows)
    if out.numel():
        sizes = tile(window, width // heads, q.dtype)
        strides = (x.stride() for x in (q, k, v, q if residual is None else residual))
        window_kernel[batch * heads * cdiv(rows, sizes["step"]),](
            q, k, v, residual, out, lengths, rows, width, heads, window, sizes.pop("step"), *chain(*strides),
            PRECISION=precision(q.dtype), **sizes, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, heads: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    write_grads(grads, g, q, k, v, window, heads, lengths)
    return grads


def write_grads(
    grads: tuple[Tensor, Tensor, Tensor],
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, heads: int, lengths: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradients of q, k and v, each (B, T, D), whose rows may lie apart."""
    batch, rows, width = q.shape
    window = min(window, rows)
    if not q.numel():
        return
    sizes = tile(window, width // heads, q.dtype)
    strides = (x.stride() for x in (g, q, k, v))
    # Copies ahead would make exact products spill registers. On sm_100 it is two stages that spill, not three.
    exact = q.dtype == torch.float32 and precision(q.dtype) == "ieee"
    stages = 1 if exact else 3 if linear_act._chip(q.device)[0] == "sm_100" else 2
    window_grad_kernel[batch * heads * cdiv(rows, sizes["step"]),](
        g, q, k, v, *grads, lengths, rows, width, heads, window, sizes.pop("step"),
        *(d.stride(1) for d in grads), *chain(*strides),
        PRECISION=precision(q.dtype), **sizes, num_warps=8, num_stages=stages,
    )  # fmt: skip
