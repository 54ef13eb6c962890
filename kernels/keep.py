"""Dropout masks on Triton: eight elements from each draw of 128 bits, written as one word of eight bytes.

Torch draws 32 bits an element, and its kernel is bound by drawing, not by what it writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv

ROUNDS = tl.constexpr(7)  # of Philox4x32: the fewest that pass every test of BigCrush (Salmon et al., SC11)


@triton.jit
def pair(drawn, dropped):
    """Two kept elements as bytes of 0 or 1, from the two halves of 32 bits."""
    low = ((drawn & 0xFFFF).to(tl.int32) >= dropped).to(tl.int64)
    return low | (((drawn >> 16) & 0xFFFF).to(tl.int32) >= dropped).to(tl.int64) << 8


@triton.jit
def keep_kernel(
    seed,  # [] int64
    out,  # [words] int64
    words,
    dropped,  # of the 65536 values of 16 bits
    WORDS: tl.constexpr,
):
    i = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    a, b, c, d = tl.randint4x(tl.load(seed), i, ROUNDS)
    kept = pair(a, dropped) | pair(b, dropped) << 16 | pair(c, dropped) << 32 | pair(d, dropped) << 48
    tl.store(out + i, kept, mask=i < words)


def forward(seed: Tensor, shape: list[int], p: float) -> Tensor:
    """The op: a bool mask of that shape, False for a share p of the elements, rounded to 1/65536."""
    count = torch.Size(shape).numel()
    words = cdiv(count, 8)
    out = seed.new_empty(words)
    if words:
        dropped = min(round(p * 2**16), 2**16 - 1) if p < 1 else 2**16
        side = 1024
        keep_kernel[(cdiv(words, side),)](seed, out, words, dropped, WORDS=side, num_warps=8)
    return out.view(torch.bool)[:count].view(shape)
