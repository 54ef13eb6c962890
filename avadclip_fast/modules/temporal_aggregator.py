"""TemporalAggregator: graph convolutions over the similarity and distance graphs."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._check import check_counts, check_rows
from ..streams import aside
from .distance_graph import DistanceGraph
from .linear_act import TemporalConv
from .similarity_graph import SimilarityGraph


class GraphConv(nn.Module):
    """Parameters of a graph convolution, g(x, G) = G · (x W) + r(x): `weight` [in, out], no bias.

    r is a 5-tap convolution over time (`residual`) if the widths differ, else the identity.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        nn.init.xavier_uniform_(self.weight)
        self.residual = TemporalConv(inputs, outputs, 5) if inputs != outputs else None

    def project(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """x W; rows t >= lengths[b] mean nothing."""
        return ops.linear_act(x, self.weight.T, needed=lengths)


class TemporalAggregator(nn.Module):
    """Relates the snippets of a video: two graph convolutions by similarity and two by temporal distance.

        x1 = QG(gc2(QG(gc1(x, A)), A)),   x2 = QG(gc4(QG(gc3(x, E)), E)),   out = linear([x1 | x2])

    A is the matrix of `SimilarityGraph`, E that of `DistanceGraph`, and QG(x) = x · sigmoid(1.702 x), as in the
    official code of arXiv 2504.04495.

        aggregate = TemporalAggregator(512)
        out = aggregate(x, lengths)            # (B, T, 512) -> (B, T, 512)

    padding: "masked" hides padded rows from valid rows; "official" follows the official code, which masks only A, so
    padded rows leak through the convolutions and E
    threshold: cosine above which `SimilarityGraph` keeps an edge
    x: (B, T, D) floating point; lengths: (B,) int, or None if all rows are valid
    Returns (B, T, D) in x's dtype. With padding="masked", rows t >= lengths[b] mean nothing.
    Raises ValueError on an unknown `padding`, a `dim` below 2, or invalid shapes, dtypes, devices or lengths.
    Parameters have the official names.
    """

    def __init__(self, dim: int = 512, padding: str = "masked", threshold: float = 0.7):
        super().__init__()
        if padding not in ("official", "masked"):
            raise ValueError(f"TemporalAggregator: padding must be 'official' or 'masked', got {padding!r}")
        self.padding = padding
        half = dim // 2
        check_counts("TemporalAggregator", **{"dim // 2": half})
        self.gc1 = GraphConv(dim, half)
        self.gc2 = GraphConv(half, half)
        self.gc3 = GraphConv(dim, half)
        self.gc4 = GraphConv(half, half)
        # Rows of E sum to (1 + a) / (1 - a) with a = exp(-1/e); this gain preserves the scale of the features.
        decay = math.exp(-1 / math.e)
        for conv in (self.gc3, self.gc4):
            nn.init.xavier_uniform_(conv.weight, gain=(1 - decay) / (1 + decay))
        self.simAdj = SimilarityGraph(threshold)
        self.disAdj = DistanceGraph()
        self.linear = nn.Linear(2 * half, dim)

    def forward(self, x: Tensor, lengths: Tensor | None = None, alike: Tensor | None = None) -> Tensor:
        """x, lengths -> (B, T, D). alike: (B,) int or None; all videos have the same rows t >= alike[b]."""
        check_rows("TemporalAggregator", self.linear.out_features, lengths, x=x)
        valid = lengths if self.padding == "masked" else None
        needed, share = (valid, _as_it_is) if alike is None else _shared(alike, x.shape[1])
        first, third = self.gc1, self.gc3  # both read x, so their weights are concatenated
        projected = share(ops.linear_act(x, torch.cat([first.weight, third.weight], dim=1).T, needed=needed))
        assert first.residual is not None and third.residual is not None  # their widths differ
        skipped = share(
            ops.linear_act(
                x,
                torch.cat([first.residual.weight, third.residual.weight]),
                torch.cat([first.residual.bias, third.residual.bias]),
                lengths=valid,
                needed=needed,
            )
        )
        (xw1, xw3), (skip1, skip3) = projected.chunk(2, dim=-1), skipped.chunk(2, dim=-1)
        add_quick_gelu = partial(ops.add_act, activation="quick_gelu")

        def by_distance() -> Tensor:
            h = add_quick_gelu(self.disAdj(xw3, valid), skip3)
            return add_quick_gelu(self.disAdj(self.gc4.project(h, valid), valid), h)

        x2 = aside("distance", by_distance)
        mixed, weights = self.simAdj(x, xw1, lengths)
        h = add_quick_gelu(mixed, skip1)
        mixed, _ = self.simAdj(x, self.gc2.project(h, lengths), lengths, weights)  # A hides padded rows in any case
        x1 = add_quick_gelu(mixed, h)
        return ops.linear_act(torch.cat([x1, x2()], dim=-1), self.linear.weight, self.linear.bias, needed=valid)

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}"


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _shared(alike: Tensor, rows: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Which rows of a product or convolution of features are needed, and what fills in the rest.

    A tap reaches two rows back: from alike[b] + 2 on, a result is that of the video that has been alike for longest.
    """
    longest = int(alike.argmin())
    needed = (alike + 2).clamp(1, rows)
    needed[longest] = rows
    own = (torch.arange(rows, device=needed.device) < needed[:, None])[..., None]  # [B, T, 1]
    return needed, lambda x: torch.where(own, x, x[longest])
