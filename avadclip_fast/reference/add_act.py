"""act(x + residual): what ends a residual layer whose activation follows the sum."""

from torch import Tensor

from .linear_act import ACTIVATIONS


def add_act(x: Tensor, residual: Tensor, activation: str) -> Tensor:
    """out = act(x + residual)"""
    return ACTIVATIONS[activation](x + residual)
