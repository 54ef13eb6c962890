"""UncertaintyDistillationLoss."""

from torch import Tensor, nn

from .. import ops


class UncertaintyDistillationLoss(nn.Module):
    """Student-to-teacher distance weighted by the student's uncertainty (arXiv 2504.04495, eq. 11; official code).

        out = mean of (teacher - student)² / (1e-6 + 2 exp(θ)) + θ,      θ = log_variance

    teacher, student, log_variance: (B, T, D) floating point; the teacher is detached
    lengths: (B,) int, to average over valid rows only, or None
    Returns a float32 scalar (float64 for float64 inputs).
    Raises ValueError on invalid shapes, dtypes, devices or lengths.
    Precision, determinism and backends: see `ops.distill_loss`.
    """

    def __init__(self, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None = None) -> Tensor:
        if isinstance(teacher, Tensor):  # the op refuses anything else, by its name
            teacher = teacher.detach()
        return ops.distill_loss(teacher, student, log_variance, lengths, backend=self.backend)
