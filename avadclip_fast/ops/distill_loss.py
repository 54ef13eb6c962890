"""distill_loss: uncertainty-weighted knowledge distillation."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_tensors

_dispatch.register("distill_loss", "reference", reference.distill_loss)


def distill_loss(
    teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The student's squared distance to the teacher, weighted by its own uncertainty (arXiv 2504.04495, eq. 11).

        out = mean over B, T, D of (teacher - student)² / (1e-6 + 2 exp(θ)) + θ,      θ = log_variance

    This is what the authors' code computes; the paper has (..)²/σ² + ln σ².

    teacher, student, log_variance: (B, T, D) floating point
    lengths: (B,) int; the mean then runs over the rows t < lengths[b], else over all
    Returns a float32 (float64) scalar. Raises ValueError on shapes, dtypes, devices or lengths that do not fit.
    Precision: float32 throughout; gradients of about 1e-15 need bfloat16's or float32's exponent, not float16's.
    Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors(
        "distill_loss",
        ("teacher", teacher, "B T D"),
        ("student", student, "B T D"),
        ("log_variance", log_variance, "B T D"),
    )
    check_lengths("distill_loss", lengths, sizes["B"], sizes["T"], student.device)
    return _dispatch.run("distill_loss", backend, teacher, student, log_variance, lengths)
