"""distill_loss: every backend against the reference, the reference against loops, tiny gradients, far variances."""

import math

import pytest
import torch
from fused import DEVICE
from op_tests import ON_GPU, OpTests

from avadclip_fast import UncertaintyDistillationLoss, ops


class TestDistillLoss(OpTests):
    op = "distill_loss"

    def oracle(self, teacher, student, log_variance, lengths):
        total, count = 0.0, 0
        batch, rows, width = teacher.shape
        for b in range(batch):
            for t in range(rows if lengths is None else lengths[b]):
                for d in range(width):
                    distance = (teacher[b, t, d] - student[b, t, d]) ** 2
                    theta = log_variance[b, t, d]
                    total += distance / (1e-6 + 2 * math.exp(theta)) + theta
                    count += 1
        return total / count

    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
    def test_tiny_gradients_survive(self, case, backend, device, kind):
        """In training the loss weighs 1e-8 and is a mean over 1e7 numbers: gradients are about 1e-15."""
        arguments = self.make(case, backend, kind, device)
        _, grads = self.run(arguments, backend, torch.tensor(1e-12))
        _, whole = self.run(arguments, backend, torch.tensor(1.0))
        for name, grad in grads.items():
            assert (grad != 0).float().mean() > 0.3  # the valid rows' share
            rounding = torch.finfo(kind).eps  # of each of the two
            largest = whole[name].abs().max().item()
            torch.testing.assert_close(grad.float() * 1e12, whole[name].float(), rtol=2 * rounding, atol=1e-6 * largest)

    def test_a_vanishing_variance_is_finite(self, case, backend, device):
        """exp(-60): the 1e-6 is all that is left of the divisor. exp(60): the distance counts for nothing."""
        zero, one = torch.zeros(1, 1, 2, device=device), torch.ones(1, 1, 2, device=device)
        theta = torch.tensor([[[-60.0, 60.0]]], device=device)
        out, grads = self.run({"teacher": zero, "student": one, "log_variance": theta}, backend)
        torch.testing.assert_close(out.cpu(), torch.tensor(1e6 / 2))
        assert all(grad.isfinite().all() for grad in grads.values())


@DEVICE
def test_triton_keeps_slopes_in_the_dtypes_of_their_own(device):
    """A log variance in float32 beside features in bfloat16, as under autocast."""
    teacher, student, theta = torch.randn(3, 2, 5, 8, device=device)
    given = (teacher.bfloat16(), student.bfloat16().requires_grad_(), theta.requires_grad_(), None)
    torch.library.opcheck(torch.ops.avadclip_fast.distill_loss.default, given)
    _, by_student, by_theta, _ = torch.ops.avadclip_fast.distill_loss(*given)
    assert by_student.dtype == torch.bfloat16 and by_theta.dtype == torch.float32


def test_the_module_detaches_the_teacher():
    teacher, student, theta = (torch.randn(1, 3, 4, requires_grad=True) for _ in range(3))
    UncertaintyDistillationLoss()(teacher, student, theta).backward()
    assert teacher.grad is None and student.grad is not None and theta.grad is not None


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_rows_may_lie_more_than_31_bits_apart(device):
    """4 GB of float16, of which three rows are used, 2^30 numbers apart."""
    near = torch.randn(1, 3, 8, device=device, dtype=torch.float16)
    far = torch.empty(2**31 + 8, device=device, dtype=torch.float16).as_strided(near.shape, (8, 2**30, 1)).copy_(near)
    found, expected = (ops.distill_loss(x, x, x, backend="triton") for x in (far, near))
    assert torch.equal(found, expected)
