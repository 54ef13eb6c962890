"""gated_fusion against an unfused version: concatenation, then one product at a time."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

ROWS, DIM = 256, 512


def official(visual, audio, gate_weight, gate_bias, hidden_weight, hidden_bias, weight, bias) -> Tensor:
    z = torch.cat((visual, audio), -1)
    gate = torch.sigmoid(F.linear(z, gate_weight, gate_bias))
    return visual + gate * F.linear(F.gelu(F.linear(z, hidden_weight, hidden_bias)), weight, bias)


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    batch = 96 if harness.on_gpu() else 16

    def make() -> tuple:
        streams = torch.randn(2, batch, ROWS, DIM, dtype=dtype)
        shapes = ((DIM, 2 * DIM), (DIM,), (DIM, 2 * DIM), (DIM,), (DIM, DIM), (DIM,))
        weights = [torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes]
        return tuple(x.to(dtype).clone().requires_grad_() for x in (*streams, *weights))

    rows, products = batch * ROWS, 10 * batch * ROWS * DIM**2
    weights = 5 * DIM**2 * dtype.itemsize
    yield Bench(
        f"[{batch}, {ROWS}, {DIM}]",
        make,
        {"official": official}
        | harness.compiled(reference.gated_fusion)
        | harness.served("gated_fusion", ops.gated_fusion, make()),
        Work(3 * rows * DIM * dtype.itemsize + weights, products),
        Work(8 * rows * DIM * dtype.itemsize + 3 * weights, 3 * products),
        waits=(),
    )


if __name__ == "__main__":
    harness.main("bench_gated_fusion", cases)
