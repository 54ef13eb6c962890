"""uniform_pool on one long video, against the loop over rows and against numpy's reduceat."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

ROWS, DIM = 256, 512


def loop(features: Tensor, lengths: Tensor) -> Tensor:
    """Loops over rows, as the official code does."""
    array = features.numpy()
    out = np.zeros((ROWS, array.shape[1]), np.float32)
    bounds = np.linspace(0, len(array), ROWS + 1, dtype=int)
    for i in range(ROWS):
        empty = bounds[i] == bounds[i + 1]
        out[i] = array[bounds[i]] if empty else array[bounds[i] : bounds[i + 1]].mean(0)
    return torch.from_numpy(out)[None]


def reduceat(features: Tensor, lengths: Tensor) -> Tensor:
    """Uses one numpy call, which returns the first row for an empty range too."""
    bounds = np.linspace(0, len(features), ROWS + 1, dtype=int)
    sums = np.add.reduceat(features.numpy(), bounds[:-1])
    return torch.from_numpy(sums / np.maximum(np.diff(bounds), 1)[:, None].astype(np.float32))[None]


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    on_host = {"loops": loop, "numpy": reduceat}
    for count in (300, 1000, 4000):

        def make(count=count) -> tuple:
            return torch.randn(count, DIM, dtype=dtype), torch.tensor([count])

        features, lengths = make()
        yield Bench(
            f"{count} -> {ROWS}",
            make,
            (on_host if features.device.type == "cpu" and dtype != torch.bfloat16 else {})  # which numpy does not have
            | harness.compiled(partial(reference.uniform_pool, rows=ROWS), tuned=count == 1000)
            | harness.served("uniform_pool", partial(ops.uniform_pool, rows=ROWS), (features, lengths)),
            Work(dtype.itemsize * DIM * (count + ROWS)),
        )


if __name__ == "__main__":
    harness.main("bench_uniform_pool", cases)
