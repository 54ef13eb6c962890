"""linear_act, the GEMM kernels, against the reference: cuBLAS (MKL, oneDNN on a CPU) with separate pointwise steps."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

ROWS, DIM = 256, 512


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    batch = 96 if harness.on_gpu() else 16
    norm, quick, relu = {"norm": True}, {"activation": "quick_gelu"}, {"activation": "relu"}
    # Tune one case with a full prologue and epilogue, and one that only adds.
    yield case("mlp", dtype, batch, DIM, 4 * DIM, **norm, **quick, tuned=True)
    yield case("mlp, back", dtype, batch, 4 * DIM, DIM, residual=True, tuned=True)
    yield case("projection", dtype, batch, DIM, DIM, residual=True)
    yield case("qkv", dtype, batch, DIM, 3 * DIM, **norm)
    yield case("binary head", dtype, batch, DIM, 4 * DIM, **quick, dot=True)
    yield case("audio convolution", dtype, batch, DIM, DIM, taps=2, dilation=4, causal=True, **relu)
    yield case("uncertainty convolution", dtype, batch, DIM, DIM, taps=3, residual=True, **relu)
    yield case("graph convolution", dtype, batch, DIM, DIM, taps=5)


def case(
    name: str, dtype: torch.dtype, batch: int, width: int, outputs: int, taps: int = 0, norm=False, residual=False,
    dot=False, tuned=False, **options,
) -> Bench:  # fmt: skip
    """Returns the benchmark of one layer. options: arguments of ops.linear_act other than tensors."""
    kernel = (taps,) if taps else ()

    def make() -> tuple:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape) * scale).to(dtype).requires_grad_()

        weight = draw(outputs, width, *kernel, scale=(width * max(taps, 1)) ** -0.5)
        extras = [draw(width), draw(width)] if norm else []
        extras += [draw(batch, ROWS, outputs)] if residual else []
        extras += [draw(outputs)] if dot else []
        return draw(batch, ROWS, width), weight, draw(outputs), *extras

    def named(extras: tuple) -> dict:
        extras, found = list(extras), dict(options)
        if norm:
            found["norm"] = (extras.pop(0), extras.pop(0))
        if residual:
            found["residual"] = extras.pop(0)
        if dot:
            found["dot"] = extras.pop(0)
        return found

    def fused(x: Tensor, weight: Tensor, bias: Tensor, *extras: Tensor, backend: str | None = None) -> Tensor:
        return ops.linear_act(x, weight, bias, **named(extras), backend=backend)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, *extras: Tensor) -> Tensor:
        return reference.linear_act(x, weight, bias, **named(extras))

    rows, products = batch * ROWS, 2 * batch * ROWS * width * outputs * max(taps, 1)
    size = dtype.itemsize
    written = rows * (1 if dot else outputs)
    added = rows * outputs if residual else 0
    weights = width * outputs * max(taps, 1)

    def product_alone(x: Tensor, weight: Tensor, bias: Tensor, *extras: Tensor) -> Tensor:
        return F.linear(x, weight.flatten(1)[:, :width], bias)

    return Bench(
        f"{name}, {rows} x {width} -> {outputs}" + (f", {taps} taps" if taps else ""),
        make,
        harness.compiled(plain, tuned) | harness.served("linear_act", fused, make()),
        Work(size * (rows * width + written + added + weights), products),
        Work(size * (3 * rows * width + 3 * written + 2 * added + 3 * weights), 3 * products),
        parts={} if taps else {"product alone": product_alone},
        waits=(),
    )


if __name__ == "__main__":
    harness.main("bench_linear_act", cases)
