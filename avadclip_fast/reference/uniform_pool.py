"""Pooling of long videos to a fixed number of rows, by equal ranges of time."""

import torch
from torch import Tensor

from ._numerics import at_least_float32


def uniform_pool(features: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """
    bounds_r = int(r n_b / rows) in float64, bounds_rows = n_b
    out_br = mean of features_b[bounds_r : bounds_{r+1}];     an empty range takes its first row
    """
    n = lengths.double()[:, None]  # [B, 1]
    row = torch.arange(rows + 1, device=features.device)
    bounds = (row * (n / rows)).long()
    bounds[:, -1] = lengths
    first = lengths.cumsum(0) - lengths  # where each video starts
    begin, end = bounds[:, :-1], bounds[:, 1:]
    count = (end - begin).clamp_min(1)  # [B, rows]
    longest = len(features) // rows + 2  # no range has more rows, whatever the lengths
    step = torch.arange(longest, device=features.device)
    at = (first[:, None] + begin)[..., None] + step  # [B, rows, longest]
    x = at_least_float32(features)[at.clamp_max(len(features) - 1)]  # [B, rows, longest, D]
    return (torch.where((step < count[..., None])[..., None], x, 0).sum(2) / count[..., None]).to(features.dtype)
