"""Adaptive audio-visual fusion (arXiv 2504.04495, eq. 1-3): W ⊙ R added to v."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_fusion(
    visual: Tensor,
    audio: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    residual_weight: Tensor,
    residual_bias: Tensor,
) -> Tensor:
    """
    z = [v | a]
    W = sigmoid(gate_weight z + gate_bias)
    R = residual_weight GELU(hidden_weight z + hidden_bias) + residual_bias
    out = v + W ⊙ R
    """
    z = torch.cat([visual, audio], dim=-1)  # [..., 2D]
    gate = torch.sigmoid(F.linear(z, gate_weight, gate_bias))
    residual = F.linear(F.gelu(F.linear(z, hidden_weight, hidden_bias)), residual_weight, residual_bias)
    return visual + gate * residual
