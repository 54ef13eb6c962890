"""The calls of every Triton op in training steps, at real sizes, for ahead-of-time compilation.

The calls of the GEMM kernels are those that are tuned. A new op adds its calls to `others`.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from avadclip_fast.kernels import (
    add_act,
    attention_pool,
    binary_head,
    column_sums,
    distill_loss,
    keep,
    layer_norm,
    prefix_attention,
    prompt_similarity,
    similarity_graph,
    window_attention,
)
from torch import Tensor

from avadclip_fast.engine.tune import B, C, D, T, gemms
from avadclip_fast.models.text import PREFIX
from avadclip_fast.ops.prefix_attention import LONGEST
from avadclip_fast.ops.prompt_similarity import MOST_CLASSES
from avadclip_fast.ops.window_attention import longest


def others(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields (name, forward and backward pass) of each call of the ops other than the GEMM kernels."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    lengths = torch.full((B,), T, device=device)

    def norm() -> None:
        x, weight, bias = draw(B, T, D), *draw(2, D).float()
        out, stats = layer_norm.forward(x, weight, bias, dtype)
        layer_norm.backward(out, x, weight, stats, [True, True, True])
        layer_norm.backward(out, x, weight, stats, [True, False, False])
        layer_norm.backward(out, x, weight, stats, [True, True, True], plus=x)
        layer_norm.backward(out, x, weight, stats, [True, False, False], plus=x)

    def head() -> None:
        x, weight, bias, dot, direct = draw(B, T, D), draw(4 * D, D), draw(4 * D), draw(4 * D), draw(D)
        out, y = binary_head.forward(x, weight, bias, dot, direct)
        binary_head.backward(out, x, weight, dot, direct, y, [True] * 5)

    def windows(window: int, ragged: Tensor | None) -> None:
        q, k, v, residual = (draw(B, T, D) for _ in range(4))
        out = window_attention.forward(q, k, v, window, 1, ragged, residual)
        window_attention.backward(out, q, k, v, window, 1, ragged)

    def names(rows: int) -> None:
        qkv = draw(PREFIX + C * rows, 3 * D)
        out, lse = prefix_attention.forward(qkv, PREFIX, rows, D // 64)
        prefix_attention.backward(out, qkv, out, lse, PREFIX, rows, D // 64)

    def graph() -> None:
        x, values = draw(B, T, D), draw(B, T, D // 2)
        weights, norms, sums = similarity_graph.forward(x, lengths, 0.7)
        g, _ = similarity_graph.mix_backward(similarity_graph.mix(weights, values, lengths), weights, values, lengths)
        similarity_graph.backward(g, x, lengths, weights, norms, sums, 0.7)

    def prompts(ragged: Tensor | None, classes: int = C) -> None:
        x, p, logits = draw(B, T, D), draw(B, classes, D), draw(B, T)
        out, pooled = attention_pool.forward(x, logits, ragged)
        attention_pool.backward(out, pooled, x, logits, ragged)
        out, *norms = prompt_similarity.forward(x, p, 0.07)
        prompt_similarity.backward(out, out, x, p, *norms, 0.07)

    def sums(activation: str, width: int) -> None:
        x, residual = draw(B, T, width), draw(B, T, width)
        out = add_act.forward(x, residual, activation)
        add_act.backward(out, *((out, None) if activation == "relu" else (x, residual)), activation)

    def distillation(ragged: Tensor | None) -> None:
        loss, *by, terms = distill_loss.forward(draw(B, T, D), draw(B, T, D), draw(B, T, D), ragged)
        distill_loss.backward(loss, *by, terms)

    yield "norm", norm
    yield "head", head
    for window in dict.fromkeys((4, 64, longest(dtype))):
        yield f"windows of {window}", partial(windows, window, None)
        yield f"windows of {window}, lengths", partial(windows, window, lengths)
    yield "class names", partial(names, 13)
    yield "class names as long as they may be", partial(names, LONGEST)
    yield "graph", graph
    yield "prompts", partial(prompts, None)
    yield "prompts, lengths", partial(prompts, lengths)
    # Not a multiple of 16, which is compiled on its own and takes fewer registers.
    yield "prompts of many classes", partial(prompts, None, MOST_CLASSES - 1)
    yield "sums, relu", partial(sums, "relu", D)
    yield "sums, quick_gelu", partial(sums, "quick_gelu", D // 2)
    yield "activation", lambda: add_act.forward(draw(1, B * T, 4 * D), None, "quick_gelu")
    yield "column sums", lambda: column_sums.column_sums(draw(B * T, 2 * D)[:, D:], dtype)
    yield "dropout", lambda: keep.forward(torch.zeros((), device=device, dtype=torch.int64), [B, T, D], 0.1)
    yield "distillation", partial(distillation, None)
    yield "distillation, lengths", partial(distillation, lengths)


def calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    yield from gemms(dtype, device)
    yield from others(dtype, device)
