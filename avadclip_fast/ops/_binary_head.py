"""The binary head on Triton as one operator, where gradients are wanted.

out = <QuickGELU(x Wᵀ + b), dot> + <x, direct>
"""

import torch
from torch import Tensor

from . import _dispatch
from ._autocast import as_autocast
from ._check import check_needed, check_tensors, leading
from ._derivatives import differentiable, differentiable_once, empty_grads, wanted
from ._triton import implement

torch.library.define(
    "avadclip_fast::binary_head",
    "(Tensor x, Tensor weight, Tensor bias, Tensor dot, Tensor direct) -> (Tensor out, Tensor y)",
)
torch.library.define(
    "avadclip_fast::binary_head_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor dot, Tensor direct, Tensor y, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

implement("binary_head", "binary_head", "forward")
implement("binary_head_backward", "binary_head", "backward")


@torch.library.register_fake("avadclip_fast::binary_head")
def _(x, weight, bias, dot, direct):
    return x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1].numel(), weight.shape[0])


@torch.library.register_fake("avadclip_fast::binary_head_backward")
def _(grad, x, weight, dot, direct, y, needs):
    return empty_grads(needs, x, weight, weight[:, 0], dot, direct)


def _save(ctx, inputs, output):
    x, weight, _, dot, direct = inputs
    ctx.save_for_backward(x, weight, dot, direct, output[1])


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad)
    grads = torch.ops.avadclip_fast.binary_head_backward(grad, *ctx.saved_tensors, needs)
    return wanted(needs, grads)


differentiable("binary_head", _backward, _save, one_result=True)
differentiable_once("binary_head", "binary_head_backward")


def binary_head(
    x: Tensor, weight: Tensor, bias: Tensor, dot: Tensor, direct: Tensor, needed: Tensor | None = None
) -> Tensor:
    """x: [..., D]; weight: (N, D); bias, dot: (N,); direct: (D,) -> [...].

    needed: as for linear_act; all rows are computed
    """
    check_tensors("binary_head", ("x", x, f"{leading(x)} D"), ("weight", weight, "N D"), ("direct", direct, "D"))
    check_needed("binary_head", needed, x)
    operator, arguments = torch.ops.avadclip_fast.binary_head, as_autocast(x, weight, bias, dot, direct)
    return _dispatch.ranged("binary_head:triton", operator, *arguments)[0]
