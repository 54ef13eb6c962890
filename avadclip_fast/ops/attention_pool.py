"""attention_pool: the prompt's global feature of a video."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_tensors

_dispatch.register("attention_pool", "reference", reference.attention_pool)


def attention_pool(
    features: Tensor, logits: Tensor, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """One unit vector per video: the sum of its features weighted by its anomaly logits (arXiv 2504.04495, eq. 4).

        g_b = sum_t logits_bt · features_bt,   out_b = g_b / max(|g_b|, 1e-12)

    features: (B, T, D) floating point; logits: (B, T) of the same dtype
    lengths: (B,) int; the sum then runs over t < lengths[b], else over all T
    Returns (B, D) in the features' dtype. Raises ValueError on shapes, dtypes, devices or lengths that do not fit.
    Precision: sum and norm in float32. Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("attention_pool", ("features", features, "B T D"), ("logits", logits, "B T"))
    check_lengths("attention_pool", lengths, sizes["B"], sizes["T"], features.device)
    return _dispatch.run("attention_pool", backend, features, logits, lengths)
