"""similarity_graph in Triton: the weights, and products with them. The weights match the reference."""

import torch
from torch import Tensor

from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason

LOWEST = 0.01  # below it, an edge's weight exp(s) is indistinguishable from a missing edge's weight of 1


def similarity_graph(
    features: Tensor, values: Tensor, lengths: Tensor, threshold: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    if weights is None:
        weights = torch.ops.avadclip_fast.similarity_weights(features, lengths, threshold)[0]
    return torch.ops.avadclip_fast.similarity_product(weights, values, lengths), weights


def supports(features: Tensor, values: Tensor, lengths: Tensor, threshold: float, weights: Tensor | None) -> str | None:
    if threshold < LOWEST:
        return f"it takes thresholds from {LOWEST}, not {threshold}"
    if weights is not None and weights.dtype != torch.float32:
        return f"it takes weights of float32, not {weights.dtype}"
    return triton_reason(features, values)


torch.library.define(
    "avadclip_fast::similarity_weights",
    "(Tensor features, Tensor lengths, float threshold) -> (Tensor weights, Tensor norms, Tensor sums)",
)
torch.library.define(
    "avadclip_fast::similarity_weights_backward",
    "(Tensor grad, Tensor features, Tensor lengths, Tensor weights, Tensor norms, Tensor sums, float threshold)"
    " -> Tensor",
)
torch.library.define("avadclip_fast::similarity_product", "(Tensor weights, Tensor values, Tensor lengths) -> Tensor")
torch.library.define(
    "avadclip_fast::similarity_product_backward",
    "(Tensor grad, Tensor weights, Tensor values, Tensor lengths) -> (Tensor, Tensor)",
)

implement("similarity_weights", "similarity_graph", "forward")
implement("similarity_weights_backward", "similarity_graph", "backward")
implement("similarity_product", "similarity_graph", "mix")
implement("similarity_product_backward", "similarity_graph", "mix_backward")


@torch.library.register_fake("avadclip_fast::similarity_weights")
def _(features, lengths, threshold):
    batch, rows, _ = features.shape
    norms = features.new_empty(batch, rows, dtype=torch.float32)
    return features.new_empty(batch, rows, rows, dtype=torch.float32), norms, torch.empty_like(norms)


@torch.library.register_fake("avadclip_fast::similarity_weights_backward")
def _(grad, features, lengths, weights, norms, sums, threshold):
    return features.new_empty(features.shape)


@torch.library.register_fake("avadclip_fast::similarity_product")
def _(weights, values, lengths):
    return values.new_empty(values.shape)


@torch.library.register_fake("avadclip_fast::similarity_product_backward")
def _(grad, weights, values, lengths):
    return weights.new_empty(weights.shape), values.new_empty(values.shape)


def _save(ctx, inputs, output):
    features, lengths, ctx.threshold = inputs
    ctx.save_for_backward(features, lengths, *output)


def _backward(ctx, grad):
    grad = torch.ops.avadclip_fast.similarity_weights_backward(grad, *ctx.saved_tensors, ctx.threshold)
    return grad, None, None


def _save_product(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _product_backward(ctx, grad):
    return *torch.ops.avadclip_fast.similarity_product_backward(grad, *ctx.saved_tensors), None


differentiable("similarity_weights", _backward, _save, one_result=True)
differentiable("similarity_product", _product_backward, _save_product)
differentiable_once("similarity_graph", "similarity_weights_backward")
differentiable_once("similarity_graph", "similarity_product_backward")
