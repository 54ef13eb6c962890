"""LayerNorm before products: on Triton, rows are normalised in float32 and written in the dtype of the product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.linear_act import LAYER_NORM_EPS
from . import _dispatch
from ._autocast import product_dtype
from ._derivatives import differentiable, differentiable_once, empty_grads, wanted
from ._triton import implement, triton_reason

torch.library.define(
    "avadclip_fast::layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, ScalarType dtype) -> (Tensor out, Tensor stats)",
)
torch.library.define(
    "avadclip_fast::layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor stats, bool[] needs) -> (Tensor, Tensor, Tensor)",
)

implement("layer_norm", "layer_norm", "forward")
implement("layer_norm_backward", "layer_norm", "backward")


@torch.library.register_fake("avadclip_fast::layer_norm")
def _(x, weight, bias, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(2, x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.register_fake("avadclip_fast::layer_norm_backward")
def _(grad, x, weight, stats, needs):
    return empty_grads(needs, x, weight, weight)


def _save(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.avadclip_fast.layer_norm_backward(grad, *ctx.saved_tensors, needs)
    return *wanted(needs, grads), None


differentiable("layer_norm", _backward, _save, one_result=True)
differentiable_once("linear_act", "layer_norm_backward")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) · weight + bias over the last dimension, in the dtype of its products.

    backend: as for an op; torch serves what Triton does not.
    """
    dtype, asked = product_dtype(x), backend or _dispatch.forced()
    if asked not in _dispatch.TABLE["linear_act"]:
        asked = None  # it has no say here
    if asked in (None, "triton") and not _dispatch.transformed() and triton_reason(x, weight, bias) is None:
        return torch.ops.avadclip_fast.layer_norm(x, weight, bias, dtype)[0]
    # A processor's takes wider parameters than its rows, and no narrower ones.
    scale, shift = (p.to(torch.promote_types(p.dtype, x.dtype)) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], scale, shift, LAYER_NORM_EPS).to(dtype)
