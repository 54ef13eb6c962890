"""add_act against the same lines of PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM = 96, 256, 512


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for activation, kept in (("relu", 1), ("quick_gelu", 2)):

        def make() -> tuple:
            return tuple(torch.randn(BATCH, ROWS, DIM, dtype=dtype, requires_grad=True) for _ in range(2))

        each = BATCH * ROWS * DIM * dtype.itemsize
        yield Bench(
            f"{activation}, [{BATCH}, {ROWS}, {DIM}]",
            make,
            harness.compiled(partial(reference.add_act, activation=activation))
            | harness.served("add_act", partial(ops.add_act, activation=activation), make()),
            Work(3 * each),
            Work((5 + kept) * each),  # the gradient and what was kept are read, one gradient is written for both
        )


if __name__ == "__main__":
    harness.main("bench_add_act", cases)
