"""Casts a model's weights to autocast's dtype once per step, all of them together.

Autocast casts each where it is used, and its gradient back: two kernels each, most shorter than the gaps between them.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _autocast

# What stays float32 besides norms: the text side, which runs on a stream of its own, factors of weight norm, and a bias
# that is added to float32 logits.
KEPT = re.compile(r"text\..*|.*\.weight_[gv]|classifier\.bias")


class Lowered(torch.autograd.Function):
    """(dtype, *weights) -> their copies in that dtype; the gradients come back in the weights' dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(copied(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(copied([g for g in grads if g is not None], ctx.dtype))
        return None, *(None if g is None else next(found) for g in grads)


def copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of the tensors in another dtype, many per launch."""
    rows = [x.reshape(-1) for x in tensors]  # torch goes one by one if a single tensor's strides are not its copy's
    copies = [torch.empty_like(x, dtype=dtype) for x in rows]
    if copies:
        torch._foreach_copy_(copies, rows)
    return [copy.view(x.shape) for copy, x in zip(copies, tensors, strict=True)]


def lowered_weights(model: nn.Module, device: str) -> dict[str, Tensor]:
    """The float32 weights by name in autocast's dtype, for `torch.func.functional_call`; none on a CPU.

    Call it under autocast. A CPU's products cast their inputs themselves. A model of torch.compile is left alone: it
    fuses its casts, and would recompile because the tensors are new in every step.
    """
    compiled = hasattr(model, "_orig_mod")
    if device not in _autocast.LOWERING or not torch.is_autocast_enabled(device) or compiled:
        return {}
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.LayerNorm))
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype == torch.float32 and not name.startswith(norms) and not KEPT.fullmatch(name)
    }
    if not chosen:
        return {}
    return dict(zip(chosen, Lowered.apply(torch.get_autocast_dtype(device), *chosen.values()), strict=True))
