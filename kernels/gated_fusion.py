"""gated_fusion on Triton: gate and hidden layer in one pass over v and a, then a GEMM with the gate in its epilogue.

    gate = sigmoid(Wg [v | a] + bg),   h = GELU(Wh [v | a] + bh),   out = v + gate ⊙ (Wr h + br)

The concatenation [v | a] is never materialised: the reduction over channels has two segments instead. The second GEMM
and those of the backward pass use linear_act's kernel.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..streams import FIRST, aside
from ._sizes import cdiv, jit
from .column_sums import column_sums
from .linear_act import (
    activate,
    activation_grad,
    config,
    describable,
    describe,
    gemm,
    load_rows,
    load_weight,
    precision,
)


@jit
def gates_kernel(
    v, a,  # [1, M, D], tensor descriptors with TMA, otherwise pointers
    gate_weight, hidden_weight,  # [2, D, D], likewise: visual half, audio half
    gate_bias, hidden_bias,  # [D]
    gate, hidden,  # [M, D]
    y,  # [M, D] hidden before its GELU, or None
    count, width,
    stride_vt, stride_vd, stride_at, stride_ad, stride_gs, stride_gn, stride_gk, stride_hs, stride_hn, stride_hk,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Computes the same tile of gate and of hidden, sharing the loads of v and a."""
    tiles_n = tl.cdiv(width, COLS)
    first_n = tl.program_id(0) % tiles_n * COLS
    first_t = tl.program_id(0) // tiles_n * ROWS
    g = tl.zeros((ROWS, COLS), tl.float32)
    h = tl.zeros((ROWS, COLS), tl.float32)
    for segment in tl.static_range(2):
        for k in range(0, width, DEPTH):
            if segment == 0:
                z = load_rows(
                    v, 0, first_t, k, count, width, 0, stride_vt, stride_vd, ROWS, DEPTH, TMA
                )  # [ROWS, DEPTH]  # fmt: skip
            else:
                z = load_rows(
                    a, 0, first_t, k, count, width, 0, stride_at, stride_ad, ROWS, DEPTH, TMA
                )  # [ROWS, DEPTH]  # fmt: skip
            gw = load_weight(
                gate_weight, segment, first_n, k, width, width, stride_gs, stride_gn, stride_gk, COLS, DEPTH, TMA, True
            )  # [DEPTH, COLS]
            hw = load_weight(
                hidden_weight, segment, first_n, k, width, width, stride_hs, stride_hn, stride_hk,
                COLS, DEPTH, TMA, True,
            )  # [DEPTH, COLS]  # fmt: skip
            g = tl.dot(z, gw, g, input_precision=PRECISION)
            h = tl.dot(z, hw, h, input_precision=PRECISION)
    t, n = first_t + tl.arange(0, ROWS), first_n + tl.arange(0, COLS)
    inside = (t < count)[:, None] & (n < width)[None, :]
    at = t.to(tl.int64)[:, None] * width + n[None, :]  # [ROWS, COLS]
    g += tl.load(gate_bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    tl.store(gate + at, tl.sigmoid(g).to(gate.dtype.element_ty), mask=inside)
    h += tl.load(hidden_bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    if y is not None:
        tl.store(y + at, h.to(y.dtype.element_ty), mask=inside)
    tl.store(hidden + at, activate(h, "gelu").to(hidden.dtype.element_ty), mask=inside)


@jit
def gate_grad_kernel(
    g,  # [M, D] gradient of out
    gate, r,  # [M, D], with r = Wr h + br, the gated value
    dr,  # [M, D]
    dz,  # [M, 2D]; the left half is written, the gradient before the sigmoid
    sums,  # [M groups, 2, D] float32: column sums of dz's left half and of dr
    count, width,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dr = g ⊙ gate,   dz = g ⊙ r ⊙ gate (1 - gate), and their column sums for the two bias gradients.

    Each program processes GROUP rows, ROWS at a time, and sums across threads only once.
    """
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    by_gate, by_r = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, GROUP, ROWS):
        m = tl.program_id(0) * GROUP + start + tl.arange(0, ROWS)
        inside = (m < count)[:, None] & (n < width)[None, :]
        at = m.to(tl.int64)[:, None] * width + n[None, :]  # [ROWS, COLS]
        grad = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        open_ = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        through = grad * open_
        before = through * (1 - open_) * tl.load(r + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dr + at, through.to(dr.dtype.element_ty), mask=inside)
        left = m.to(tl.int64)[:, None] * (2 * width) + n[None, :]
        tl.store(dz + left, before.to(dz.dtype.element_ty), mask=inside)
        by_gate += before
        by_r += through
    column = tl.program_id(0).to(tl.int64) * (2 * width) + n
    tl.store(sums + column, tl.sum(by_gate, 0), mask=n < width)
    tl.store(sums + width + column, tl.sum(by_r, 0), mask=n < width)


def gates(
    v: Tensor,
    a: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    gate: Tensor,
    hidden: Tensor,
    y: Tensor | None,
) -> None:
    """Launches gates_kernel: v, a [1, M, D] -> gate, hidden and y [M, D]."""
    _, count, width = v.shape
    halves = [w.unflatten(1, (2, width)).transpose(0, 1) for w in (gate_weight, hidden_weight)]  # [2, D, D]
    c = config("gates", v, count, width, 2 * width)
    tma = c["tma"] and all(describable(x) for x in (v, a, *halves))
    gates_kernel[(cdiv(count, c["rows"]) * cdiv(width, c["cols"]),)](
        *(describe(x, c["rows"], c["depth"]) if tma else x for x in (v, a)),
        *(describe(w, c["cols"], c["depth"]) if tma else w for w in halves),
        gate_bias, hidden_bias, gate, hidden, y, count, width,
        *v.stride()[1:], *a.stride()[1:], *halves[0].stride(), *halves[1].stride(),
        PRECISION=precision(v.dtype), ROWS=c["rows"], COLS=c["cols"], DEPTH=c["depth"], TMA=tma,
        num_warps=c["warps"], num_stages=c["stages"],
    )  # fmt: skip


def forward(
    visual: Tensor,
    audio: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    residual_weight: Tensor,
    residual_bias: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op: (out, gate, hidden, hidden before GELU, Wr h + br); all but out are empty unless `save`."""
    width = visual.shape[-1]
    dtype = gate_weight.dtype
    v, a = (x.to(dtype).reshape(1, -1, width) for x in (visual, audio))
    count = v.shape[1]
    if count == 0:
        out = visual.new_empty(visual.shape, dtype=torch.promote_types(visual.dtype, dtype))
        return out, *(v.new_empty(0, width) if save else v.new_empty(0) for _ in range(4))
    gate, hidden = v.new_empty(count, width), v.new_empty(count, width)
    y, r = (v.new_empty(count, width), v.new_empty(count, width)) if save else (None, None)
    gates(v, a, gate_weight, gate_bias, hidden_weight, hidden_bias, gate, hidden, y)
    out = gemm(
        hidden[None], residual_weight[None], residual_bias, y=r,
        gate=gate, residual=visual.reshape(1, -1, width),
    ).view(visual.shape)  # fmt: skip
    return (out, gate, hidden, y, r) if save else (out, *(v.new_empty(0) for _ in range(4)))


def backward(
    g: Tensor,
    visual: Tensor,
    audio: Tensor,
    gate_weight: Tensor,
    hidden_weight: Tensor,
    residual_weight: Tensor,
    gate: Tensor,
    hidden: Tensor,
    y: Tensor,
    r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of visual and audio, then of weight and bias of the gate, hidden and residual layers."""
    width = visual.shape[-1]
    dtype = gate_weight.dtype
    g = g.reshape(-1, width).contiguous()
    v, a = (x.to(dtype).reshape(-1, width) for x in (visual, audio))
    count = v.shape[0]
    if count == 0:
        weights = ((w, w[:, 0]) for w in (gate_weight, hidden_weight, residual_weight))
        return tuple(torch.zeros_like(t) for t in (visual, audio, *(t for pair in weights for t in pair)))
    side, group = (8, 128), 64
    groups = cdiv(count, group)
    dr, dz = v.new_empty(count, width), v.new_empty(count, 2 * width)  # dz: gate half, hidden half
    sums = v.new_empty(groups, 2, width, dtype=torch.float32)
    gate_grad_kernel[groups, cdiv(width, side[1])](
        g, gate, r, dr, dz, sums, count, width, ROWS=side[0], COLS=side[1], GROUP=group, num_warps=2
    )
    # Apart: with the slope of GELU in its epilogue, which takes all registers, the product takes three times as long.
    dh, half = dr @ residual_weight, dz[:, width:]
    _, d_hidden_bias, _ = activation_grad(dh, y, "gelu", None, None, 1.0, residual_weight.T, True, out=half)

    def by_learned() -> tuple[Tensor, ...]:
        by_v, by_a = dz.T @ v, dz.T @ a  # [2D, D]; plain matrix products: cuBLAS
        gate_bias, residual_bias = (column_sums(sums[:, i], dtype) for i in range(2))
        d_gate, d_hidden = (torch.cat([by_v[half], by_a[half]], dim=1) for half in (slice(width), slice(width, None)))
        return d_gate, gate_bias, d_hidden, d_hidden_bias, dr.T @ hidden, residual_bias

    learned = aside("weights", by_learned, FIRST)
    weight = torch.cat([gate_weight, hidden_weight])  # [2D, 2D]: dz's columns x those of [v | a]
    dv = gemm(dz[None], weight[:, :width].T[None], residual=g[None]).to(visual.dtype).view(visual.shape)
    da = (dz @ weight[:, width:]).to(audio.dtype).view(audio.shape)
    return dv, da, *learned()
