"""similarity_graph: softmax over thresholded cosines, times values."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch, _similarity_graph_cpu, _similarity_graph_triton
from ._autocast import without_autocast
from ._check import REAL, check_are_tensors, check_lengths, check_tensors

_dispatch.register("similarity_graph", "reference", without_autocast(reference.similarity_graph))
_dispatch.register(
    "similarity_graph", "triton", _similarity_graph_triton.similarity_graph, _similarity_graph_triton.supports
)
_dispatch.register("similarity_graph", "cpp", _similarity_graph_cpu.similarity_graph, _similarity_graph_cpu.supports)


def similarity_graph(
    features: Tensor,
    values: Tensor,
    lengths: Tensor | None = None,
    threshold: float = 0.7,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixes the snippets of a video by cosine similarity (official code of arXiv 2504.04495).

        s_ij = <x_i, x_j> / (|x_i||x_j| + 1e-20),   t_ij = s_ij if s_ij > threshold else 0
        A = softmax_j(t_ij) over j < lengths[b];   rows and columns >= lengths[b] are 0
        out = A · values

    A sub-threshold edge still has weight exp(0) = 1 before normalisation. Gradients reach the features only through
    edges above the threshold.

    features: (B, T, D) floating point; values: (B, T, E) of the same dtype
    lengths: (B,) int, or None if all T rows are valid
    threshold: a cosine in [-1, 1]
    weights: those returned by an earlier call with the same features and lengths, to reuse its graph, or None
    Returns (out (B, T, E) in the values' dtype, weights (B, T, T) float32 (float64) to pass to a later call).
    Raises ValueError on invalid shapes, dtypes, devices, lengths or threshold.
    Precision: cosines and softmax in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("similarity_graph", ("features", features, "B T D"), ("values", values, "B T E"))
    if not isinstance(threshold, REAL) or not -1 <= threshold <= 1:
        raise ValueError(f"similarity_graph: threshold is a cosine in [-1, 1], got {threshold!r}")
    if threshold == 1:
        threshold = 2.0  # no cosine is above 1, but for rounding, which keeps other edges on each backend
    if lengths is None:
        lengths = torch.full((sizes["B"],), sizes["T"], device=features.device)
    check_lengths("similarity_graph", lengths, sizes["B"], sizes["T"], features.device)
    if weights is not None:
        check_are_tensors("similarity_graph", weights=weights)
        expected = [sizes["B"], sizes["T"], sizes["T"]]
        if list(weights.shape) != expected or weights.device != values.device:
            raise ValueError(
                f"similarity_graph: weights must be an earlier call's, {expected} on {values.device}, "
                f"got {list(weights.shape)} on {weights.device}"
            )
    return _dispatch.run("similarity_graph", backend, features, values, lengths, threshold, weights)
