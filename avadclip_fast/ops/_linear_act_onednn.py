"""linear_act by oneDNN, for float32: with few rows its products are faster than those of torch's BLAS."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.linear_act import LAYER_NORM_EPS, epilogue
from ._derivatives import differentiable
from ._linear_act_cpu import float32_reason

WIDTH = 512  # in a narrower layer torch is as fast
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_act(
    x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot=None, dropout=None, needed=None
) -> Tensor:
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm[0], norm[1], LAYER_NORM_EPS)
    y = torch.ops.avadclip_fast.linear_act_onednn(x, weight, bias)
    return epilogue(y, activation, dropout, residual, dot)


def supports(x, weight, bias, activation, residual, norm, *_, **__) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on a processor, and a tensor is on {x.device}"
    if not HAS_ONEDNN:
        return "this torch comes without oneDNN"
    if weight.ndim == 3:
        return "it has no convolutions"
    return float32_reason(*(t for t in (x, weight, bias, residual, *(norm or ())) if t is not None))


def declines(x, weight, *_, **__) -> str | None:
    return f"in layers less than {WIDTH} wide, torch is as fast" if min(weight.shape) < WIDTH else None


torch.library.define("avadclip_fast::linear_act_onednn", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("avadclip_fast::linear_act_onednn", "CPU")
def _(x, weight, bias):
    if x.numel() == 0:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # it is read without its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("avadclip_fast::linear_act_onednn")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    rows, known = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (grad, x))
    return (
        torch.ops.avadclip_fast.linear_act_onednn(grad, weight.T, None) if ctx.needs_input_grad[0] else None,
        rows.T @ known if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


differentiable("linear_act_onednn", _backward, _save)
