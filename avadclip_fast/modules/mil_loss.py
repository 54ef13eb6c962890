"""MILLoss and MILAlignLoss."""

import torch
from torch import Tensor, nn

from .. import ops


class MILLoss(nn.Module):
    """Binary cross-entropy of each video's top-k mean anomaly score: BCE(topk_mean(sigmoid(logits)), 1 - labels[:, 0]).

    forward: logits (B, T), labels (B, C) with class 0 normal, lengths (B,) -> scalar.
    Raises ValueError on shapes, dtypes or lengths that do not fit.
    """

    def __init__(self, divisor: int = 16, backend: str | None = None):
        super().__init__()
        self.divisor, self.backend = divisor, backend

    def forward(self, logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return ops.mil_loss(logits, labels, lengths, self.divisor, backend=self.backend)


class MILAlignLoss(nn.Module):
    """Cross-entropy plus focal loss of top-k pooled class logits, halved; `alpha` (C,) is learnable.

        s = topk_mean(logits),   y = labels / sum(labels),   ce = -sum y log_softmax(s)
        out = mean_b (ce + (sum y alpha)(1 - sum y softmax(s))² ce) / 2

    forward: logits (B, T, C), labels (B, C), lengths (B,) -> scalar.
    Raises ValueError on shapes, dtypes or lengths that do not fit.
    """

    def __init__(self, classes: int, alpha: float = 0.25, divisor: int = 16, backend: str | None = None):
        super().__init__()
        self.divisor, self.backend = divisor, backend
        self.alpha = nn.Parameter(torch.full((classes,), alpha))

    def forward(self, logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return ops.mil_align_loss(logits, labels, lengths, self.alpha, self.divisor, backend=self.backend)
