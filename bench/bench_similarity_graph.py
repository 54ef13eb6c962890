"""similarity_graph, forward and backward, against loops over the batch and against plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops

from . import harness

BATCH, ROWS, DIM, WIDTH = 96, 256, 512, 256


def official(features: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """All pairs of all rows, then a softmax a video."""
    norm = features.norm(dim=2, keepdim=True)
    cosine = features @ features.permute(0, 2, 1) / (norm @ norm.permute(0, 2, 1) + 1e-20)
    weights = torch.zeros_like(cosine)
    for b in range(len(features)):
        n = lengths[b]
        weights[b, :n, :n] = F.threshold(cosine[b, :n, :n], 0.7, 0).softmax(1)
    return weights @ values


def run(rounds: int) -> list[dict]:
    torch.manual_seed(0)
    base = torch.randn(BATCH, 1, DIM)  # so that some edges lie above the threshold, and some below
    features = (base + torch.randn(BATCH, ROWS, DIM) * torch.rand(BATCH, ROWS, 1)).requires_grad_()
    values = torch.randn(BATCH, ROWS, WIDTH, requires_grad=True)
    rows = []
    for case, lengths in (
        ("lengths 1..256", torch.randint(1, ROWS + 1, (BATCH,))),
        ("lengths 256", torch.full((BATCH,), ROWS)),
    ):
        inputs, leaves = (features, values, lengths), (features, values)
        calls = {
            "official": harness.forward_backward(official, inputs, leaves),
            "reference": harness.forward_backward(ops.similarity_graph, (*inputs, 0.7, None, "reference"), leaves),
            "cpp": harness.forward_backward(ops.similarity_graph, (*inputs, 0.7, None, "cpp"), leaves),
        }
        flops = int((lengths**2).sum()) * (2 * DIM + 2 * WIDTH + 4 * WIDTH + 2 * DIM)
        rows += harness.compare(f"f+b, {case}", harness.measure(calls, rounds), "cpp", flops=flops)
    return rows


if __name__ == "__main__":
    harness.main("bench_similarity_graph", run)
