"""linear_act: a linear layer or k-tap temporal convolution with LayerNorm, activation and residual."""

from functools import partial

import torch
from torch import Tensor

from .. import reference
from . import _dispatch, _linear_act_cpu, _linear_act_onednn
from ._check import REAL, check_are_tensors, check_counts, check_lengths, check_needed, check_tensors, leading
from ._derivatives import differentiable, differentiable_once, empty_grads, wanted
from ._layer_norm import layer_norm
from ._padding import zero_padding
from ._triton import declines_exact, implement, triton_reason


def _reference(
    x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot=None, dropout=None, needed=None
) -> Tensor:
    return reference.linear_act(x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot, dropout)


def _triton(
    x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot=None, dropout=None, needed=None
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # like torch's own layers; norm and residual keep their dtype
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias, dot = (None if t is None else t.to(dtype) for t in (weight, bias, dot))
        x = x if norm is not None else x.to(dtype)
    if norm is not None:  # a convolution's padding may hold NaN, which a gradient of 0 does not undo
        h = zero_padding(x, lengths) if weight.ndim == 3 else x
        x = layer_norm(h, norm[0], norm[1], backend="triton")
    save_y = _linear_act_cpu.saves_y(activation, residual, dot, x, weight, bias, residual)
    return torch.ops.avadclip_fast.linear_act(
        x, weight, bias, activation, residual, dilation, causal, lengths, dot, save_y,
        *_linear_act_cpu.mask_and_gain(dropout),
    )[0]  # fmt: skip


def _supports(
    x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot=None, dropout=None, needed=None
) -> str | None:
    if x.shape[-1] == 0:
        return "it multiplies, and there are no inputs"
    tensors = (x, weight, bias, residual, *(norm or ()), dot)
    return triton_reason(*(t for t in tensors if t is not None))


_dispatch.register("linear_act", "reference", _reference)
_dispatch.register("linear_act", "triton", _triton, _supports, lambda x, weight, *_, **__: declines_exact(weight))
for _backend, _amx in (("amx", True), ("cpp", False)):
    _dispatch.register(
        "linear_act",
        _backend,
        partial(_linear_act_cpu.linear_act, amx=_amx),
        partial(_linear_act_cpu.supports, amx=_amx),
        _linear_act_cpu.declines,
    )
_dispatch.register(
    "linear_act",
    "onednn",
    _linear_act_onednn.linear_act,
    _linear_act_onednn.supports,
    _linear_act_onednn.declines,
)

# y: the pre-activation if save_y, else empty (the backward pass then needs nothing, or relu's sign from out).
torch.library.define(
    "avadclip_fast::linear_act",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, int dilation, bool causal,"
    " Tensor? lengths, Tensor? dot, bool save_y, Tensor? mask, float gain) -> (Tensor out, Tensor y)",
)
torch.library.define(
    "avadclip_fast::linear_act_backward",
    "(Tensor grad, Tensor x, Tensor weight, str activation, int dilation, bool causal, Tensor? lengths, Tensor? dot,"
    " Tensor y, bool[] needs, Tensor? mask, float gain) -> (Tensor, Tensor, Tensor, Tensor)",
)

implement("linear_act", "linear_act", "forward")
implement("linear_act_backward", "linear_act", "backward")


@torch.library.register_fake("avadclip_fast::linear_act")
def _(x, weight, bias, activation, residual, dilation, causal, lengths, dot, save_y, mask, gain):
    outputs = weight.shape[0]
    dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
    shape = x.shape[:-1] if dot is not None else (*x.shape[:-1], outputs)
    videos, rows = (x.shape[0], x.shape[1]) if weight.ndim == 3 else (1, x.shape[:-1].numel())
    return weight.new_empty(shape, dtype=dtype), weight.new_empty((videos, rows, outputs) if save_y else 0)


@torch.library.register_fake("avadclip_fast::linear_act_backward")
def _(grad, x, weight, activation, dilation, causal, lengths, dot, y, needs, mask, gain):
    bias = weight.new_empty(weight.shape[0])
    return empty_grads(needs, x, weight, bias, bias)  # dot is as long as the bias


def _save(ctx, inputs, output):
    x, weight, _, ctx.activation, _, ctx.dilation, ctx.causal, lengths, dot, save_y, mask, ctx.gain = inputs
    out, y = output
    kept = y if save_y or ctx.activation == "none" else out
    told = ctx.activation == "relu" and not save_y  # by `out`, which is 0 where something is dropped
    ctx.save_for_backward(x, weight, lengths, dot, kept, None if told else mask)


def _backward(ctx, grad):
    x, weight, lengths, dot, y, mask = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 8)]
    grads = torch.ops.avadclip_fast.linear_act_backward(
        grad, x, weight, ctx.activation, ctx.dilation, ctx.causal, lengths, dot, y, needs, mask, ctx.gain
    )
    dx, dw, db, d_dot = wanted(needs, grads)
    residual = grad if ctx.needs_input_grad[4] else None
    return dx, dw, db, None, residual, None, None, None, d_dot, None, None, None


differentiable("linear_act", _backward, _save, one_result=True)
differentiable_once("linear_act", "linear_act_backward")


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    dilation: int = 1,
    causal: bool = False,
    lengths: Tensor | None = None,
    dot: Tensor | None = None,
    dropout: tuple[Tensor, float] | None = None,
    needed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm, linear layer or temporal convolution in [B, T, D] layout, activation, dropout and residual.

        h_t = LayerNorm(x_t) if norm else x_t
        y_t = sum_k W[:, :, k] h_(t + (k - K//2)·dilation) + b         (causal: k - K + 1 in place of k - K//2)
        out = act(y) ⊙ kept / (1 - p) + residual;   with dot: out = <act(y), dot>

    x: (B, T, I) floating point; any leading shape if the weight is a matrix
    weight: (O, I) for a linear layer, or (O, I, K) for a convolution of K taps, zero-padded outside the video
    bias: (O,) or None
    activation: "none", "relu", "gelu" (erf) or "quick_gelu" (y·sigmoid(1.702 y))
    residual: (B, T, O) or None, added after the activation
    norm: LayerNorm weight and bias, each (I,), eps 1e-5, or None
    dilation, causal: of the convolution; causal pads on the left only
    lengths: (B,) int or None; a convolution sees zeros at t >= lengths[b]; a linear layer ignores it
    dot: (O,) or None; reduces each row of act(y) to one number and excludes `residual` and `dropout`
    dropout: (kept, p) or None; kept (B, T, O) bool is False for dropped elements, 0 <= p <= 1 is their share
    needed: (B,) int or None; rows t >= needed[b] of the result mean nothing, and a backend may leave them out
    Returns (B, T, O), or (B, T) with dot, in x's dtype; under autocast in autocast's, or the residual's if wider.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or activation names.
    Precision: LayerNorm in float32 (float64); products in x's dtype, or in autocast's.
    Deterministic; in cuDNN only with `torch.backends.cudnn.deterministic`. Backends: see `avadclip-fast env`.
    """
    check_are_tensors("linear_act", x=x, weight=weight)
    if norm is not None and not (isinstance(norm, tuple) and len(norm) == 2):
        raise ValueError(f"linear_act: norm must be (weight, bias) of the LayerNorm, or None, got {norm!r}")
    shape = leading(x)
    sizes = check_tensors(
        "linear_act",
        ("x", x, f"{shape} I"),
        ("weight", weight, "O I" if weight.ndim == 2 else "O I K"),
        ("bias", bias, "O"),
        ("residual", residual, f"{shape} O"),
        ("dot", dot, "O"),
        *(() if norm is None else (("norm weight", norm[0], "I"), ("norm bias", norm[1], "I"))),
        optional=("bias", "residual", "dot"),
    )
    check_counts("linear_act", dilation=dilation)
    if not isinstance(causal, bool):
        raise ValueError(f"linear_act: causal must be True or False, got {causal!r}")
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"linear_act: activation must be one of {known}; got {activation!r}")
    if dot is not None and (residual is not None or dropout is not None):
        raise ValueError("linear_act: residual and dropout must be None where dot is given")
    if dropout is not None:
        _check_dropout(dropout, (*x.shape[:-1], weight.shape[0]), x.device)
    if weight.ndim == 3:
        if x.ndim != 3:
            raise ValueError(f"linear_act: a convolution takes x of shape [B, T, I], got {list(x.shape)}")
        if weight.numel() == 0:  # PyTorch's has no result of the right shape
            raise ValueError(f"linear_act: a convolution's weight must not be empty, got {list(weight.shape)}")
        check_lengths("linear_act", lengths, sizes["B"], sizes["T"], x.device)
    check_needed("linear_act", needed, x)
    return _dispatch.run(
        "linear_act", backend, x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot, dropout,
        needed,
    )  # fmt: skip


def _check_dropout(dropout: tuple[Tensor, float], shape: tuple[int, ...], device: torch.device) -> None:
    if not (isinstance(dropout, tuple) and len(dropout) == 2):
        raise ValueError(f"linear_act: dropout must be (kept, p), or None, got {dropout!r}")
    kept, p = dropout
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        kind = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise ValueError(f"linear_act: kept of dropout must be a bool tensor, got {kind}")
    if kept.shape != shape:
        raise ValueError(f"linear_act: kept of dropout must have shape {list(shape)}, got {list(kept.shape)}")
    if kept.device != device:
        raise ValueError(f"linear_act: kept of dropout is on {kept.device}, but x is on {device}")
    if not isinstance(p, REAL) or not 0 <= p <= 1:
        raise ValueError(f"linear_act: p of dropout must lie in 0..1, got {p!r}")
