"""linear_act on Triton: one GEMM family over [B, T, D] with a prologue, taps over time, and an epilogue.

    out[b, t, n] = E( sum_tap sum_k x[b, t + first + tap·step, k] · w[tap, n, k] ),   x zero outside the video

The epilogue E applies bias, activation, gate or dropout, and residual, each optional, or takes a dot product with a
vector. The forward pass, the gradient of x (taps in reverse order) and gated_fusion all use this kernel. The weight
gradient is its transpose, a sum over rows in a fixed order. There are no atomics.

LayerNorm is a pass of its own, which writes its rows in the dtype of the product. As a prologue it would save that, but
blocks that pass through registers cannot be copied ahead: on an H200 such a product took three times as long.
"""

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..streams import FIRST, aside
from ._sizes import cdiv, jit, next_power_of_2
from .column_sums import column_sums

CONFIGS = Path(__file__).parent / "configs" / "linear_act.json"
APART = 4096  # rows from which the gradients of weights are a branch of their own in a CUDA graph
SMALL = ("sm_86", "sm_89", "sm_12")  # RTX 30, 40, 50 and such: 99 KB of shared memory a block, others have 163 or 227


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """act(y), float32."""
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, y)  # unlike tl.maximum, propagates NaN
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        return y * tl.sigmoid(1.702 * y)
    else:
        return y


@triton.jit
def activate_grad(y, ACTIVATION: tl.constexpr):
    """act'(y), float32."""
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(y * 0.7071067811865476)) + y * 0.3989422804014327 * tl.exp(-0.5 * y * y)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * y)
        return s + s * (1 - s) * 1.702 * y  # in this order nothing overflows
    else:
        return tl.full(y.shape, 1.0, tl.float32)


@triton.jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b. Exact float32 products are summed over one block of channels first, then added.

    A sum of thousands of them one by one has several times the error of short sums that are added, as in cuBLAS.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # Triton would add to acc one by one all the same, but for max_num_imprecise_acc, which nothing here reads.
        acc += tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_rows(
    x, video, first_row, first_col, valid, width, stride_b, stride_t, stride_d,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[video, first_row.., first_col..] as [ROWS, COLS]; zero outside the `valid` rows and the width."""
    if TMA:  # TMA zero-fills out-of-bounds elements, including rows before the first
        tile = x.load([video, first_row, first_col]).reshape(ROWS, COLS)
    else:
        t = first_row + tl.arange(0, ROWS)  # [ROWS]
        d = first_col + tl.arange(0, COLS)  # [COLS]
        inside = ((t >= 0) & (t < valid))[:, None] & (d < width)[None, :]
        # 64-bit offset for the tile's corner, 32-bit within the tile: 64-bit offsets per element cost registers.
        corner = tl.cast(video, tl.int64) * stride_b + tl.cast(first_row, tl.int64) * stride_t
        corner += tl.cast(first_col, tl.int64) * stride_d
        at = tl.arange(0, ROWS)[:, None] * stride_t + tl.arange(0, COLS)[None, :] * stride_d
        tile = tl.load(x + corner + at, mask=inside, other=0.0)
    return tile


@triton.jit
def load_weight(
    w, tap, first_n, first_k, outputs, width, stride_tap, stride_n, stride_k,
    COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, K_LAST: tl.constexpr,
):  # fmt: skip
    """w[tap, first_n.., first_k..] as [DEPTH, COLS], zero outside. Descriptor: [taps, N, K] or [taps, K, N]."""
    if TMA:
        if K_LAST:
            tile = w.load([tap, first_n, first_k]).reshape(COLS, DEPTH).T
        else:
            tile = w.load([tap, first_k, first_n]).reshape(DEPTH, COLS)
    else:
        n, k = tl.arange(0, COLS)[None, :], tl.arange(0, DEPTH)[:, None]
        corner = tl.cast(tap, tl.int64) * stride_tap + tl.cast(first_n, tl.int64) * stride_n
        corner += tl.cast(first_k, tl.int64) * stride_k
        inside = (first_n + n < outputs) & (first_k + k < width)
        tile = tl.load(w + corner + n * stride_n + k * stride_k, mask=inside, other=0.0)
    return tile


@triton.jit
def _tile(
    tile, x, w, out, bias, y, gate, residual, dot, lengths,
    videos, rows, width, outputs, taps, first, step, gain,
    stride_xb, stride_xt, stride_xd, stride_wtap, stride_wn, stride_wk, stride_rb, stride_rt,
    ACTIVATION: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, K_LAST: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_t = tl.cdiv(outputs, COLS), tl.cdiv(rows, ROWS)
    first_n = tile % tiles_n * COLS  # columns vary fastest: the weight stays in L2, each row of x is fetched once
    video = tile // tiles_n // tiles_t
    first_t = tile // tiles_n % tiles_t * ROWS
    length = rows if lengths is None else tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
    valid = length if MASK == "input" else rows

    steps = tl.cdiv(width, DEPTH)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for i in range(taps * steps):  # a single loop over taps and channels keeps loads pipelined across taps
        tap, k = i // steps, i % steps * DEPTH
        a = load_rows(
            x, video, first_t + first + tap * step, k, valid, width, stride_xb, stride_xt, stride_xd,
            ROWS, DEPTH, TMA,
        )  # [ROWS, DEPTH]  # fmt: skip
        b = load_weight(
            w, tap, first_n, k, outputs, width, stride_wtap, stride_wn, stride_wk, COLS, DEPTH, TMA, K_LAST
        )  # [DEPTH, COLS]
        acc = add_product(a, b, acc, PRECISION)

    t, n = first_t + tl.arange(0, ROWS), first_n + tl.arange(0, COLS)
    inside = (t < rows)[:, None] & (n < outputs)[None, :]
    # Offsets are relative to a multiple of 1024 rows. They fit in 32 bits and depend on the tile, so a persistent
    # program recomputes them instead of keeping them in registers, which would spill.
    above = first_t % 1024
    row = video.to(tl.int64) * rows + (first_t - above)
    i, j = above + tl.arange(0, ROWS)[:, None], n[None, :]
    corner, at = row * outputs, i * outputs + j  # of y and gate
    if bias is not None:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if y is not None:
        tl.store(y + corner + at, acc.to(y.dtype.element_ty), mask=inside)
    acc = activate(acc, ACTIVATION)
    if gate is not None:
        acc *= tl.load(gate + corner + at, mask=inside, other=0).to(tl.float32) * gain
    if dot is not None:  # one value per row and column tile; the caller sums over the column tiles
        part = tl.sum(acc * tl.load(dot + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :], 1)
        tl.store(
            out + (tile % tiles_n).to(tl.int64) * videos * rows + row + above + tl.arange(0, ROWS), part, mask=t < rows
        )
    else:
        if residual is not None:
            there = video.to(tl.int64) * stride_rb + (first_t - above).to(tl.int64) * stride_rt
            acc += tl.load(residual + there + i * stride_rt + j, mask=inside, other=0.0).to(tl.float32)
        if MASK == "output":
            acc = tl.where((t < length)[:, None], acc, 0.0)
        tl.store(out + corner + at, acc.to(out.dtype.element_ty), mask=inside)


# Not for `rows`, unlike jit: where they are a multiple of 16, neighbouring rows share masks, without which large tiles
# spill registers.
@triton.jit(do_not_specialize_on_alignment=("videos",))
def gemm_kernel(
    x,  # [B, T, I], a tensor descriptor with TMA, otherwise a pointer
    w,  # [taps, N, I], likewise; the descriptor is [taps, I, N] unless K_LAST
    out,  # [B, T, N], or with dot float32 [N tiles, B, T]
    bias,  # [N]
    y,  # [B, T, N] pre-activation, or None
    gate,  # [B, T, N], of which `gain` times is a factor of the activation
    residual,  # [B, T, N], last dimension contiguous
    dot,  # [N]
    lengths,  # [B]; MASK selects whether rows of the "input" or the "output" are zero beyond the length
    videos, rows, width, outputs, taps, first, step, gain,
    stride_xb, stride_xt, stride_xd, stride_wtap, stride_wn, stride_wk, stride_rb, stride_rt,
    ACTIVATION: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr, K_LAST: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One tile per program, or with PERSISTENT a grid-stride loop over the tiles."""
    if PERSISTENT:
        tiles = videos * tl.cdiv(rows, ROWS) * tl.cdiv(outputs, COLS)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(
                tile, x, w, out, bias, y, gate, residual, dot, lengths,
                videos, rows, width, outputs, taps, first, step, gain,
                stride_xb, stride_xt, stride_xd, stride_wtap, stride_wn, stride_wk, stride_rb, stride_rt,
                ACTIVATION, MASK, PRECISION, ROWS, COLS, DEPTH, TMA, K_LAST,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, w, out, bias, y, gate, residual, dot, lengths,
            videos, rows, width, outputs, taps, first, step, gain,
            stride_xb, stride_xt, stride_xd, stride_wtap, stride_wn, stride_wk, stride_rb, stride_rt,
            ACTIVATION, MASK, PRECISION, ROWS, COLS, DEPTH, TMA, K_LAST,
        )  # fmt: skip


@jit
def weight_grad_kernel(
    g,  # [B, T, N] gradient of the output, a tensor descriptor with TMA, otherwise a pointer
    x,  # [B, T, I], likewise
    out,  # [splits, taps, N, I] float32: were taps last, the stores of a warp would be scattered
    lengths,  # [B]: rows of x beyond them count as zero
    videos, rows, width, outputs, taps, first, step,
    stride_gb, stride_gt, stride_gd, stride_xb, stride_xt, stride_xd,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[split, tap, n, k] = sum of g[b, t, n] · x[b, t + first + tap·step, k] over the split's blocks of rows."""
    tiles_k = tl.cdiv(width, COLS)
    tap = tl.program_id(0) % taps  # taps vary fastest: they read nearly the same rows of x
    first_k = tl.program_id(0) // taps % tiles_k * COLS
    first_n = tl.program_id(0) // taps // tiles_k * ROWS
    split, splits = tl.program_id(1), tl.num_programs(1)
    tiles_t = tl.cdiv(rows, DEPTH)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(split, videos * tiles_t, splits):
        video, t = block // tiles_t, block % tiles_t * DEPTH
        valid = rows if lengths is None else tl.minimum(tl.load(lengths + video).to(tl.int32), rows)
        a = load_rows(
            g, video, t, first_n, rows, outputs, stride_gb, stride_gt, stride_gd, DEPTH, ROWS, TMA
        )  # [DEPTH, ROWS]
        b = load_rows(
            x, video, t + first + tap * step, first_k, valid, width, stride_xb, stride_xt, stride_xd, DEPTH, COLS, TMA
        )  # [DEPTH, COLS]
        acc = add_product(a.T, b, acc, PRECISION)
    n, k = first_n + tl.arange(0, ROWS)[:, None], first_k + tl.arange(0, COLS)[None, :]
    at = ((split * taps + tap) * outputs + n).to(tl.int64) * width + k
    tl.store(out + at, acc, mask=(n < outputs) & (k < width))


@jit
def activation_grad_kernel(
    g,  # [M, N] gradient of the output, contiguous; [M] with dot
    y,  # [M, N] pre-activation, or None: no activation
    dot,  # [N]
    gate,  # [M, N], of which `gain` times is a factor of the activation, or None: `gain` is
    dy,  # [M, N] with row stride stride_y
    bias_sums, dot_sums,  # [M groups, N] float32 with row stride stride_s, or None
    count, outputs, gain, stride_y, stride_s,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dy = act'(y) · g (· dot, or gate), its column sums, and the column sums of act(y) · g for the gradient of dot.

    Each program processes GROUP rows, ROWS at a time, and sums across threads only once.
    """
    n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    by_bias, by_dot = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    if dot is not None:
        u = tl.load(dot + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    for start in range(0, GROUP, ROWS):
        m = tl.program_id(0) * GROUP + start + tl.arange(0, ROWS)
        inside = (m < count)[:, None] & (n < outputs)[None, :]
        at = m.to(tl.int64)[:, None] * outputs + n[None, :]  # [ROWS, COLS]
        if y is not None:
            value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if dot is not None:
            result = tl.load(g + m, mask=m < count, other=0.0).to(tl.float32)[:, None]
            by_dot += activate(value, ACTIVATION) * result
            result = result * u
        else:
            result = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * gain
        if gate is not None:
            result *= tl.load(gate + at, mask=inside, other=0).to(tl.float32)
        if y is not None:
            result *= activate_grad(value, ACTIVATION)
        there = m.to(tl.int64)[:, None] * stride_y + n[None, :]
        tl.store(dy + there, result.to(dy.dtype.element_ty), mask=inside)
        by_bias += result
    sums = tl.program_id(0) * stride_s + n
    if bias_sums is not None:
        tl.store(bias_sums + sums, tl.sum(by_bias, 0), mask=n < outputs)
    if dot is not None:
        tl.store(dot_sums + sums, tl.sum(by_dot, 0), mask=n < outputs)


@functools.cache
def _table() -> dict:
    return json.loads(CONFIGS.read_text()) if CONFIGS.exists() else {}


@functools.cache
def _chip(device: torch.device) -> tuple[str, int]:
    """The architecture's key in the configuration table, and the number of SMs."""
    if device.type != "cuda":
        return "interpreter", 2
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """The input precision of tl.dot. float32 follows PyTorch's matmul setting."""
    # fp32_precision reflects both settings; reading allow_tf32 raises once fp32_precision has been set.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def default_config(kind: str, chip: str, dtype: torch.dtype, rows: int, outputs: int) -> dict:
    """The fallback for untuned shapes: fits every supported chip.

    Registers do not spill (bench/aot_report.json) if widths are multiples of 16.
    """
    tma = chip.startswith("sm_") and int(chip.removeprefix("sm_")) >= 90
    common = {"stages": 2 if chip.startswith(SMALL) else 3, "tma": tma, "persistent": False}
    wide = 1 if kind == "gates" else 2  # gates keeps two accumulators
    if dtype == torch.float32 and precision(dtype) == "ieee":  # every product is an FMA instruction of its own, and a
        # block of them is summed beside acc (add_product, but for gates), for which larger tiles have no registers
        tiles = {"gates": (32, 32), "weight_grad": (32, 16), "gemm": (64, 16)}
        cols, depth = tiles[kind]
        return {"rows": 64, "cols": cols, "depth": depth, "warps": 8} | common
    if dtype == torch.float32:
        return {"rows": 128, "cols": 64, "depth": 32, "warps": 8} | common
    if rows * outputs < 128 * 128 * 128:  # fewer large tiles than SMs
        return {"rows": 64, "cols": 64, "depth": 64, "warps": 4} | common
    return {"rows": 128, "cols": 64 * wide, "depth": 64, "warps": 8} | common


def bucket(kind: str, dtype: torch.dtype, rows: int, outputs: int, width: int) -> str:
    """The problem's key in the configuration table, with rows rounded up to a power of two.

    tf32 products take other tiles than exact ones.
    """
    name = "tf32" if precision(dtype) == "tf32" else str(dtype).removeprefix("torch.")
    return f"{kind} {name} {next_power_of_2(rows)}x{outputs}x{width}"


def config(kind: str, x: Tensor, rows: int, outputs: int, width: int) -> dict:
    """Launch configuration on x's device, in x's dtype. kind: gemm, weight_grad or gates; width: of the reduction."""
    chip, _ = _chip(x.device)
    measured = _table().get(chip, {}).get(bucket(kind, x.dtype, rows, outputs, width))
    return measured or default_config(kind, chip, x.dtype, rows, outputs)


def describable(x: Tensor) -> bool:
    """Whether TMA can read x: 16-byte aligned rows, none of them expanded, last dimension contiguous."""
    size, (*strides, last) = x.element_size(), x.stride()
    return x.data_ptr() % 16 == 0 and last == 1 and all(s > 0 and s * size % 16 == 0 for s in strides)


def describe(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, cols])


def gemm(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    y: Tensor | None = None,
    gate: Tensor | None = None,
    gain: float = 1.0,
    residual: Tensor | None = None,
    dot: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: str = "none",
    first: int = 0,
    step: int = 0,
) -> Tensor:
    """Launches gemm_kernel: x [B, T, I], w [taps, N, I], any strides -> [B, T, N], or float32 [B, T] with dot.

    The result takes the promoted dtype of w and residual.
    """
    videos, rows, width = x.shape
    taps, outputs, _ = w.shape
    c = config("gemm", x, videos * rows, outputs, width * taps)
    tiles_n = cdiv(outputs, c["cols"])
    tiles = videos * cdiv(rows, c["rows"]) * tiles_n
    if dot is not None:
        out = x.new_empty(tiles_n, videos, rows, dtype=torch.float32)
    else:
        dtype = w.dtype if residual is None else torch.promote_types(w.dtype, residual.dtype)
        out = x.new_empty(videos, rows, outputs, dtype=dtype)
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    # A TMA descriptor cannot end at a per-video length: mask="input" needs masked loads to get its zeros.
    k_last = w.stride(2) == 1
    by_k = w if k_last else w.transpose(1, 2)
    tma = c["tma"] and mask != "input" and describable(x) and describable(by_k)
    block = (c["cols"], c["depth"]) if k_last else (c["depth"], c["cols"])
    grid = (min(tiles, _chip(x.device)[1]) if c["persistent"] else tiles,)
    gemm_kernel[grid](
        describe(x, c["rows"], c["depth"]) if tma else x,
        describe(by_k, *block) if tma else w,
        out, bias, y, gate, residual, dot, lengths,
        videos, rows, width, outputs, taps, first, step, gain,
        *x.stride(), *w.stride(), *((0, 0) if residual is None else residual.stride()[:2]),
        ACTIVATION=activation, MASK=mask, PRECISION=precision(w.dtype),
        ROWS=c["rows"], COLS=c["cols"], DEPTH=c["depth"], TMA=tma, K_LAST=k_last, PERSISTENT=c["persistent"],
        num_warps=c["warps"], num_stages=c["stages"],
    )  # fmt: skip
    return out if dot is None else out.sum(0)


def weight_grad(
    g: Tensor,
    x: Tensor,
    taps: int = 1,
    first: int = 0,
    step: int = 0,
    lengths: Tensor | None = None,
) -> Tensor:
    """Launches weight_grad_kernel: g [B, T, N], x [B, T, I] -> float32 [taps, N, I], summed in a fixed order."""
    videos, rows, width = x.shape
    outputs = g.shape[2]
    c = config("weight_grad", x, videos * rows, outputs, width * taps)
    tiles = taps * cdiv(outputs, c["rows"]) * cdiv(width, c["cols"])
    blocks = videos * cdiv(rows, c["depth"])
    each = 2 if c["rows"] * c["cols"] <= 128 * 128 else 1  # programs per SM, of which shared memory holds so many
    splits = max(1, min(each * _chip(x.device)[1] // tiles, blocks))
    out = x.new_empty(splits, taps, outputs, width, dtype=torch.float32)
    tma = c["tma"] and lengths is None and describable(x) and describable(g)
    weight_grad_kernel[tiles, splits](
        describe(g, c["depth"], c["rows"]) if tma else g,
        describe(x, c["depth"], c["cols"]) if tma else x,
        out, lengths,
        videos, rows, width, outputs, taps, first, step, *g.stride(), *x.stride(),
        PRECISION=precision(g.dtype),
        ROWS=c["rows"], COLS=c["cols"], DEPTH=c["depth"], TMA=tma,
        num_warps=c["warps"], num_stages=c["stages"],
    )  # fmt: skip
    return out.sum(0)


def activation_grad(
    g: Tensor, y: Tensor | None, activation: str, dot: Tensor | None, gate: Tensor | None, gain: float, like: Tensor,
    summed: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Launches activation_grad_kernel: g, y [M, N] -> dy [M, N], [N] its column sums if `summed`, and dot's gradient.

    like: (N, ·) in the dtype of the results; out: optional [M, N] to write dy to, last dimension contiguous
    """
    count, outputs = g.shape[0], like.shape[0]
    rows, cols, warps = 8, 128, 4 if activation == "gelu" else 2  # whose slope takes many registers
    group = 64 if summed or dot is not None else rows  # with nothing to add up, every block stands alone
    groups, sets = cdiv(count, group), summed + (dot is not None)
    dy = like.new_empty(count, outputs) if out is None else out
    sums = g.new_empty(groups, sets, outputs, dtype=torch.float32)
    activation_grad_kernel[groups, cdiv(outputs, cols)](
        g, y, dot, gate, dy, sums[:, 0] if summed else None, None if dot is None else sums[:, -1],
        count, outputs, gain, dy.stride(0), sets * outputs,
        ACTIVATION=activation, ROWS=rows, COLS=cols, GROUP=group, num_warps=warps,
    )  # fmt: skip
    return (
        dy,
        column_sums(sums[:, 0], like.dtype) if summed else None,
        None if dot is None else column_sums(sums[:, -1], like.dtype),
    )


def _videos(x: Tensor, weight: Tensor) -> Tensor:
    """x as [B, T, I]. If the weight is a matrix, all rows form a single video."""
    return x if weight.ndim == 3 else x.reshape(1, -1, x.shape[-1])


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as dense bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _taps(weight: Tensor) -> Tensor:
    """The weight as [taps, N, I], channels contiguous: a convolution weight with several taps is copied."""
    if weight.ndim == 2:
        return weight[None]
    if weight.shape[2] == 1:
        return weight[None, :, :, 0]  # permuted, its first stride would be 1, which TMA does not take
    return weight.permute(2, 0, 1).contiguous()


def _offsets(weight: Tensor, dilation: int, causal: bool) -> tuple[int, int]:
    """(first, step) such that tap k of the convolution reads row t + first + k·step."""
    taps = weight.shape[2] if weight.ndim == 3 else 1
    return -(taps - 1 if causal else taps // 2) * dilation, dilation


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dilation: int,
    causal: bool,
    lengths: Tensor | None,
    dot: Tensor | None,
    save_y: bool,
    mask: Tensor | None,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """The op: (out, y), with y the pre-activation, empty unless save_y."""
    h, w = _videos(x, weight), _taps(weight)
    (videos, rows, _), outputs = h.shape, w.shape[1]
    shape = x.shape[:-1] if dot is not None else (*x.shape[:-1], outputs)
    y = w.new_empty((videos, rows, outputs) if save_y else 0)
    if x.numel() == 0:
        dtype = w.dtype if residual is None else torch.promote_types(w.dtype, residual.dtype)
        return w.new_empty(shape, dtype=dtype), y
    first, step = _offsets(weight, dilation, causal)
    masked = weight.ndim == 3 and lengths is not None
    added = residual is not None or mask is not None or dot is not None
    if w.shape[0] == 1 and activation == "none" and not masked and not added:  # nothing to fuse: cuBLAS
        return F.linear(h, w[0], bias).view(shape), y
    out = gemm(
        h, w, bias, activation,
        y=y if save_y else None,
        gate=_bytes(mask), gain=gain,
        residual=None if residual is None else _videos(residual, weight), dot=dot,
        lengths=lengths if masked else None, mask="input" if masked else "none", first=first, step=step,
    )  # fmt: skip
    return (out if dot is None else out.to(w.dtype)).view(shape), y


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    dilation: int,
    causal: bool,
    lengths: Tensor | None,
    dot: Tensor | None,
    y: Tensor,
    needs: list[bool],
    mask: Tensor | None,
    gain: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and dot; empty where `needs` is False.

    y: the pre-activation saved by the forward pass. For relu, the output works as well, since it has the same sign; and
    with dropout without its mask, since what is dropped is 0 there.
    """
    need_x, need_weight, need_bias, need_dot = needs
    h, w = _videos(x, weight), _taps(weight)
    (videos, rows, width), (taps, outputs, _) = h.shape, w.shape
    count = videos * rows
    dx = None
    if x.numel() == 0:
        like = (x, weight, w[0, :, 0], dot)
        return tuple(torch.zeros_like(t) if need else w.new_empty(0) for t, need in zip(like, needs, strict=True))
    g = g.reshape(count, *(() if dot is not None else (outputs,))).contiguous()
    before = y.view(count, outputs) if y.numel() else None
    as_it_is = before is None and mask is None and dot is None and g.dtype == w.dtype
    dy, db, d_dot = g, None, None
    if not as_it_is:
        dy, db, d_dot = activation_grad(g, before, activation, dot, _bytes(mask), gain, w[0], need_bias)
    first, step = _offsets(weight, dilation, causal)
    masked = weight.ndim == 3 and lengths is not None
    plain = taps == 1 and not masked  # two plain matrix products: cuBLAS

    def by_learned() -> tuple[Tensor, Tensor]:
        by_weight, by_bias = w.new_empty(0), w.new_empty(0) if db is None else db
        if need_weight and plain:
            by_weight = (dy.T @ h.reshape(count, width)).view(weight.shape)
        elif need_weight:
            by_tap = weight_grad(dy.view(videos, rows, outputs), h, taps, first, step, lengths if masked else None)
            by_weight = weight.new_empty(weight.shape).copy_(by_tap.permute(1, 2, 0))
        if need_bias and as_it_is:
            by_bias = column_sums(dy, w.dtype)
        return by_weight, by_bias

    learned = aside("weights", by_learned, FIRST) if count >= APART else by_learned
    if need_x and plain:
        dx = dy @ w[0]
    elif need_x:
        dx = gemm(
            dy.view(videos, rows, outputs), w.transpose(1, 2), lengths=lengths if masked else None,
            mask="output" if masked else "none", first=-first, step=-step,
        )  # fmt: skip
    return (
        dx.view(x.shape) if need_x else x.new_empty(0),
        *learned(),
        d_dot if need_dot else w.new_empty(0),
    )
