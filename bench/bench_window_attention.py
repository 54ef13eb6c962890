"""window_attention against attention over all T rows under a mask, SDPA over the windows, and FlexAttention."""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM = 96, 256, 512


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    def make() -> tuple:
        return tuple(torch.randn(BATCH, ROWS, DIM, dtype=dtype, requires_grad=True) for _ in range(3))

    for window in (4, 64):

        def sdpa(*qkv: Tensor, window=window) -> Tensor:
            windows = (x.reshape(BATCH * ROWS // window, 1, window, DIM) for x in qkv)
            return F.scaled_dot_product_attention(*windows).reshape(BATCH, ROWS, DIM)

        every = BATCH * ROWS * DIM * dtype.itemsize
        products = 4 * BATCH * ROWS * window * DIM
        yield Bench(
            f"windows of {window}, [{BATCH}, {ROWS}, {DIM}]",
            make,
            {"official": masked(window), "SDPA": sdpa}
            | flex(window)
            | harness.compiled(partial(reference.window_attention, window=window))
            | harness.served("window_attention", partial(ops.window_attention, window=window), make()),
            Work(4 * every, products),
            Work(11 * every, 3.5 * products),  # q, k, v, out; backward reads them and the gradient, writes three
            waits=(),
        )


def masked(window: int):
    """Attends over all pairs of rows, with pairs across windows masked to minus infinity."""
    of = torch.arange(ROWS) // window
    mask = torch.zeros(ROWS, ROWS).masked_fill(of[:, None] != of, -math.inf)

    def official(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ k.transpose(1, 2) * DIM**-0.5 + mask.to(q.dtype), dim=-1) @ v

    return official


def flex(window: int) -> dict:
    """FlexAttention with a block mask of the windows; on a CPU it has no backward pass."""
    if (device := torch.get_default_device()).type == "cpu":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i // window == j // window, None, None, ROWS, ROWS, device)
    attend = torch.compile(flex_attention, mode=harness.MODES["torch.compile"], dynamic=False)

    def call(*qkv: Tensor) -> Tensor:
        return attend(*(x[:, None] for x in qkv), block_mask=mask)[:, 0]

    return {"FlexAttention": call}


if __name__ == "__main__":
    harness.main("bench_window_attention", cases)
