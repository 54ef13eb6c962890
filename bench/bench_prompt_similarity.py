"""prompt_similarity against normalization followed by a product."""

from collections.abc import Iterator

import torch
from torch import Tensor

from avadclip_fast import ops, reference

from . import harness
from .harness import Bench, Work

BATCH, ROWS, DIM, CLASSES, TEMPERATURE = 96, 256, 512, 7, 0.07


def official(features: Tensor, prompts: Tensor) -> Tensor:
    frames = features / features.norm(dim=-1, keepdim=True)
    prompts = prompts / prompts.norm(dim=-1, keepdim=True)
    return frames @ prompts.permute(0, 2, 1) / TEMPERATURE


def cases(dtype: torch.dtype) -> Iterator[Bench]:
    def make() -> tuple:
        shapes = ((BATCH, ROWS, DIM), (BATCH, CLASSES, DIM))
        return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)

    read, products = BATCH * ROWS * DIM * dtype.itemsize, 2 * BATCH * ROWS * DIM * CLASSES
    yield Bench(
        f"[{BATCH}, {ROWS}, {DIM}], {CLASSES} classes",
        make,
        {"official": official}
        | harness.compiled(reference.prompt_similarity)
        | harness.served("prompt_similarity", ops.prompt_similarity, make()),
        Work(read, products),
        Work(3 * read, 3 * products),  # read, read again for the gradients, gradient written
        waits=(),
    )


if __name__ == "__main__":
    harness.main("bench_prompt_similarity", cases)
