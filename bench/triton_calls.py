"""The calls of every Triton op in training steps, at real sizes: what is compiled ahead, and of the GEMM family tuned.

A new op adds its calls to `others`.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from avadclip_fast.kernels import (
    attention_pool,
    distill_loss,
    gated_fusion,
    linear_act,
    prompt_similarity,
    similarity_graph,
    window_attention,
)
from torch import Tensor

B, T, D, C = 96, 256, 512, 7


def gemms(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, forward and backward pass) of each call; device "meta" makes tensors without memory."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def linear(
        outputs: int, width: int = D, taps: int = 0, activation="none", norm=False, residual=False, dot=False,
        dilation=1, causal=False, lengths=False, transposed=False, shape=(B, T),
    ) -> Callable[[], None]:  # fmt: skip
        def run() -> None:
            x = draw(*shape, width)
            weight = draw(width, outputs).T if transposed else draw(outputs, width, *((taps,) if taps else ()))
            u = draw(outputs) if dot else None
            r = draw(*shape, outputs) if residual else None
            scale, shift = (draw(width), draw(width)) if norm else (None, None)
            n = torch.full((B,), T, device=device) if lengths else None
            keep = dot or activation == "quick_gelu" or (activation == "relu" and residual)
            out, y, stats = linear_act.forward(
                x, weight, draw(outputs), activation, r, scale, shift, dilation, causal, n, u, keep
            )
            needs = [True, True, True, norm, norm, dot]
            y = y if keep else out
            linear_act.backward(
                torch.ones_like(out), x, weight, activation, scale, shift, dilation, causal, n, u, y, stats, needs
            )

        return run

    def fusion() -> None:
        weights = [draw(*shape) for shape in ((D, 2 * D), (D,), (D, 2 * D), (D,), (D, D), (D,))]
        visual, audio = draw(B, T, D), draw(B, T, D)
        out, *saved = gated_fusion.forward(visual, audio, *weights, True)
        gated_fusion.backward(torch.ones_like(out), visual, audio, *weights[::2], *saved)

    yield "qkv", linear(3 * D, norm=True)
    yield "projection", linear(D, residual=True)
    yield "mlp", linear(4 * D, activation="quick_gelu", norm=True)
    yield "mlp projection", linear(D, 4 * D, residual=True)
    yield "binary head", linear(4 * D, activation="quick_gelu", dot=True)
    yield "prompt layer", linear(4 * D, activation="quick_gelu", shape=(B, C))
    yield "graph weights", linear(D, transposed=True)
    yield "graph convolution", linear(D, taps=5)
    yield "graph convolution, lengths", linear(D, taps=5, lengths=True)
    yield "uncertainty", linear(D, taps=3, activation="relu", residual=True)
    yield "uncertainty, lengths", linear(D, taps=3, activation="relu", residual=True, lengths=True)
    yield "audio", linear(D, taps=2, activation="relu", dilation=4, causal=True)
    yield "fusion", fusion


def others(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, forward and backward pass) of each call of an op that is no GEMM of the family."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    lengths = torch.full((B,), T, device=device)

    def windows(window: int, ragged: Tensor | None) -> None:
        qkv = draw(B, T, 3 * D)
        window_attention.backward(window_attention.forward(qkv, window, 1, ragged), qkv, window, 1, ragged)

    def graph() -> None:
        x, values = draw(B, T, D), draw(B, T, D // 2)
        weights, norms, sums = similarity_graph.forward(x, lengths, 0.7)
        g, _ = similarity_graph.mix_backward(similarity_graph.mix(weights, values, lengths), weights, values, lengths)
        similarity_graph.backward(g, x, lengths, weights, norms, sums, 0.7)

    def prompts(ragged: Tensor | None) -> None:
        x, p, logits = draw(B, T, D), draw(B, C, D), draw(B, T)
        out, pooled = attention_pool.forward(x, logits, ragged)
        attention_pool.backward(out, pooled, x, logits, ragged)
        out, *norms = prompt_similarity.forward(x, p, 0.07)
        prompt_similarity.backward(out, out, x, p, *norms, 0.07)

    def distillation(ragged: Tensor | None) -> None:
        distill_loss.forward(draw(B, T, D), draw(B, T, D), draw(B, T, D), ragged)

    for window in (4, 64):
        yield f"windows of {window}", partial(windows, window, None)
        yield f"windows of {window}, lengths", partial(windows, window, lengths)
    yield "graph", graph
    yield "prompts", partial(prompts, None)
    yield "prompts, lengths", partial(prompts, lengths)
    yield "distillation", partial(distillation, None)
    yield "distillation, lengths", partial(distillation, lengths)


def calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    yield from gemms(dtype, device)
    yield from others(dtype, device)
