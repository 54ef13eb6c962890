"""Cosine logits of frames against per-video class prompts (arXiv 2504.04495, eq. 8)."""

from torch import Tensor

from ._numerics import at_least_float32, norm


def prompt_similarity(features: Tensor, prompts: Tensor, temperature: float = 0.07) -> Tensor:
    """
    out_btc = <features_bt, prompts_bc> / (|features_bt| |prompts_bc|) / temperature
    """
    x, p = at_least_float32(features), at_least_float32(prompts)
    cosine = x @ p.transpose(1, 2) / norm(x) / norm(p).transpose(1, 2)  # [B, T, C]
    return (cosine / temperature).to(features.dtype)
