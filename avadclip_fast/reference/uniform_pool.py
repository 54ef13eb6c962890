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
    begin, end = begin + first[:, None], torch.maximum(end, begin + 1) + first[:, None]  # [B, rows]
    position = torch.arange(len(features), device=features.device)
    member = (position >= begin[..., None]) & (position < end[..., None])  # [B, rows, N]
    x = at_least_float32(features)
    return (member.to(x.dtype) @ x / (end - begin)[..., None]).to(features.dtype)
