"""similarity_graph in C++ for the CPU. Its weights match the reference: (B, T, T), normalised."""

import torch
from torch import Tensor

from .. import _build
from ._derivatives import differentiable, differentiable_once


def similarity_graph(
    features: Tensor, values: Tensor, lengths: Tensor, threshold: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    if weights is None:
        out, weights, _ = torch.ops.avadclip_fast.similarity_graph(features, values, lengths, threshold)
        return out, weights
    return torch.ops.avadclip_fast.similarity_mix(weights, values, lengths), weights


def supports(features: Tensor, values: Tensor, lengths: Tensor, threshold: float, weights: Tensor | None) -> str | None:
    kept = torch.float64 if features.dtype == torch.float64 else torch.float32
    if weights is not None and weights.dtype != kept:
        return f"it takes weights of {kept}, not {weights.dtype}"
    return _build.cpp_reason(features, values)


torch.library.define(
    "avadclip_fast::similarity_graph",
    "(Tensor features, Tensor values, Tensor lengths, float threshold) -> (Tensor out, Tensor weights, Tensor cosines)",
)
torch.library.define(
    "avadclip_fast::similarity_graph_backward",
    "(Tensor grad, Tensor? grad_weights, Tensor features, Tensor values, Tensor weights, Tensor cosines,"
    " Tensor lengths, float threshold) -> (Tensor, Tensor)",
)
torch.library.define("avadclip_fast::similarity_mix", "(Tensor weights, Tensor values, Tensor lengths) -> Tensor")
torch.library.define(
    "avadclip_fast::similarity_mix_backward",
    "(Tensor grad, Tensor weights, Tensor values, Tensor lengths) -> (Tensor, Tensor)",
)


@torch.library.register_fake("avadclip_fast::similarity_graph")
def _(features, values, lengths, threshold):
    batch, rows, _ = features.shape
    kept = torch.float64 if features.dtype == torch.float64 else torch.float32
    weights = features.new_empty(batch, rows, rows, dtype=kept)
    return values.new_empty(values.shape), weights, torch.empty_like(weights)


@torch.library.register_fake("avadclip_fast::similarity_graph_backward")
def _(grad, grad_weights, features, values, weights, cosines, lengths, threshold):
    return features.new_empty(features.shape), values.new_empty(values.shape)


@torch.library.register_fake("avadclip_fast::similarity_mix")
def _(weights, values, lengths):
    return values.new_empty(values.shape)


@torch.library.register_fake("avadclip_fast::similarity_mix_backward")
def _(grad, weights, values, lengths):
    return weights.new_empty(weights.shape), values.new_empty(values.shape)


def _save(ctx, inputs, output):
    features, values, lengths, ctx.threshold = inputs
    _, weights, cosines = output
    ctx.set_materialize_grads(False)  # weights used only once get no gradient
    ctx.save_for_backward(features, values, weights, cosines, lengths)


def _backward(ctx, grad, grad_weights, _):
    features, values, weights, cosines, lengths = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(values)
    slopes = torch.ops.avadclip_fast.similarity_graph_backward(
        grad, grad_weights, features, values, weights, cosines, lengths, ctx.threshold
    )
    return *slopes, None, None


def _save_mix(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mix_backward(ctx, grad):
    return *torch.ops.avadclip_fast.similarity_mix_backward(grad, *ctx.saved_tensors), None


differentiable("similarity_graph", _backward, _save)
differentiable("similarity_mix", _mix_backward, _save_mix)
differentiable_once("similarity_graph", "similarity_graph_backward")
differentiable_once("similarity_graph", "similarity_mix_backward")
