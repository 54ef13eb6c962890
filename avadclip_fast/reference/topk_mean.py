"""Ragged top-k mean over time, the pooling of multiple-instance learning."""

import torch
from torch import Tensor

from ._numerics import valid_mask


def topk_mean(scores: Tensor, lengths: Tensor, divisor: int = 16) -> Tensor:
    """
    k_b = lengths[b] // divisor + 1
    out_bc = mean of the k_b largest scores_btc over t < lengths[b]     (of all, where k_b > lengths[b])
    Ties go to the lowest t. NaN counts as largest, and so propagates.
    """
    mask = valid_mask(lengths, scores.shape[1]).unsqueeze(-1)  # [B, T, 1]
    count = torch.minimum(lengths // divisor + 1, lengths)[:, None]  # [B, 1]
    ranked = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).values
    rank = torch.arange(scores.shape[1], device=scores.device)[:, None]
    top = torch.where(rank < count[:, None], ranked, 0)  # [B, T, C]
    return top.sum(1) / count
