"""SimilarityGraph."""

from torch import Tensor, nn

from .. import ops


class SimilarityGraph(nn.Module):
    """Mixes snippets by similarity: softmax over thresholded cosines, times values (official code of arXiv 2504.04495).

        s_ij = cos(x_i, x_j),   t_ij = s_ij if s_ij > threshold else 0,   out = softmax_j(t) · values

    features: (B, T, D) floating point; values: (B, T, E); lengths: (B,) int, to exclude padded rows, or None
    weights: those returned by an earlier call, to multiply other values by the same graph, or None
    Returns (out (B, T, E), weights).
    Raises ValueError on invalid shapes, dtypes, devices, lengths or threshold.
    Precision, determinism and backends: see `ops.similarity_graph`.
    """

    def __init__(self, threshold: float = 0.7, backend: str | None = None):
        super().__init__()
        self.threshold, self.backend = threshold, backend

    def forward(
        self, features: Tensor, values: Tensor, lengths: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.similarity_graph(features, values, lengths, self.threshold, weights, backend=self.backend)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
