"""TopKMean."""

from torch import Tensor, nn

from .. import ops


class TopKMean(nn.Module):
    """The mean of each video's k highest scores, k = lengths // divisor + 1.

    forward: scores (B, T, C), lengths (B,) -> (B, C). Raises ValueError on shapes or lengths that do not fit.
    """

    def __init__(self, divisor: int = 16, backend: str | None = None):
        super().__init__()
        self.divisor, self.backend = divisor, backend

    def forward(self, scores: Tensor, lengths: Tensor) -> Tensor:
        return ops.topk_mean(scores, lengths, self.divisor, backend=self.backend)
