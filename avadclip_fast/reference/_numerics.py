"""What all references share: float32 statistics, safe norms, masks from lengths."""

import torch
from torch import Tensor

TINY_NORM = 1e-12  # a zero row has no direction: its cosine is 0, not NaN


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in the type statistics are kept in: float32, or float64 if it came so."""
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor) -> Tensor:
    """max(|x|, 1e-12) along the last dimension, which stays."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY_NORM)


def normalize(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) along the last dimension, in at least float32."""
    x = at_least_float32(x)
    return x / norm(x)


def valid_mask(lengths: Tensor, rows: int) -> Tensor:
    """(B, T) bool: True where t < lengths[b]."""
    return torch.arange(rows, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """`x` (B, T, ...) with the rows t >= lengths[b] set to zero; unchanged without lengths."""
    if lengths is None:
        return x
    mask = valid_mask(lengths, x.shape[1])
    return torch.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)  # where, not *: 0 * inf is NaN
