"""linear_act in C++, on AMX tile units or in AVX-512, for float32 inputs with enough rows to amortise packing."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _build
from ..reference._numerics import zero_padding
from ..reference.linear_act import LAYER_NORM_EPS, epilogue, gain
from . import _dispatch
from ._derivatives import differentiable, differentiable_once, empty_grads, wanted

ROWS, WIDTH = 512, 256  # below these torch is as fast, because every call packs the weights


def saves_y(activation: str, residual: Tensor | None, dot: Tensor | None, *learned: Tensor | None) -> bool:
    """Whether the backward pass needs the pre-activation y.

    ReLU needs it only with a residual; otherwise the sign of its output is enough.
    """
    asked = dot is not None or activation in ("gelu", "quick_gelu") or (activation == "relu" and residual is not None)
    return asked and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*learned, dot))


def mask_and_gain(dropout: tuple[Tensor, float] | None) -> tuple[Tensor | None, float]:
    """The factors of dropout: a mask, and a number."""
    return (None, 1.0) if dropout is None else (dropout[0], gain(dropout[1]))


def linear_act(
    x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot=None, dropout=None, needed=None, *, amx
) -> Tensor:
    if activation == "gelu":  # torch's erf
        y = linear_act(x, weight, bias, "none", None, norm, dilation, causal, lengths, needed=needed, amx=amx)
        return epilogue(y, activation, dropout, residual, dot)
    mask, scale = mask_and_gain(dropout)
    leading = x.shape[:-1]
    if weight.ndim == 2:
        lengths = None
        if needed is None:
            x, residual, mask = (
                None if t is None else t.reshape(1, leading.numel(), t.shape[-1]) for t in (x, residual, mask)
            )
    if norm is not None:
        x = zero_padding(x, lengths)  # before the norm too, because padding may hold NaN
        x = F.layer_norm(x, x.shape[-1:], norm[0], norm[1], LAYER_NORM_EPS)
    save_y = saves_y(activation, residual, dot, x, weight, bias)
    out, _ = torch.ops.avadclip_fast.linear_act_cpu(
        x, weight, bias, activation, residual, dilation, causal, lengths, needed, dot, save_y, mask, scale, amx
    )
    return out.reshape(leading if dot is not None else (*leading, weight.shape[0]))


def supports(
    x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot=None, dropout=None, needed=None, *, amx
) -> str | None:
    return reason(*(t for t in (x, weight, bias, residual, *(norm or ()), dot) if t is not None), amx=amx)


def reason(*tensors: Tensor, amx: bool) -> str | None:
    """Returns why the products cannot take these tensors, or None."""
    if missing := _build.cpp_reason(*tensors):
        return missing
    if amx and not HAS_AMX:
        return "it runs on a processor's tile units (AMX), and this one has none"
    if not amx and not HAS_AVX512:
        return "it runs on a processor with AVX-512, which this one lacks"
    return float32_reason(*tensors)


def float32_reason(*tensors: Tensor) -> str | None:
    """Returns why the float32 products for CPUs cannot take these tensors, or None."""
    if any(t.dtype != torch.float32 for t in tensors) or torch.is_autocast_enabled("cpu"):
        return "it computes in float32"
    if _dispatch.exporting():
        return "an exported graph must run on any processor"
    return None


def declines(x, weight, *_, **__) -> str | None:
    few = min(weight.shape[:2]) < WIDTH or x.shape[:-1].numel() < ROWS
    return f"with fewer than {ROWS} rows, or less than {WIDTH} wide, torch is as fast" if few else None


def spares(x: Tensor) -> bool:
    """Whether linear_act, given `needed`, skips the other rows of features like x."""
    if _dispatch.exporting() or _dispatch.transformed() or _dispatch.forced() not in (None, "amx", "cpp"):
        return False  # first: an exported graph must not ask for the number of rows
    if x.shape[-1] < WIDTH or x.shape[:-1].numel() < ROWS:
        return False
    return any(reason(x, amx=amx) is None for amx in (True, False))


torch.library.define("avadclip_fast::has_amx", "() -> bool")
torch.library.define("avadclip_fast::has_avx512", "() -> bool")
HAS_AMX: bool = not _build.CPP_MISSING and torch.ops.avadclip_fast.has_amx()
HAS_AVX512: bool = not _build.CPP_MISSING and torch.ops.avadclip_fast.has_avx512()
# y: the pre-activation if save_y, else empty (the backward pass then needs nothing, or relu's sign from out)
_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, int dilation, bool causal,"
    " Tensor? lengths, Tensor? needed, Tensor? dot, bool save_y, Tensor? mask, float gain, bool amx{})"
    " -> (Tensor out, Tensor y)"
)
_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor weight, str activation, int dilation, bool causal, Tensor? lengths, Tensor? needed,"
    " Tensor? dot, Tensor kept, bool[] needs, Tensor? mask, float gain, bool amx{}) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("avadclip_fast::linear_act_cpu", _FORWARD.format(""))
torch.library.define("avadclip_fast::linear_act_cpu_backward", _BACKWARD.format(""))
# In C++. high: tile units use only the first 16 of 24 significand bits.
torch.library.define("avadclip_fast::linear_act_tiles", _FORWARD.format(", bool high"))
torch.library.define("avadclip_fast::linear_act_tiles_backward", _BACKWARD.format(", bool high"))


def _high() -> bool:
    """Read at run time, like torch's own matrix products do."""
    # It reflects set_float32_matmul_precision too, whose getter raises once an fp32_precision has been set.
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul.fp32_precision in ("tf32", "bf16")


@torch.library.impl("avadclip_fast::linear_act_cpu", "CPU")
def _(*args):
    return torch.ops.avadclip_fast.linear_act_tiles(*args, _high())


@torch.library.impl("avadclip_fast::linear_act_cpu_backward", "CPU")
def _(*args):
    return torch.ops.avadclip_fast.linear_act_tiles_backward(*args, _high())


@torch.library.register_fake("avadclip_fast::linear_act_cpu")
def _(x, weight, bias, activation, residual, dilation, causal, lengths, needed, dot, save_y, mask, gain, amx):
    shape = (*x.shape[:2], weight.shape[0])
    return x.new_empty(shape if dot is None else shape[:2]), x.new_empty(shape if save_y else 0)


@torch.library.register_fake("avadclip_fast::linear_act_cpu_backward")
def _(grad, x, weight, activation, dilation, causal, lengths, needed, dot, kept, needs, mask, gain, amx):
    bias = weight.new_empty(weight.shape[0])
    return empty_grads(needs, x, weight, bias, bias)  # dot is as long as the bias


def _save(ctx, inputs, output):
    x, weight, _, ctx.activation, _, ctx.dilation, ctx.causal, lengths, needed, dot, save_y, *rest = inputs
    mask, ctx.gain, ctx.amx = rest
    out, y = output
    kept = y if save_y or ctx.activation == "none" else out
    ctx.save_for_backward(x, weight, lengths, needed, dot, kept, mask)


def _backward(ctx, grad):
    x, weight, lengths, needed, dot, kept, mask = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 9)]
    grads = torch.ops.avadclip_fast.linear_act_cpu_backward(
        grad, x, weight, ctx.activation, ctx.dilation, ctx.causal, lengths, needed, dot, kept, needs, mask,
        ctx.gain, ctx.amx,
    )  # fmt: skip
    dx, dw, db, d_dot = wanted(needs, grads)
    residual = grad if ctx.needs_input_grad[4] else None
    return dx, dw, db, None, residual, None, None, None, None, d_dot, None, None, None, None


differentiable("linear_act_cpu", _backward, _save, one_result=True)
differentiable_once("linear_act", "linear_act_cpu_backward")
