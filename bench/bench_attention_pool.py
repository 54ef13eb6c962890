"""attention_pool against the same weighted sum in one line of PyTorch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM = 96, 256, 512


def official(features: Tensor, logits: Tensor) -> Tensor:
    """Like the official code, pools padded rows too."""
    pooled = logits[:, None] @ features
    return F.normalize(pooled.float(), dim=-1).to(features.dtype)[:, 0]


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    def make() -> tuple:
        return tuple(
            torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((BATCH, ROWS, DIM), (BATCH, ROWS))
        )

    read = BATCH * ROWS * DIM * dtype.itemsize
    yield Bench(
        f"[{BATCH}, {ROWS}, {DIM}]",
        make,
        {"official": official}
        | harness.compiled(reference.attention_pool)
        | harness.served("attention_pool", ops.attention_pool, make()),
        Work(read, 2 * BATCH * ROWS * DIM),
        Work(3 * read, 6 * BATCH * ROWS * DIM),  # read, read again for the gradient of the logits, gradient written
        waits=(),
    )


if __name__ == "__main__":
    harness.main("bench_attention_pool", cases)
