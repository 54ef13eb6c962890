"""The calls of linear_act and gated_fusion in one training step, at real sizes: what is compiled ahead and tuned."""

from collections.abc import Callable, Iterator

import torch
from avadclip_fast.kernels import gated_fusion, linear_act
from torch import Tensor

B, T, D = 96, 256, 512


def calls(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
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
    yield "prompts", linear(4 * D, activation="quick_gelu", shape=(B, 7))
    yield "graph weights", linear(D, transposed=True)
    yield "graph convolution", linear(D, taps=5)
    yield "graph convolution, lengths", linear(D, taps=5, lengths=True)
    yield "uncertainty", linear(D, taps=3, activation="relu", residual=True)
    yield "uncertainty, lengths", linear(D, taps=3, activation="relu", residual=True, lengths=True)
    yield "audio", linear(D, taps=2, activation="relu", dilation=4, causal=True)
    yield "fusion", fusion
