"""Folding around linear_act: products of weights instead of products with the features, forward and backward.

FLOPs of the forward pass with M = B·T rows of width D: binary head 8MD² instead of 16MD² (+ 8D²); k3-k1 6MD² + 6D³
instead of 8MD²; attention 4MD² + 4D³ instead of 8MD², besides the attention itself; gc1 with gc3 the same number, but
their input is read once. The backward pass has twice as many.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from avadclip_fast import ops
from avadclip_fast.modules.linear_act import binary_head
from avadclip_fast.modules.uncertainty_head import fold
from avadclip_fast.modules.window_attention import fold as fold_attention

from . import harness
from .harness import Bench, Work

T, D, WINDOW = 256, 512, 4

attend = partial(ops.window_attention, window=WINDOW)


def folded_attention(x: Tensor, query: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor]) -> Tensor:
    return attend(ops.linear_act(x, *query), x, ops.linear_act(x, *value))


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    batch = 96 if harness.on_gpu() else 16
    shape = (batch, T, D)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()

    def layer(weight: Tensor, bias: Tensor) -> SimpleNamespace:
        return SimpleNamespace(weight=weight, bias=bias)

    def bench(name: str, plain: Callable, folded: Callable, flops: int, *weights: tuple[int, ...]) -> Bench:
        return Bench(
            f"{name}, [{batch}, {T}, {D}]",
            lambda: (torch.randn(shape, dtype=dtype, requires_grad=True), *(draw(*w) for w in weights)),
            {"reference": plain, "folded": folded},
            Work(0, flops),
            Work(0, 3 * flops),
            waits=(),
        )

    rows, conv = batch * T, ops.linear_act
    yield bench(
        "binary head",
        lambda x, w1, b1, w2, b2, w3, b3: conv(conv(conv(x, w1, b1, "quick_gelu"), w2, b2) + x, w3, b3)[..., 0],
        lambda x, w1, b1, w2, b2, w3, b3: binary_head(
            x, SimpleNamespace(c_fc=layer(w1, b1), c_proj=layer(w2, b2), backend=None), layer(w3, b3)
        ),
        8 * rows * D**2,
        (4 * D, D), (4 * D,), (D, 4 * D), (D,), (1, D), (1,),
    )  # fmt: skip
    yield bench(
        "k3-k1",
        lambda x, w3, b3, w1, b1: conv(conv(x, w3, b3), w1, b1),
        lambda x, w3, b3, w1, b1: conv(x, *fold(layer(w3, b3), layer(w1, b1))),
        6 * rows * D**2 + 6 * D**3,
        (D, D, 3), (D,), (D, D, 1), (D,),
    )  # fmt: skip
    yield bench(
        "window attention",
        lambda x, w, b, wo, bo: conv(attend(*conv(x, w, b).chunk(3, dim=-1)), wo, bo),
        lambda x, w, b, wo, bo: folded_attention(x, *fold_attention(w, b, layer(wo, bo))),
        4 * rows * D**2 + 4 * D**3 + 4 * rows * WINDOW * D,
        (3 * D, D), (3 * D,), (D, D), (D,),
    )  # fmt: skip
    yield bench(
        "gc1 and gc3, convolution",
        lambda x, w1, b1, w3, b3: conv(x, w1, b1) + conv(x, w3, b3),
        lambda x, w1, b1, w3, b3: sum(conv(x, torch.cat([w1, w3]), torch.cat([b1, b3])).chunk(2, dim=-1)),
        10 * rows * D**2,
        (D // 2, D, 5), (D // 2,), (D // 2, D, 5), (D // 2,),
    )  # fmt: skip
    yield bench(
        "gc1 and gc3, xW",
        lambda x, w1, w3: conv(x, w1.T) + conv(x, w3.T),
        lambda x, w1, w3: sum(conv(x, torch.cat([w1, w3], dim=1).T).chunk(2, dim=-1)),
        2 * rows * D**2,
        (D, D // 2), (D, D // 2),
    )  # fmt: skip


if __name__ == "__main__":
    harness.main("bench_folds", cases)
