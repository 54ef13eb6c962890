"""mil_loss and mil_align_loss, forward and backward, against loops over the batch and against plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops

from . import harness

BATCH, ROWS, CLASSES = 96, 256, 7


def loops(logits: Tensor, class_logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor) -> Tensor:
    """Both losses as official code computes them: a video, and a class, at a time."""
    p = torch.zeros(0)
    for b in range(len(logits)):
        top = torch.topk(logits[b, : lengths[b]].sigmoid(), int(lengths[b] // 16 + 1)).values
        p = torch.cat([p, top.mean().view(1)])
    mil = F.binary_cross_entropy(p, 1 - labels[:, 0])
    s = torch.zeros(0, class_logits.shape[2])
    for b in range(len(class_logits)):
        top = torch.topk(class_logits[b, : lengths[b]], int(lengths[b] // 16 + 1), dim=0).values
        s = torch.cat([s, top.mean(0, keepdim=True)])
    y = labels / labels.sum(1, keepdim=True)
    log_p = F.log_softmax(s, dim=1)
    ce = -(y * log_p).sum(1)
    focal = (y * alpha).sum(1) * (1 - (y * log_p.exp()).sum(1)) ** 2 * ce
    return mil + (ce + focal).mean() / 2


def fused(logits, class_logits, labels, lengths, alpha, backend) -> Tensor:
    return ops.mil_loss(logits, labels, lengths, backend=backend) + ops.mil_align_loss(
        class_logits, labels, lengths, alpha, backend=backend
    )


def run(rounds: int) -> list[dict]:
    torch.manual_seed(0)
    logits = torch.randn(BATCH, ROWS, requires_grad=True)
    class_logits = (torch.randn(BATCH, ROWS, CLASSES) * 5).requires_grad_()
    alpha = torch.full((CLASSES,), 0.25, requires_grad=True)
    labels = F.one_hot(torch.randint(CLASSES, (BATCH,)), CLASSES).float()
    leaves = (logits, class_logits, alpha)
    rows = []
    for case, lengths in (
        ("lengths 1..256", torch.randint(1, ROWS + 1, (BATCH,))),
        ("lengths 256", torch.full((BATCH,), ROWS)),
    ):
        inputs = (logits, class_logits, labels, lengths, alpha)
        calls = {
            "loops": harness.forward_backward(loops, inputs, leaves),
            "reference": harness.forward_backward(fused, (*inputs, "reference"), leaves),
            "cpp": harness.forward_backward(fused, (*inputs, "cpp"), leaves),
        }
        scores = 4 * BATCH * ROWS * (1 + CLASSES)  # read once, gradients written once and scaled once
        rows += harness.compare(f"both losses f+b, {case}", harness.measure(calls, rounds), "cpp", bytes=4 * scores)
    return rows


if __name__ == "__main__":
    harness.main("bench_mil_loss", run)
