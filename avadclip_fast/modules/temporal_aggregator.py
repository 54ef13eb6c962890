"""TemporalAggregator: graph convolutions over the similarity and the distance graph."""

import math

import torch
from torch import Tensor, nn

from .. import ops
from .distance_graph import DistanceGraph
from .linear_act import TemporalConv
from .similarity_graph import SimilarityGraph


class GraphConv(nn.Module):
    """The parameters of one graph convolution, g(x, G) = G · (x W) + r(x): `weight` [in, out], no bias.

    r is a 5-tap convolution over time (`residual`) where the widths differ, else the identity.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        nn.init.xavier_uniform_(self.weight)
        self.residual = TemporalConv(inputs, outputs, 5) if inputs != outputs else None

    def project(self, x: Tensor) -> Tensor:
        """x W."""
        return ops.linear_act(x, self.weight.T)


class TemporalAggregator(nn.Module):
    """Relates the snippets of a video to each other: two graph convolutions by likeness, two by closeness in time.

        x1 = QG(gc2(QG(gc1(x, A)), A)),   x2 = QG(gc4(QG(gc3(x, E)), E)),   out = linear([x1 | x2])

    with A of `SimilarityGraph`, E of `DistanceGraph`, QG(x) = x · sigmoid(1.702 x).

        aggregate = TemporalAggregator(512)
        out = aggregate(x, lengths)            # (B, T, 512) -> (B, T, 512)

    padding="official": as the authors' code, where only A knows the lengths, and padded rows reach valid ones through
    the convolutions and E; padding="masked": valid rows see valid rows only. Parameters carry the official names.
    Raises ValueError on shapes, dtypes or lengths that do not fit.
    """

    def __init__(self, dim: int = 512, padding: str = "masked", threshold: float = 0.7):
        super().__init__()
        check_padding("TemporalAggregator", padding)
        self.padding = padding
        half = dim // 2
        self.gc1 = GraphConv(dim, half)
        self.gc2 = GraphConv(half, half)
        self.gc3 = GraphConv(dim, half)
        self.gc4 = GraphConv(half, half)
        # The rows of E sum to (1 + a)/(1 - a), a = exp(-1/e): features are to leave at about the scale they came in.
        decay = math.exp(-1 / math.e)
        for conv in (self.gc3, self.gc4):
            nn.init.xavier_uniform_(conv.weight, gain=(1 - decay) / (1 + decay))
        self.simAdj = SimilarityGraph(threshold)
        self.disAdj = DistanceGraph()
        self.linear = nn.Linear(2 * half, dim)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        valid = lengths if self.padding == "masked" else None
        first, third = self.gc1, self.gc3  # both read x: one product with both weights side by side, one convolution
        projected = ops.linear_act(x, torch.cat([first.weight, third.weight], dim=1).T)
        assert first.residual is not None and third.residual is not None  # their widths differ
        skipped = ops.linear_act(
            x,
            torch.cat([first.residual.weight, third.residual.weight]),
            torch.cat([first.residual.bias, third.residual.bias]),
            lengths=valid,
        )
        (xw1, xw3), (skip1, skip3) = projected.chunk(2, dim=-1), skipped.chunk(2, dim=-1)
        mixed, weights = self.simAdj(x, xw1, lengths)
        h = _quick_gelu(mixed + skip1)
        mixed, _ = self.simAdj(x, self.gc2.project(h), lengths, weights)
        x1 = _quick_gelu(mixed + h)
        h = _quick_gelu(self.disAdj(xw3, valid) + skip3)
        x2 = _quick_gelu(self.disAdj(self.gc4.project(h), valid) + h)
        return ops.linear_act(torch.cat([x1, x2], dim=-1), self.linear.weight, self.linear.bias)

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}"


def check_padding(owner: str, padding: str) -> None:
    """Raises ValueError unless padding is "official" or "masked"."""
    if padding not in ("official", "masked"):
        raise ValueError(f"{owner}: padding must be 'official' or 'masked', got {padding!r}")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
