"""distance_graph, forward and backward, against the matrix product that defines it."""

import numpy as np
import torch
from torch import Tensor

from avadclip_fast import ops

from . import harness

WIDTH = 256


def official(values: Tensor) -> Tensor:
    """The matrix made on the host and repeated over the batch in each call, then multiplied."""
    position = np.arange(values.shape[1])
    distance = np.abs(position[:, None] - position)
    matrix = torch.exp(-torch.from_numpy(distance.astype(np.float32)) / torch.e)
    return matrix.unsqueeze(0).repeat(values.shape[0], 1, 1) @ values


def run(rounds: int) -> list[dict]:
    torch.manual_seed(0)
    rows, per_row = [], {}
    for batch, length in ((96, 256), (24, 1024), (6, 4096)):
        values = torch.randn(batch, length, WIDTH, requires_grad=True)
        position = torch.arange(length)
        matrix = torch.exp(-(position[:, None] - position).abs() / torch.e)
        calls = {
            "official": harness.forward_backward(official, (values,), (values,)),
            "matrix made beforehand": harness.forward_backward(lambda v, m=matrix: m @ v, (values,), (values,)),
            "reference": harness.forward_backward(ops.distance_graph, (values, torch.e, None, "reference"), (values,)),
            "cpp": harness.forward_backward(ops.distance_graph, (values, torch.e, None, "cpp"), (values,)),
        }
        times = harness.measure(calls, rounds)
        case = f"f+b [{batch}, {length}, {WIDTH}]"
        rows += harness.compare(case, times, "cpp", bytes=16 * values.numel(), flops=12 * values.numel())
        per_row[length] = rows[-1]["median_ms"] / batch
    growth = per_row[4096] / per_row[256]
    print(f"a video of 4096 snippets costs {growth:.1f} times one of 256 (linear: 16)")
    return rows


if __name__ == "__main__":
    harness.main("bench_distance_graph", run)
