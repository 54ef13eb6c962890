"""attention_pool: the global video feature of the audio-visual prompt."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_lengths, check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason


def _triton(features: Tensor, logits: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.ops.avadclip_fast.attention_pool(features, logits, lengths)[0]


_dispatch.register("attention_pool", "reference", without_autocast(reference.attention_pool))
_dispatch.register("attention_pool", "triton", _triton, lambda features, logits, _: triton_reason(features, logits))

torch.library.define(
    "avadclip_fast::attention_pool", "(Tensor features, Tensor logits, Tensor? lengths) -> (Tensor out, Tensor pooled)"
)
torch.library.define(
    "avadclip_fast::attention_pool_backward",
    "(Tensor grad, Tensor pooled, Tensor features, Tensor logits, Tensor? lengths) -> (Tensor, Tensor)",
)

implement("attention_pool", "attention_pool", "forward")
implement("attention_pool_backward", "attention_pool", "backward")


@torch.library.register_fake("avadclip_fast::attention_pool")
def _(features, logits, lengths):
    shape = (features.shape[0], features.shape[2])
    return features.new_empty(shape), features.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("avadclip_fast::attention_pool_backward")
def _(grad, pooled, features, logits, lengths):
    return features.new_empty(features.shape), logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    features, logits, lengths = inputs
    ctx.save_for_backward(output[1], features, logits, lengths)


def _backward(ctx, grad):
    return *torch.ops.avadclip_fast.attention_pool_backward(grad, *ctx.saved_tensors), None


differentiable("attention_pool", _backward, _save, one_result=True)
differentiable_once("attention_pool", "attention_pool_backward")


def attention_pool(
    features: Tensor, logits: Tensor, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Pools each video to a unit vector: features summed with anomaly-logit weights (arXiv 2504.04495, eq. 4).

        g_b = sum_t logits_bt · features_bt,   out_b = g_b / max(|g_b|, 1e-12)

    features: (B, T, D) floating point; logits: (B, T) of the same dtype
    lengths: (B,) int, to sum over t < lengths[b], or None, to sum over all T
    Returns (B, D) in the features' dtype.
    Raises ValueError on invalid shapes, dtypes, devices or lengths.
    Precision: sum and norm in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("attention_pool", ("features", features, "B T D"), ("logits", logits, "B T"))
    check_lengths("attention_pool", lengths, sizes["B"], sizes["T"], features.device)
    return _dispatch.run("attention_pool", backend, features, logits, lengths)
