"""Uncertainty-weighted knowledge distillation (arXiv 2504.04495, eq. 11, as the authors' code computes it)."""

from torch import Tensor

from ._numerics import at_least_float32, valid_mask, zero_padding

EPS = 1e-6


def distill_loss(teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None = None) -> Tensor:
    """
    mean over B, T, D of (teacher - student)² / (1e-6 + 2 exp(θ)) + θ,   θ = log_variance
    With lengths, the mean runs over the valid rows t < lengths[b] only.
    """
    teacher, student, theta = (at_least_float32(zero_padding(x, lengths)) for x in (teacher, student, log_variance))
    terms = (teacher - student) ** 2 / (EPS + 2 * theta.exp()) + theta  # 0 on padded rows: both summands are
    if lengths is None:
        return terms.mean()
    return terms.sum() / (valid_mask(lengths, terms.shape[1]).sum() * terms.shape[2])
