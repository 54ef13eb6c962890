"""Halves of a pre-norm block on Triton, each one operator where gradients are wanted: fewer passes over their rows.

    residual_attention:  out = x + attention(LayerNorm(x)),  whose keys are LayerNorm(x) itself
    residual_mlp:        out = x + W2 QuickGELU(W1 LayerNorm(x) + b1) + b2

If `fused` is False, the modules compute the same with the public operators.
"""

import torch
from torch import Tensor

from . import _dispatch
from ._autocast import as_autocast
from ._check import check_lengths, check_needed, check_tensors, leading
from ._derivatives import differentiable, differentiable_once, empty_grads, wanted
from ._triton import implement

torch.library.define(
    "avadclip_fast::residual_attention",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, SymInt window, Tensor? lengths)"
    " -> (Tensor out, Tensor keys, Tensor stats, Tensor mixed)",
)
torch.library.define(
    "avadclip_fast::residual_attention_backward",
    "(Tensor grad, Tensor x, Tensor norm_weight, Tensor weight, SymInt window, Tensor? lengths, Tensor keys,"
    " Tensor stats, Tensor mixed, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "avadclip_fast::residual_mlp",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc_weight, Tensor fc_bias, Tensor proj_weight,"
    " Tensor proj_bias) -> (Tensor out, Tensor normed, Tensor stats, Tensor y, Tensor hidden)",
)
torch.library.define(
    "avadclip_fast::residual_mlp_backward",
    "(Tensor grad, Tensor x, Tensor norm_weight, Tensor fc_weight, Tensor proj_weight, Tensor normed, Tensor stats,"
    " Tensor y, Tensor hidden, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

implement("residual_attention", "residual_block", "attention")
implement("residual_attention_backward", "residual_block", "attention_backward")
implement("residual_mlp", "residual_block", "mlp")
implement("residual_mlp_backward", "residual_block", "mlp_backward")


def _stats(x: Tensor) -> Tensor:
    return x.new_empty(2, x.shape[:-1].numel(), dtype=torch.float32)


def _out(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))


@torch.library.register_fake("avadclip_fast::residual_attention")
def _(x, norm_weight, norm_bias, weight, bias, window, lengths):
    keys = x.new_empty(x.shape, dtype=weight.dtype)
    return _out(x, weight), keys, _stats(x), keys.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("avadclip_fast::residual_attention_backward")
def _(grad, x, norm_weight, weight, window, lengths, keys, stats, mixed, needs):
    return empty_grads(needs, x, norm_weight, norm_weight, weight, weight[:, 0])


@torch.library.register_fake("avadclip_fast::residual_mlp")
def _(x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias):
    normed, count = x.new_empty(x.shape, dtype=fc_weight.dtype), x.shape[:-1].numel()
    y, hidden = normed.new_empty(1, count, fc_weight.shape[0]), normed.new_empty(*x.shape[:-1], fc_weight.shape[0])
    return _out(x, fc_weight), normed, _stats(x), y, hidden


@torch.library.register_fake("avadclip_fast::residual_mlp_backward")
def _(grad, x, norm_weight, fc_weight, proj_weight, normed, stats, y, hidden, needs):
    linear = (fc_weight, fc_weight[:, 0], proj_weight, proj_weight[:, 0])
    return empty_grads(needs, x, norm_weight, norm_weight, *linear)


def _save_attention(ctx, inputs, output):
    x, norm_weight, _, weight, _, ctx.window, lengths = inputs
    ctx.save_for_backward(x, norm_weight, weight, lengths, *output[1:])


def _attention_backward(ctx, grad):
    x, norm_weight, weight, lengths, *inner = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.avadclip_fast.residual_attention_backward(
        grad, x, norm_weight, weight, ctx.window, lengths, *inner, needs
    )
    return *wanted(needs, grads), None, None


def _save_mlp(ctx, inputs, output):
    x, norm_weight, _, fc_weight, _, proj_weight, _ = inputs
    ctx.save_for_backward(x, norm_weight, fc_weight, proj_weight, *output[1:])


def _mlp_backward(ctx, grad):
    needs = list(ctx.needs_input_grad)
    grads = torch.ops.avadclip_fast.residual_mlp_backward(grad, *ctx.saved_tensors, needs)
    return wanted(needs, grads)


differentiable("residual_attention", _attention_backward, _save_attention, one_result=True)
differentiable_once("residual_attention", "residual_attention_backward")
differentiable("residual_mlp", _mlp_backward, _save_mlp, one_result=True)
differentiable_once("residual_mlp", "residual_mlp_backward")


def residual_attention(
    x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, window: int, lengths: Tensor | None
) -> Tensor:
    """x + single-head window attention over the rows LayerNorm(x), which are their own keys.

    x: (B, T, D); norm: weight and bias, (D,) each; weight: (2D, D) and bias: (2D,) of the queries, then the values
    window: at most `longest` for the products' dtype
    lengths: (B,) int, to exclude keys, or None
    """
    sizes = check_tensors("residual_attention", ("x", x, "B T D"), ("norm", norm[0], "D"))
    check_lengths("residual_attention", lengths, sizes["B"], sizes["T"], x.device)
    operator, learned = torch.ops.avadclip_fast.residual_attention, as_autocast(weight, bias)
    return _dispatch.ranged("residual_attention:triton", operator, x, *norm, *learned, window, lengths)[0]


def residual_mlp(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc: tuple[Tensor, Tensor],
    proj: tuple[Tensor, Tensor],
    needed: Tensor | None = None,
) -> Tensor:
    """x + MLP(LayerNorm(x)). x: [..., D]; norm, fc and proj: weight and bias, fc's (4D, D) and proj's (D, 4D).

    needed: as for linear_act; all rows are computed
    """
    sizes = (("norm", norm[0], "D"), ("fc", fc[0], "H D"), ("proj", proj[0], "D H"))
    check_tensors("residual_mlp", ("x", x, f"{leading(x)} D"), *sizes)
    check_needed("residual_mlp", needed, x)
    operator, learned = torch.ops.avadclip_fast.residual_mlp, as_autocast(*fc, *proj)
    return _dispatch.ranged("residual_mlp:triton", operator, x, *norm, *learned)[0]
