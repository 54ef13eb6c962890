"""MILLoss and MILAlignLoss."""

import torch
from torch import Tensor, nn

from .. import ops


class MILLoss(nn.Module):
    """Binary cross-entropy of each video's top-k mean anomaly score (L_mil in the official code of arXiv 2504.04495).

        out = mean_b BCE(topk_mean(sigmoid(logits_b)), 1 - labels[b, 0]),      k_b = lengths[b] // divisor + 1

    logits: (B, T) floating point; labels: (B, C), class 0 is normal, in 0..1; lengths: (B,) int in 1..T
    Returns a float32 scalar (float64 for float64 logits).
    Raises ValueError on invalid shapes, dtypes, devices, labels or lengths.
    Precision, determinism and backends: see `ops.mil_loss`.
    """

    def __init__(self, divisor: int = 16, backend: str | None = None):
        super().__init__()
        self.divisor, self.backend = divisor, backend

    def forward(self, logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return ops.mil_loss(logits, labels, lengths, self.divisor, backend=self.backend)


class MILAlignLoss(nn.Module):
    """Mean of cross-entropy and focal loss of top-k pooled class logits (L_align in the official code).

        s = topk_mean(logits),   y = labels / sum(labels),   ce = -sum y log_softmax(s)
        out = mean_b (ce + (sum y alpha)(1 - sum y softmax(s))² ce) / 2

    The focal weight `alpha` (C,) is learnable. The official code is that of arXiv 2504.04495.

    logits: (B, T, C) floating point; lengths: (B,) int in 1..T
    labels: (B, C) multi-hot; the loss is NaN if a video has no class
    Returns a float32 scalar (float64 for float64 logits).
    Raises ValueError on invalid shapes, dtypes, devices or lengths.
    Precision, determinism and backends: see `ops.mil_align_loss`.
    """

    def __init__(self, classes: int, alpha: float = 0.25, divisor: int = 16, backend: str | None = None):
        super().__init__()
        self.divisor, self.backend = divisor, backend
        self.alpha = nn.Parameter(torch.full((classes,), float(alpha)))

    def forward(self, logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        return ops.mil_align_loss(logits, labels, lengths, self.alpha, self.divisor, backend=self.backend)
