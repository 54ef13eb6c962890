"""distance_graph against the matrix product that defines it."""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

WIDTH = 256
SHAPES = ((96, 256), (24, 1024), (6, 4096))


def official(values: Tensor) -> Tensor:
    """Builds the matrix on the host, repeats it over the batch, and multiplies, in every call."""
    position = np.arange(values.shape[1])
    distance = np.abs(position[:, None] - position)
    matrix = torch.exp(-torch.from_numpy(distance.astype(np.float32)).to(values.device) / torch.e)
    return matrix.to(values.dtype).unsqueeze(0).repeat(values.shape[0], 1, 1) @ values


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for batch, length in SHAPES:

        def make(shape=(batch, length, WIDTH)) -> tuple:
            return (torch.randn(shape, dtype=dtype, requires_grad=True),)

        position = torch.arange(length)
        matrix = torch.exp(-(position[:, None] - position).abs() / torch.e)
        values = batch * length * WIDTH
        yield Bench(
            f"[{batch}, {length}, {WIDTH}]",
            make,
            {"official": official, "matrix made beforehand": lambda v, m=matrix: m.to(v.dtype) @ v}
            | harness.compiled(reference.distance_graph, tuned=(batch, length) == SHAPES[0])
            | harness.served("distance_graph", ops.distance_graph, make()),
            Work(2 * values * dtype.itemsize, 6 * values),  # two scans of multiply-adds, and their sum
            Work(4 * values * dtype.itemsize, 12 * values),
        )


def by_length(options: argparse.Namespace) -> list[dict]:
    """Compares times for equal numbers of rows in long and in short videos, without slow alternatives in between."""
    timers = {}
    with torch.device(options.device):
        for batch, length in reversed(SHAPES):
            values = torch.randn(batch, length, WIDTH, dtype=getattr(torch, options.dtype), requires_grad=True)
            call = harness.forward_backward(ops.distance_graph, (values,), (values,))
            timers[f"T={length}"] = harness.host_timer(call)
    rows = f"{SHAPES[0][0] * SHAPES[0][1]:,} rows"
    return harness.compare(f"f+b {rows}, by length", harness.measure(timers, 3 * options.rounds), f"T={SHAPES[0][1]}")


def run(options: argparse.Namespace) -> Iterator[list[dict]]:
    dtype = getattr(torch, options.dtype)
    yield from harness.run(cases, dtype, options.device, options.rounds, options.compile)
    yield by_length(options)


if __name__ == "__main__":
    harness.command("bench_distance_graph", run)
