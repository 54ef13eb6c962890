"""The distance graph: features mixed with weights that decay exponentially in time."""

import torch
from torch import Tensor

from ._numerics import zero_padding


def distance_graph(values: Tensor, scale: float = torch.e, lengths: Tensor | None = None) -> Tensor:
    """
    out_i = sum_j exp(-|i - j| / scale) values_j      over all T rows; with lengths, over i, j < lengths[b]
    """
    position = torch.arange(values.shape[1], device=values.device)
    kernel = (-(position[:, None] - position).abs().double() / scale).exp().to(values.dtype)  # [T, T]
    return zero_padding(kernel @ zero_padding(values, lengths), lengths)
