"""prompt_similarity: cosine logits of frames against per-video class prompts."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_positive, check_tensors

_dispatch.register("prompt_similarity", "reference", reference.prompt_similarity)


def prompt_similarity(
    features: Tensor, prompts: Tensor, temperature: float = 0.07, backend: str | None = None
) -> Tensor:
    """Class logits of every snippet: its cosine with each class prompt of its video (arXiv 2504.04495, eq. 8).

        out_btc = <features_bt, prompts_bc> / (max(|features_bt|, 1e-12) · max(|prompts_bc|, 1e-12) · temperature)

    features: (B, T, D) floating point; prompts: (B, C, D) of the same dtype; temperature: > 0
    Returns (B, T, C) in the features' dtype. Raises ValueError on shapes, dtypes or devices that do not fit.
    Precision: norms and products in float32. Deterministic. Backends: see `avadclip-fast env`.
    """
    check_tensors("prompt_similarity", ("features", features, "B T D"), ("prompts", prompts, "B C D"))
    check_positive("prompt_similarity", temperature=temperature)
    return _dispatch.run("prompt_similarity", backend, features, prompts, temperature)
