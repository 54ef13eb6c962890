"""pack_rows and unpack_rows against indexing by a mask."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from avadclip_fast import ops

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM = 96, 256, 512


def there_and_back(padded: Tensor, lengths: Tensor, total: int, backend: str | None = None) -> Tensor:
    packed = ops.pack_rows(padded, lengths, total, backend=backend)
    return ops.unpack_rows(packed, lengths, ROWS, backend=backend)


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    lengths = torch.randint(1, ROWS + 1, (BATCH,))
    total = int(lengths.sum())

    def make() -> tuple:
        return torch.randn(BATCH, ROWS, DIM, dtype=dtype, requires_grad=True), lengths

    valid, padded = total * DIM * dtype.itemsize, BATCH * ROWS * DIM * dtype.itemsize
    yield Bench(
        f"there and back, [{BATCH}, {ROWS}, {DIM}], lengths 1..{ROWS}",
        make,
        harness.served("pack_rows", partial(there_and_back, total=total), make()),
        Work(3 * valid + padded),
        Work(6 * valid + 2 * padded),
        waits=("reference",),  # it waits for the number of masked rows, which also breaks the graph of torch.compile
    )


if __name__ == "__main__":
    harness.main("bench_pack_rows", cases)
