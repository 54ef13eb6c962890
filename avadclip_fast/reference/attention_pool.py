"""The prompt's global feature: a logit-weighted sum over time, normalised (arXiv 2504.04495, eq. 4)."""

from torch import Tensor

from ._numerics import at_least_float32, normalize, zero_padding


def attention_pool(features: Tensor, logits: Tensor, lengths: Tensor | None = None) -> Tensor:
    """
    g_b = sum_t logits_bt · features_bt,   out_b = g_b / |g_b|      over t < lengths[b], or all T without lengths
    """
    weights = zero_padding(at_least_float32(logits), lengths)  # [B, T]
    pooled = weights[:, None] @ at_least_float32(zero_padding(features, lengths))  # [B, 1, D]
    return normalize(pooled[:, 0]).to(features.dtype)
