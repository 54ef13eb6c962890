"""The similarity graph: a softmax over thresholded cosines between the snippets of a video."""

import torch
from torch import Tensor

from ._numerics import at_least_float32, valid_mask, zero_padding

EPS = 1e-20


def similarity_graph(
    features: Tensor, values: Tensor, lengths: Tensor, threshold: float = 0.7, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    s_ij = <x_i, x_j> / (|x_i||x_j| + 1e-20),   t_ij = s_ij if s_ij > threshold else 0
    A = softmax_j(t_ij) over j < lengths[b];   rows and columns >= lengths[b] are 0
    out = A · values
    A sub-threshold edge still has weight exp(0) = 1. Pass the returned A as `weights` to multiply it again.
    """
    if weights is None:
        x = at_least_float32(zero_padding(features, lengths))
        norm = torch.linalg.vector_norm(x, dim=-1)  # [B, T]
        cosine = x @ x.transpose(1, 2) / (norm[:, :, None] * norm[:, None] + EPS)  # [B, T, T]
        edges = torch.where(cosine <= threshold, 0, cosine)  # this way round, NaN stays
        mask = valid_mask(lengths, x.shape[1])
        pairs = mask[:, :, None] & mask[:, None]
        # The cosines lie in [-1, 1], so that exp needs no running maximum.
        exponentials = edges.exp()
        total = torch.where(pairs, exponentials, 0).sum(-1, keepdim=True).clamp_min(1)  # a valid row sums to >= 1
        weights = torch.where(pairs, exponentials / total, 0)
    return zero_padding(weights.to(values.dtype) @ zero_padding(values, lengths), lengths), weights
