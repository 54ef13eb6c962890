"""topk_mean, forward and backward, against loops over the batch and against plain PyTorch."""

import torch
from torch import Tensor

from avadclip_fast import ops

from . import harness


def loops(scores: Tensor, lengths: Tensor) -> Tensor:
    """A video at a time, as official code does."""
    out = torch.zeros(0, scores.shape[2])
    for b in range(len(scores)):
        top = torch.topk(scores[b, : lengths[b]], int(lengths[b] // 16 + 1), dim=0).values
        out = torch.cat([out, top.mean(0, keepdim=True)])
    return out


def run(rounds: int) -> list[dict]:
    torch.manual_seed(0)
    rows = []
    for batch, length, classes in ((96, 256, 7), (96, 256, 1), (8, 4096, 7), (1, 65536, 7)):
        scores = torch.randn(batch, length, classes, requires_grad=True)
        lengths = torch.randint(max(1, length // 4), length + 1, (batch,))
        fused = {
            backend: harness.forward_backward(ops.topk_mean, (scores, lengths, 16, backend), (scores,))
            for backend in ("reference", "cpp")
        }
        calls = {"loops": harness.forward_backward(loops, (scores, lengths), (scores,))} | fused
        case = f"f+b [{batch}, {length}, {classes}]"
        rows += harness.compare(case, harness.measure(calls, rounds), "cpp", bytes=8 * scores.numel())
    return rows


if __name__ == "__main__":
    harness.main("bench_topk_mean", run)
