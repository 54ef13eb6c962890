"""The two multiple-instance losses over top-k pooled scores: BCE, and cross-entropy with a focal term."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._numerics import at_least_float32
from .topk_mean import topk_mean


def mil_loss(logits: Tensor, labels: Tensor, lengths: Tensor, divisor: int = 16) -> Tensor:
    """
    p_b = topk_mean(sigmoid(logits_b)),   out = mean_b BCE(p_b, 1 - labels[b, 0])       class 0 is normal
    log is clamped at -100, as torch's binary_cross_entropy does.
    """
    p = topk_mean(at_least_float32(logits).sigmoid()[..., None], lengths, divisor)[:, 0]  # [B]
    target = 1 - labels[:, 0].to(p.dtype)
    return -(target * _log(p) + (1 - target) * _log(1 - p)).mean()


def mil_align_loss(logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor, divisor: int = 16) -> Tensor:
    """
    s_bc = topk_mean(logits_bc),   y = labels / sum(labels),   ce = -sum_c y log_softmax(s)
    focal = (sum_c y alpha) · (1 - sum_c y softmax(s))² · ce
    out = mean_b (ce + focal) / 2
    """
    s = topk_mean(at_least_float32(logits), lengths, divisor)  # [B, C]
    y = labels.to(s.dtype) / labels.to(s.dtype).sum(1, keepdim=True)
    log_p = F.log_softmax(s, dim=1)
    ce = -(y * log_p).sum(1)
    focal = (y * alpha).sum(1) * (1 - (y * log_p.exp()).sum(1)) ** 2 * ce
    return (ce + focal).mean() / 2


def _log(p: Tensor) -> Tensor:
    """max(log p, -100) with gradient 0 at p = 0. torch's own BCE refuses autocast, and stops on NaN."""
    zero = p == 0
    return torch.where(zero, -100.0, torch.where(zero, 1.0, p).log().clamp_min(-100))
