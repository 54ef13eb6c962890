"""Numerics of the references, for modules, models and the engine, which do not import them."""

import torch
from torch import Tensor

from ..reference._numerics import at_least_float32, valid_mask, zero_padding

__all__ = ["at_least_float32", "ends_of", "valid_mask", "zero_padding"]


def ends_of(present: Tensor) -> Tensor:
    """(B, n) bool -> (B,) int64: one more than the index of the last that is True, or 0."""
    return (present * torch.arange(1, 1 + present.shape[1], device=present.device)).amax(1)
