"""DistanceGraph."""

import torch
from torch import Tensor, nn

from .. import ops


class DistanceGraph(nn.Module):
    """Mixes snippets by closeness in time: out_i = sum_j exp(-|i - j| / e) values_j, not normalised.

    forward: values (B, T, E), lengths (B,) or None -> (B, T, E). `sigma` stands in the official checkpoints and is
    used by nothing. Raises ValueError on shapes, dtypes or lengths that do not fit.
    """

    def __init__(self, scale: float = torch.e, backend: str | None = None):
        super().__init__()
        self.scale, self.backend = scale, backend
        self.sigma = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        return ops.distance_graph(values, self.scale, lengths, backend=self.backend)
