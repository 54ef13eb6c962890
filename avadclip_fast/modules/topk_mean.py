"""TopKMean."""

from torch import Tensor, nn

from .. import ops


class TopKMean(nn.Module):
    """Mean of each video's k highest scores, k = min(lengths // divisor + 1, lengths).

    As in the official code of arXiv 2504.04495.

    scores: (B, T, C) floating point; lengths: (B,) int in 1..T
    Returns (B, C) in the scores' dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or divisor.
    Precision, determinism and backends: see `ops.topk_mean`.
    """

    def __init__(self, divisor: int = 16, backend: str | None = None):
        super().__init__()
        self.divisor, self.backend = divisor, backend

    def forward(self, scores: Tensor, lengths: Tensor) -> Tensor:
        return ops.topk_mean(scores, lengths, self.divisor, backend=self.backend)
