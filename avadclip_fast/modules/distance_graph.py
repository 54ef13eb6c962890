"""DistanceGraph."""

import torch
from torch import Tensor, nn

from .. import ops


class DistanceGraph(nn.Module):
    """Mixes snippets by temporal distance, with unnormalised weights (official code of arXiv 2504.04495, `disAdj`).

        out_i = sum_j exp(-|i - j| / scale) values_j

    scale: decay length in snippets, e by default
    values: (B, T, E) floating point; lengths: (B,) int, to exclude padded rows, or None
    Returns (B, T, E) in the values' dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or scale.
    Precision, determinism and backends: see `ops.distance_graph`.
    The parameter `sigma` is unused; official checkpoints contain it.
    """

    def __init__(self, scale: float = torch.e, backend: str | None = None):
        super().__init__()
        self.scale, self.backend = scale, backend
        self.sigma = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        return ops.distance_graph(values, self.scale, lengths, backend=self.backend)
