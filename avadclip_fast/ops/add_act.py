"""add_act: a sum and the activation that follows it."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason


def _triton(x: Tensor, residual: Tensor, activation: str) -> Tensor:
    return torch.ops.avadclip_fast.add_act(x, residual, activation)


_dispatch.register("add_act", "reference", reference.add_act)
_dispatch.register("add_act", "triton", _triton, lambda x, residual, _: triton_reason(x, residual))

torch.library.define("avadclip_fast::add_act", "(Tensor x, Tensor residual, str activation) -> Tensor")
# x: the op's, or without residual its result, of which ReLU needs no more
torch.library.define(
    "avadclip_fast::add_act_backward", "(Tensor grad, Tensor x, Tensor? residual, str activation) -> Tensor"
)

implement("add_act", "add_act", "forward")
implement("add_act_backward", "add_act", "backward")


@torch.library.register_fake("avadclip_fast::add_act")
def _(x, residual, activation):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@torch.library.register_fake("avadclip_fast::add_act_backward")
def _(grad, x, residual, activation):
    return grad.new_empty(grad.shape)


def _save(ctx, inputs, output):
    x, residual, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, residual.dtype
    kept = {"none": (None, None), "relu": (output, None)}
    ctx.save_for_backward(*kept.get(ctx.activation, (x, residual)))


def _backward(ctx, grad):
    if grad is None:
        return None, None, None
    if ctx.activation != "none":
        grad = torch.ops.avadclip_fast.add_act_backward(grad, *ctx.saved_tensors, ctx.activation)
    return *(grad.to(dtype) for dtype in ctx.dtypes), None


differentiable("add_act", _backward, _save)
differentiable_once("add_act", "add_act_backward")


def add_act(x: Tensor, residual: Tensor, activation: str, backend: str | None = None) -> Tensor:
    """Adds a residual, then activates: the end of layers of that order (the audio TCN of arXiv 2504.04495).

        out = act(x + residual)

    `linear_act` adds its residual after the activation.

    x, residual: (B, T, D) floating point
    activation: "none", "relu", "gelu" (erf) or "quick_gelu" (y·sigmoid(1.702 y))
    Returns (B, T, D) in the inputs' dtype; under autocast, where dtypes may differ, in the widest.
    Raises ValueError on invalid shapes, dtypes, devices or activation names.
    Precision: float32 on a GPU, the inputs' dtype in the reference. Deterministic. Backends: see `avadclip-fast env`.
    """
    check_tensors("add_act", ("x", x, "B T D"), ("residual", residual, "B T D"))
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"add_act: activation must be one of {known}; got {activation!r}")
    return _dispatch.run("add_act", backend, x, residual, activation)
