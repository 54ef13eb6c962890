"""mil_loss plus mil_align_loss against loops over the batch and against plain PyTorch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .bench_topk_mean import loops as topk_loops
from .harness import Bench, Work

BATCH, ROWS, CLASSES = 96, 256, 7


def loops(logits: Tensor, class_logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor) -> Tensor:
    """Both losses as in the official code, with a loop over videos."""
    p = logits.new_zeros(0)
    for b in range(len(logits)):
        top = torch.topk(logits[b, : lengths[b]].sigmoid(), int(lengths[b] // 16 + 1)).values
        p = torch.cat([p, top.mean().view(1)])
    mil = F.binary_cross_entropy(p.to(labels.dtype), 1 - labels[:, 0])
    s = topk_loops(class_logits, lengths)
    y = labels / labels.sum(1, keepdim=True)
    log_p = F.log_softmax(s.to(labels.dtype), dim=1)
    ce = -(y * log_p).sum(1)
    focal = (y * alpha).sum(1) * (1 - (y * log_p.exp()).sum(1)) ** 2 * ce
    return mil + (ce + focal).mean() / 2


def both(
    logits: Tensor, class_logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor, backend: str | None = None
) -> Tensor:
    return ops.mil_loss(logits, labels, lengths, backend=backend) + ops.mil_align_loss(
        class_logits, labels, lengths, alpha, backend=backend
    )


def plain(logits: Tensor, class_logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor) -> Tensor:
    return reference.mil_loss(logits, labels, lengths) + reference.mil_align_loss(class_logits, labels, lengths, alpha)


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for case, shortest in (("lengths 1..256", 1), ("lengths 256", ROWS)):
        lengths = torch.randint(shortest, ROWS + 1, (BATCH,))

        def make(lengths=lengths) -> tuple:
            return (
                torch.randn(BATCH, ROWS, dtype=dtype, requires_grad=True),
                (torch.randn(BATCH, ROWS, CLASSES, dtype=dtype) * 5).requires_grad_(),
                F.one_hot(torch.randint(CLASSES, (BATCH,)), CLASSES).float(),
                lengths,
                torch.full((CLASSES,), 0.25, requires_grad=True),
            )

        read, written = (dtype.itemsize * n * (1 + CLASSES) for n in (int(lengths.sum()), BATCH * ROWS))
        yield Bench(
            f"both losses, {case}",
            make,
            {"loops": loops} | harness.compiled(plain) | harness.served("mil_loss", both, make()),
            Work(read),
            Work(read + written),  # gradients of padding are written too, as zeros
        )


if __name__ == "__main__":
    harness.main("bench_mil_loss", cases)
