"""Groups videos of similar length, for CPUs where products of padded rows cost as much as those of valid ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._dispatch import transformed
from ..ops._padding import zero_padding

# Padded rows that an additional group must save: each group accumulates into every weight gradient once more, which
# costs as much as some rows. On two cores, step times vary by at most 8 % for values from 60 to 300; in bfloat16, whose
# rows are cheaper, 500 is faster than 200.
WORTH = 300


def split(lengths: Sequence[int]) -> list[list[int]]:
    """Groups the indices of `lengths`, shortest first, to minimise the cost of padding each group to its longest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    least, start = [0], [0]  # for the first n videos: the cost, and where their last group starts
    for n in range(1, len(order) + 1):
        longest = lengths[order[n - 1]]
        costs = [least[s] + (n - s) * longest + WORTH for s in range(n)]
        least.append(min(costs))
        start.append(costs.index(least[-1]))
    groups, n = [], len(order)
    while n:
        groups.append(order[start[n] : n])
        n = start[n]
    return groups[::-1]


def pays(x: Tensor) -> bool:
    """Whether grouping pays off: on a GPU, reading the lengths would synchronise, and one shape is faster.

    With fake or wrapped tensors, there are no lengths to read; torch.jit.trace would keep those that it sees.
    """
    read = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling() and not transformed()
    return x.device.type == "cpu" and read and not torch.jit.is_tracing()


def by_length(
    function: Callable[..., tuple[Tensor, ...]], streams: Sequence[Tensor | None], lengths: Tensor
) -> tuple[Tensor, ...]:
    """Computes function(*streams, lengths) per group; the function must treat videos independently.

    streams: (B, T, D), or None if absent; lengths: (B,) int
    Returns results of shape (B, T, ·), with padded rows zero if there is more than one group.
    """
    present = [x for x in streams if x is not None]
    groups = split(lengths.tolist())
    if len(groups) < 2:
        return function(*streams, lengths)
    rows, found = present[0].shape[1], []
    for group in groups:
        index = torch.tensor(group, device=lengths.device)
        own = lengths[index]
        longest = int(own.max())
        results = function(*(None if x is None else x[index, :longest] for x in streams), own)
        # Zero every padded row, so that results do not depend on the other videos of the batch.
        found.append([F.pad(zero_padding(x, own), (0, 0, 0, rows - longest)) for x in results])
    back = torch.tensor([i for group in groups for i in group], device=lengths.device).argsort()
    return tuple(torch.cat(parts)[back] for parts in zip(*found, strict=True))
