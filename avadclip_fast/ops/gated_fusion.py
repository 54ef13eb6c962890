"""gated_fusion: gated audio-visual fusion."""

from functools import partial

import torch
from torch import Tensor

from .. import reference
from . import _dispatch, _linear_act_cpu
from ._autocast import as_autocast
from ._check import check_lengths, check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import declines_exact, implement, triton_reason

# Rows are independent: only the products on a processor make use of `needed`.


def _reference(*tensors: Tensor, needed: Tensor | None = None) -> Tensor:
    return reference.gated_fusion(*tensors)


def _triton(visual: Tensor, audio: Tensor, *weights: Tensor, needed: Tensor | None = None) -> Tensor:
    weights = as_autocast(*weights)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (visual, audio, *weights))
    return torch.ops.avadclip_fast.gated_fusion(visual, audio, *weights, save)[0]


def _triton_supports(*tensors: Tensor, needed: Tensor | None = None) -> str | None:
    return triton_reason(*tensors)


def _triton_declines(visual: Tensor, audio: Tensor, gate_weight: Tensor, *_: Tensor, **__: Tensor | None) -> str | None:
    return declines_exact(gate_weight)


def _cpu(visual: Tensor, audio: Tensor, *weights: Tensor, needed: Tensor | None = None, amx: bool) -> Tensor:
    gate, hidden, residual = weights[:2], weights[2:4], weights[4:]  # weight and bias of each

    def linear(activation: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rest = (None, None, 1, False, None, None, None, needed)
        return _linear_act_cpu.linear_act(x, weight, bias, activation, *rest, amx=amx)

    z = torch.cat([visual, audio], dim=-1)
    added = linear("none", linear("gelu", z, *hidden), *residual)
    return torch.addcmul(visual, linear("none", z, *gate).sigmoid(), added)


def _cpu_supports(*tensors: Tensor, needed: Tensor | None = None, amx: bool) -> str | None:
    return _linear_act_cpu.reason(*tensors, amx=amx)


def _cpu_declines(visual: Tensor, audio: Tensor, gate_weight: Tensor, *_: Tensor, **__: Tensor | None) -> str | None:
    return _linear_act_cpu.declines(visual, gate_weight)


_dispatch.register("gated_fusion", "reference", _reference)
_dispatch.register("gated_fusion", "triton", _triton, _triton_supports, _triton_declines)
for _backend, _amx in (("amx", True), ("cpp", False)):
    _dispatch.register(
        "gated_fusion", _backend, partial(_cpu, amx=_amx), partial(_cpu_supports, amx=_amx), _cpu_declines
    )

# With `save`, each is (B·T, D): gate, hidden after GELU, y (hidden before GELU) and r (the residual that is gated).
torch.library.define(
    "avadclip_fast::gated_fusion",
    "(Tensor visual, Tensor audio, Tensor gate_weight, Tensor gate_bias, Tensor hidden_weight, Tensor hidden_bias,"
    " Tensor residual_weight, Tensor residual_bias, bool save)"
    " -> (Tensor out, Tensor gate, Tensor hidden, Tensor y, Tensor r)",
)
torch.library.define(
    "avadclip_fast::gated_fusion_backward",
    "(Tensor grad, Tensor visual, Tensor audio, Tensor gate_weight, Tensor hidden_weight, Tensor residual_weight,"
    " Tensor gate, Tensor hidden, Tensor y, Tensor r)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

implement("gated_fusion", "gated_fusion", "forward")
implement("gated_fusion_backward", "gated_fusion", "backward")


@torch.library.register_fake("avadclip_fast::gated_fusion")
def _(visual, audio, gate_weight, gate_bias, hidden_weight, hidden_bias, residual_weight, residual_bias, save):
    out = visual.new_empty(visual.shape, dtype=torch.promote_types(visual.dtype, gate_weight.dtype))
    saved = (visual.shape[:-1].numel(), visual.shape[-1]) if save else 0
    return out, *(gate_weight.new_empty(saved) for _ in range(4))


@torch.library.register_fake("avadclip_fast::gated_fusion_backward")
def _(grad, visual, audio, gate_weight, hidden_weight, residual_weight, gate, hidden, y, r):
    bias = gate_weight.shape[:1]
    return (
        visual.new_empty(visual.shape),
        audio.new_empty(audio.shape),
        *(w.new_empty(s) for w in (gate_weight, hidden_weight, residual_weight) for s in (w.shape, bias)),
    )


def _save(ctx, inputs, output):
    visual, audio, gate_weight, _, hidden_weight, _, residual_weight, _, _ = inputs
    ctx.save_for_backward(visual, audio, gate_weight, hidden_weight, residual_weight, *output[1:])


def _backward(ctx, grad):
    return *torch.ops.avadclip_fast.gated_fusion_backward(grad, *ctx.saved_tensors), None


differentiable("gated_fusion", _backward, _save, one_result=True)
differentiable_once("gated_fusion", "gated_fusion_backward")


def gated_fusion(
    visual: Tensor,
    audio: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    residual_weight: Tensor,
    residual_bias: Tensor,
    needed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Adds a gated audio-visual residual to each visual feature (arXiv 2504.04495, eq. 1-3).

        z = [v | a],   W = sigmoid(Wg z + bg),   R = Wr GELU(Wh z + bh) + br,   out = v + W ⊙ R

    visual, audio: (B, T, D) floating point
    gate_weight, hidden_weight: (D, 2D), the visual half first; gate_bias, hidden_bias: (D,)
    residual_weight: (D, D); residual_bias: (D,)
    needed: (B,) int or None; rows t >= needed[b] of the result mean nothing, and a backend may leave them out
    Returns (B, T, D) in the inputs' dtype.
    Raises ValueError on invalid shapes, dtypes, devices or `needed`.
    Precision: products in the inputs' dtype, or in autocast's. Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors(
        "gated_fusion",
        ("visual", visual, "B T D"),
        ("audio", audio, "B T D"),
        ("gate_weight", gate_weight, "D 2D"),
        ("gate_bias", gate_bias, "D"),
        ("hidden_weight", hidden_weight, "D 2D"),
        ("hidden_bias", hidden_bias, "D"),
        ("residual_weight", residual_weight, "D D"),
        ("residual_bias", residual_bias, "D"),
    )
    check_lengths("gated_fusion", needed, sizes["B"], sizes["T"], visual.device, name="needed lengths")
    weights = gate_weight, gate_bias, hidden_weight, hidden_bias, residual_weight, residual_bias
    return _dispatch.run("gated_fusion", backend, visual, audio, *weights, needed=needed)
