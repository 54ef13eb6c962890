"""UncertaintyDistillationLoss."""

from torch import Tensor, nn

from .. import ops


class UncertaintyDistillationLoss(nn.Module):
    """Distance of student to teacher features, weighted by the student's own uncertainty (arXiv 2504.04495, eq. 11).

        out = mean of (teacher - student)² / (1e-6 + 2 exp(θ)) + θ,      θ = log_variance

    forward: teacher, student, log_variance (B, T, D), lengths (B,) or None -> scalar. With lengths, the mean runs
    over valid rows only. The teacher is detached. Raises ValueError on shapes, dtypes or lengths that do not fit.
    """

    def __init__(self, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None = None) -> Tensor:
        return ops.distill_loss(teacher.detach(), student, log_variance, lengths, backend=self.backend)
