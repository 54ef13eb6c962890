"""topk_mean: ragged top-k mean over time."""

import torch
from torch import Tensor

from .. import _build, reference
from ..reference._numerics import at_least_float32
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_counts, check_lengths, check_tensors
from ._derivatives import differentiable

SHARED_ROWS = 10_240  # a column's keys that a block keeps in shared memory (SHARED_BYTES in csrc/stable_cuda.h)


def _too_long(rows: int) -> str | None:
    if rows <= SHARED_ROWS:
        return None
    return f"columns of more than {SHARED_ROWS} rows are read from memory many times, and torch's sort is faster"


def _compiled(scores: Tensor, lengths: Tensor, divisor: int) -> Tensor:
    return torch.ops.avadclip_fast.topk_mean(scores, lengths, divisor)[0]


_dispatch.register("topk_mean", "reference", without_autocast(reference.topk_mean))
_dispatch.register("topk_mean", "cpp", _compiled, lambda scores, lengths, divisor: _build.cpp_reason(scores))
_dispatch.register(
    "topk_mean",
    "cuda",
    _compiled,
    lambda scores, lengths, divisor: _build.cuda_reason(scores),
    lambda scores, lengths, divisor: _too_long(scores.shape[1]),
)

# index: (B, C, K) int32, the selected t of each column in ascending order, then -1; K = min(T // divisor + 1, T)
torch.library.define(
    "avadclip_fast::topk_mean", "(Tensor scores, Tensor lengths, int divisor) -> (Tensor mean, Tensor index)"
)
torch.library.define("avadclip_fast::topk_mean_backward", "(Tensor grad, Tensor index, SymInt rows) -> Tensor")


@torch.library.register_fake("avadclip_fast::topk_mean")
def _(scores, lengths, divisor):
    batch, rows, classes = scores.shape
    top = min(rows // divisor + 1, rows)
    return scores.new_empty(batch, classes), scores.new_empty(batch, classes, top, dtype=torch.int32)


@torch.library.register_fake("avadclip_fast::topk_mean_backward")
def _(grad, index, rows):
    return grad.new_empty(grad.shape[0], rows, grad.shape[1])


def _save(ctx, inputs, output):
    ctx.rows = inputs[0].shape[1]
    ctx.save_for_backward(output[1])


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return torch.ops.avadclip_fast.topk_mean_backward(grad, index, ctx.rows), None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _twice(ctx, grad):
    (index,) = ctx.saved_tensors
    index = index.transpose(1, 2).long()  # [B, K, C]
    chosen = torch.where(index >= 0, at_least_float32(grad).gather(1, index.clamp_min(0)), 0)
    return (chosen.sum(1) / (index >= 0).sum(1)).to(grad.dtype), None, None


differentiable("topk_mean", _backward, _save, one_result=True)
differentiable("topk_mean_backward", _twice, _save_backward)


def topk_mean(scores: Tensor, lengths: Tensor, divisor: int = 16, backend: str | None = None) -> Tensor:
    """Mean of each video's k highest scores, the multiple-instance pooling of the official code of arXiv 2504.04495.

        k_b = min(lengths[b] // divisor + 1, lengths[b])
        out_bc = mean of the k_b largest scores_btc over t < lengths[b]

    Ties, and with them the gradient, go to the lowest t. NaN propagates.

    scores: (B, T, C) floating point; lengths: (B,) int in 1..T; divisor: >= 1
    Returns (B, C) in the scores' dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or divisor.
    Precision: the compiled backends sum in float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("topk_mean", ("scores", scores, "B T C"))
    check_counts("topk_mean", divisor=divisor)
    check_lengths("topk_mean", lengths, sizes["B"], sizes["T"], scores.device, required=True)
    return _dispatch.run("topk_mean", backend, scores, lengths, divisor)
