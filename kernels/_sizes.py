"""Sizes of launches. Triton's functions of these names serve kernels too, and take microseconds for it on the host.

And jit, which says of which of them a kernel is independent.
"""

import functools

import triton

# Triton compiles a kernel anew for integers and pointers that are multiples of 16: loads along a contiguous dimension
# gain by it. Numbers of videos and rows bound other dimensions, so they gain nothing, and the last batch of an epoch,
# which is smaller, would have kernels compiled a second time. The same goes for what depends on these numbers alone:
# stride_lb, a video's rows of logits, and rstd, which lies behind the means of all rows. Not for kernels of which rows
# are a contiguous dimension, as of similarity_graph's weights.
jit = functools.partial(
    triton.jit, do_not_specialize_on_alignment=("videos", "rows", "count", "group", "stride_lb", "rstd")
)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
