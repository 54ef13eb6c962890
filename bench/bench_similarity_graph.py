"""similarity_graph against loops over the batch and against plain PyTorch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM, WIDTH = 96, 256, 512, 256


def official(features: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Computes all pairs of all rows, then a softmax per video."""
    norm = features.norm(dim=2, keepdim=True)
    cosine = features @ features.permute(0, 2, 1) / (norm @ norm.permute(0, 2, 1) + 1e-20)
    weights = torch.zeros_like(cosine)
    for b in range(len(features)):
        n = lengths[b]
        weights[b, :n, :n] = F.threshold(cosine[b, :n, :n], 0.7, 0).softmax(1)
    return weights @ values


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for case, shortest in (("lengths 1..256", 1), ("lengths 256", ROWS)):
        lengths = torch.randint(shortest, ROWS + 1, (BATCH,))

        def make(lengths=lengths) -> tuple:
            base = torch.randn(BATCH, 1, DIM)  # puts some cosines above the threshold and some below
            features = base + torch.randn(BATCH, ROWS, DIM) * torch.rand(BATCH, ROWS, 1)
            return (
                features.to(dtype).requires_grad_(),
                torch.randn(BATCH, ROWS, WIDTH, dtype=dtype, requires_grad=True),
                lengths,
            )

        rows, valid, pairs = BATCH * ROWS, int(lengths.sum()), int((lengths**2).sum())
        # The inputs twice and the gradient of the result are read; zeros are written to padding too.
        read, written = valid * (2 * (DIM + WIDTH) + WIDTH), rows * (DIM + 2 * WIDTH)
        yield Bench(
            case,
            make,
            {"official": official}
            | harness.compiled(reference.similarity_graph)
            | harness.served("similarity_graph", ops.similarity_graph, make()),
            Work((valid * (DIM + WIDTH) + rows * WIDTH) * dtype.itemsize, pairs * (2 * DIM + 2 * WIDTH)),
            # backward: gradients of the weights, of the values, and of the features from the symmetric sum
            Work((read + written) * dtype.itemsize, pairs * (2 * DIM + 2 * WIDTH + 4 * WIDTH + 2 * DIM)),
        )


if __name__ == "__main__":
    harness.main("bench_similarity_graph", cases)
