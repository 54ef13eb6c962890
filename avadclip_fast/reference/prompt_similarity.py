"""Cosine logits of frames against per-video class prompts (arXiv 2504.04495, eq. 8)."""

from torch import Tensor

from ._numerics import normalize


def prompt_similarity(features: Tensor, prompts: Tensor, temperature: float = 0.07) -> Tensor:
    """
    out_btc = cos(features_bt, prompts_bc) / temperature
    """
    return (normalize(features) @ normalize(prompts).transpose(1, 2) / temperature).to(features.dtype)
