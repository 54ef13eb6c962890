"""prompt_similarity: cosine logits between snippets and per-video class prompts."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_positive, check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason

MOST_CLASSES = 64  # a Triton program holds a video's prompts in registers, which more than these would spill


def _triton(features: Tensor, prompts: Tensor, temperature: float) -> Tensor:
    return torch.ops.avadclip_fast.prompt_similarity(features, prompts, temperature)[0]


def _triton_supports(features: Tensor, prompts: Tensor, temperature: float) -> str | None:
    if prompts.shape[1] > MOST_CLASSES:
        return f"it takes up to {MOST_CLASSES} classes, not {prompts.shape[1]}"
    return triton_reason(features, prompts)


_dispatch.register("prompt_similarity", "reference", without_autocast(reference.prompt_similarity))
_dispatch.register("prompt_similarity", "triton", _triton, _triton_supports)

torch.library.define(
    "avadclip_fast::prompt_similarity",
    "(Tensor features, Tensor prompts, float temperature) -> (Tensor out, Tensor feature_norms, Tensor prompt_norms)",
)
torch.library.define(
    "avadclip_fast::prompt_similarity_backward",
    "(Tensor grad, Tensor out, Tensor features, Tensor prompts, Tensor feature_norms, Tensor prompt_norms,"
    " float temperature) -> (Tensor, Tensor)",
)

implement("prompt_similarity", "prompt_similarity", "forward")
implement("prompt_similarity_backward", "prompt_similarity", "backward")


@torch.library.register_fake("avadclip_fast::prompt_similarity")
def _(features, prompts, temperature):
    out = features.new_empty(*features.shape[:2], prompts.shape[1])
    return out, *(x.new_empty(x.shape[:2], dtype=torch.float32) for x in (features, prompts))


@torch.library.register_fake("avadclip_fast::prompt_similarity_backward")
def _(grad, out, features, prompts, feature_norms, prompt_norms, temperature):
    return features.new_empty(features.shape), prompts.new_empty(prompts.shape)


def _save(ctx, inputs, output):
    features, prompts, ctx.temperature = inputs
    ctx.save_for_backward(output[0], features, prompts, *output[1:])


def _backward(ctx, grad):
    grads = torch.ops.avadclip_fast.prompt_similarity_backward(grad, *ctx.saved_tensors, ctx.temperature)
    return *grads, None


differentiable("prompt_similarity", _backward, _save, one_result=True)
differentiable_once("prompt_similarity", "prompt_similarity_backward")


def prompt_similarity(
    features: Tensor, prompts: Tensor, temperature: float = 0.07, backend: str | None = None
) -> Tensor:
    """Class logits: cosine of each snippet with each class prompt of its video (arXiv 2504.04495, eq. 8).

        out_btc = <features_bt, prompts_bc> / (max(|features_bt|, 1e-12) · max(|prompts_bc|, 1e-12) · temperature)

    features: (B, T, D) floating point; prompts: (B, C, D) of the same dtype; temperature: > 0
    Returns (B, T, C) in the features' dtype.
    Raises ValueError on invalid shapes, dtypes, devices or temperature.
    Precision: norms and products in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    check_tensors("prompt_similarity", ("features", features, "B T D"), ("prompts", prompts, "B C D"))
    check_positive("prompt_similarity", temperature=temperature)
    return _dispatch.run("prompt_similarity", backend, features, prompts, temperature)
