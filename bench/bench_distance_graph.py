"""distance_graph against the matrix product that defines it."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

WIDTH = 256


def official(values: Tensor) -> Tensor:
    """The matrix made on the host and repeated over the batch in each call, then multiplied."""
    position = np.arange(values.shape[1])
    distance = np.abs(position[:, None] - position)
    matrix = torch.exp(-torch.from_numpy(distance.astype(np.float32)).to(values.device) / torch.e)
    return matrix.to(values.dtype).unsqueeze(0).repeat(values.shape[0], 1, 1) @ values


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for batch, length in ((96, 256), (24, 1024), (6, 4096)):

        def make(shape=(batch, length, WIDTH)) -> tuple:
            return (torch.randn(shape, dtype=dtype, requires_grad=True),)

        position = torch.arange(length)
        matrix = torch.exp(-(position[:, None] - position).abs() / torch.e)
        values = batch * length * WIDTH
        yield Bench(
            f"[{batch}, {length}, {WIDTH}]",
            make,
            {"official": official, "matrix made beforehand": lambda v, m=matrix: m.to(v.dtype) @ v}
            | harness.compiled(reference.distance_graph)
            | harness.served("distance_graph", ops.distance_graph, make()),
            Work(2 * values * dtype.itemsize, 6 * values),  # two scans: each a multiplication and an addition, and sums
            Work(4 * values * dtype.itemsize, 12 * values),
        )


if __name__ == "__main__":
    harness.main("bench_distance_graph", cases)
