"""SimilarityGraph."""

from torch import Tensor, nn

from .. import ops


class SimilarityGraph(nn.Module):
    """Mixes snippets by likeness: a softmax over cosines above a threshold, times values.

        s_ij = cos(x_i, x_j),   t_ij = s_ij if s_ij > threshold else 0,   out = softmax_j(t) · values

    forward: features (B, T, D), values (B, T, E), lengths (B,) or None, weights or None
    -> (out (B, T, E), weights): give the weights back to multiply other values by the same graph.
    Raises ValueError on shapes, dtypes, devices or lengths that do not fit.
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
