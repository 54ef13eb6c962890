"""distill_loss against the formula in one line of PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM = 96, 256, 512


def official(teacher: Tensor, student: Tensor, log_variance: Tensor) -> Tensor:
    theta = log_variance.float()
    return ((teacher.float() - student.float()) ** 2 / (1e-6 + 2 * theta.exp()) + theta).mean()


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    def make() -> tuple:
        teacher, student, theta = torch.randn(3, BATCH, ROWS, DIM, dtype=dtype)
        return teacher, student.clone().requires_grad_(), theta.clone().requires_grad_()

    each = BATCH * ROWS * DIM * dtype.itemsize
    yield Bench(
        f"[{BATCH}, {ROWS}, {DIM}]",
        make,
        {"official": official}
        | harness.compiled(reference.distill_loss)
        | harness.served("distill_loss", ops.distill_loss, make()),
        Work(3 * each),
        Work(5 * each),  # three read, two gradients written
        waits=(),
    )


if __name__ == "__main__":
    harness.main("bench_distill_loss", cases)
