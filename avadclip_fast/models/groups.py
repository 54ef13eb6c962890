"""Videos of like lengths together: on a processor, rows of padding take as long as valid ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference._numerics import zero_padding

# Rows of padding that one more group must save: each adds its gradient to that of every weight once more, which takes
# as long as some rows do. Training steps on two cores take the same to 8 % with anything from 60 to 300 here, and in
# bfloat16, whose rows are cheaper, less with 500 than with 200.
WORTH = 300


def split(lengths: Sequence[int]) -> list[list[int]]:
    """The indices of `lengths` in groups, shorter ones first, so that padding each group to its longest costs least."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    least, start = [0], [0]  # of the first n videos: rows, and where their last group begins
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
    """Whether rows of padding are worth looking for: a GPU would have to wait for the lengths, and wants one shape."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def by_length(
    function: Callable[..., tuple[Tensor, ...]], streams: Sequence[Tensor | None], lengths: Tensor
) -> tuple[Tensor, ...]:
    """function(*streams, lengths), of each group by itself: for one that takes every video on its own.

    streams: (B, T, D), or None for what is not there; lengths: (B,). The results are (B, T, ·), and zero past the
    lengths where there is more than one group.
    """
    present = [x for x in streams if x is not None]
    fit = lengths.ndim == 1 and all(x.ndim == 3 and x.shape[:2] == (len(lengths), present[0].shape[1]) for x in present)
    groups = split(lengths.tolist()) if fit else []
    if len(groups) < 2:  # and a batch that does not fit is refused where it is looked at
        return function(*streams, lengths)
    rows, found = present[0].shape[1], []
    for group in groups:
        index = torch.tensor(group)
        own = lengths[index]
        longest = int(own.max())
        results = function(*(None if x is None else x[index, :longest] for x in streams), own)
        # Zero past each length too: which batch-mates it has, no video is to tell.
        found.append([F.pad(zero_padding(x, own), (0, 0, 0, rows - longest)) for x in results])
    back = torch.tensor([i for group in groups for i in group]).argsort()
    return tuple(torch.cat(parts)[back] for parts in zip(*found, strict=True))
