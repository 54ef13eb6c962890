"""topk_mean: ragged top-k mean over time."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_positive, check_tensors

_dispatch.register("topk_mean", "reference", reference.topk_mean)


def topk_mean(scores: Tensor, lengths: Tensor, divisor: int = 16, backend: str | None = None) -> Tensor:
    """The mean of each video's highest scores: how multiple-instance learning turns snippets into a video.

        k_b = lengths[b] // divisor + 1
        out_bc = mean of the k_b largest scores_btc over t < lengths[b]

    scores: (B, T, C) floating point; lengths: (B,) int in 1..T; divisor: >= 1
    Returns (B, C) in the scores' dtype. Raises ValueError on shapes, lengths or a divisor that do not fit.
    Ties, and with them the gradient, go to the lowest t; NaN propagates. Deterministic.
    Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("topk_mean", ("scores", scores, "B T C"))
    check_positive("topk_mean", divisor=divisor)
    if lengths is None:
        raise ValueError("topk_mean: lengths must be an int tensor [B], got None")
    check_lengths("topk_mean", lengths, sizes["B"], sizes["T"], scores.device)
    return _dispatch.run("topk_mean", backend, scores, lengths, divisor)
