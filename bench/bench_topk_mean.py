"""topk_mean against loops over the batch and against plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work


def loops(scores: Tensor, lengths: Tensor) -> Tensor:
    """Loops over videos, as the official code does."""
    out = scores.new_zeros(0, scores.shape[2])
    for b in range(len(scores)):
        top = torch.topk(scores[b, : lengths[b]], int(lengths[b] // 16 + 1), dim=0).values
        out = torch.cat([out, top.mean(0, keepdim=True)])
    return out


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for batch, length, classes in ((96, 256, 7), (96, 256, 1), (8, 4096, 7), (1, 65536, 7)):
        lengths = torch.randint(max(1, length // 4), length + 1, (batch,))

        def make(shape=(batch, length, classes), lengths=lengths) -> tuple:
            return torch.randn(shape, dtype=dtype, requires_grad=True), lengths

        read, written = (n * classes * dtype.itemsize for n in (int(lengths.sum()), batch * length))
        yield Bench(
            f"[{batch}, {length}, {classes}]",
            make,
            {"loops": loops}
            | harness.compiled(reference.topk_mean, tuned=(length, classes) == (256, 7))
            | harness.served("topk_mean", ops.topk_mean, make()),
            Work(read),
            Work(read + written),  # the gradient of padding is written too, as zeros
        )


if __name__ == "__main__":
    harness.main("bench_topk_mean", cases)
