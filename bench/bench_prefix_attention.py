"""prefix_attention against causal attention over whole sequences, and attention over all rows under one mask."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

PREFIX, DIM, HEADS = 11, 512, 8  # of CLIP's text transformer under learnable prompts


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    for classes, rows in ((7, 13), (14, 16)):  # XD-Violence, UCF-Crime
        count = PREFIX + classes * rows

        def make(count=count) -> tuple:
            return (torch.randn(count, 3 * DIM, dtype=dtype, requires_grad=True),)

        # Pairs of a query and a key, and for each pair a product with the key and one with the value.
        pairs = PREFIX * (PREFIX + 1) // 2 + classes * (rows * PREFIX + rows * (rows + 1) // 2)
        every = count * DIM * dtype.itemsize
        sizes = {"prefix": PREFIX, "rows": rows, "heads": HEADS}
        yield Bench(
            f"{classes} classes, [{PREFIX} + {classes}·{rows}, 3·{DIM}]",
            make,
            {"whole sequences": partial(whole, classes), "SDPA, masked": masked(classes, rows)}
            | harness.compiled(partial(reference.prefix_attention, **sizes))
            | harness.served("prefix_attention", partial(ops.prefix_attention, **sizes), make()),
            Work(4 * every, 4 * pairs * DIM),
            Work(11 * every, 14 * pairs * DIM),  # backward reads qkv and the gradient, and writes the gradient of qkv
            waits=(),
        )


def heads(qkv: Tensor) -> list[Tensor]:
    return [x.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for x in qkv.chunk(3, dim=-1)]


def whole(classes: int, qkv: Tensor) -> Tensor:
    """The prefix is part of every sequence, as in CLIP's own transformer."""
    sequences = torch.cat([qkv[:PREFIX].expand(classes, -1, -1), qkv[PREFIX:].unflatten(0, (classes, -1))], dim=1)
    out = F.scaled_dot_product_attention(*heads(sequences), is_causal=True).transpose(1, 2).flatten(2)
    return torch.cat([out[0, :PREFIX], out[:, PREFIX:].flatten(0, 1)])


def masked(classes: int, rows: int):
    i = torch.arange(PREFIX + classes * rows)
    of = torch.where(i < PREFIX, -1, (i - PREFIX) // rows)
    sees = (i[:, None] >= i) & ((of[:, None] == of) | (of == -1))

    def call(qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*heads(qkv), attn_mask=sees).transpose(0, 1).flatten(1)

    return call


if __name__ == "__main__":
    harness.main("bench_prefix_attention", cases)
