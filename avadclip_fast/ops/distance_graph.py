"""distance_graph: mixes features with weights that decay exponentially in time."""

import torch
from torch import Tensor

from .. import _build, reference
from . import _dispatch
from ._autocast import without_autocast
from ._check import check_lengths, check_positive, check_tensors
from ._derivatives import differentiable


def _compiled(values: Tensor, scale: float, lengths: Tensor | None) -> Tensor:
    return torch.ops.avadclip_fast.distance_graph(values, scale, lengths)


_dispatch.register("distance_graph", "reference", without_autocast(reference.distance_graph))
_dispatch.register("distance_graph", "cpp", _compiled, lambda values, scale, lengths: _build.cpp_reason(values))
_dispatch.register("distance_graph", "cuda", _compiled, lambda values, scale, lengths: _build.cuda_reason(values))

torch.library.define("avadclip_fast::distance_graph", "(Tensor values, float scale, Tensor? lengths) -> Tensor")


@torch.library.register_fake("avadclip_fast::distance_graph")
def _(values, scale, lengths):
    return values.new_empty(values.shape)


def _save(ctx, inputs, output):
    _, ctx.scale, lengths = inputs
    ctx.save_for_backward(lengths)


def _backward(ctx, grad):
    (lengths,) = ctx.saved_tensors
    return torch.ops.avadclip_fast.distance_graph(grad, ctx.scale, lengths), None, None


differentiable("distance_graph", _backward, _save)


def distance_graph(
    values: Tensor, scale: float = torch.e, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Mixes snippets by temporal distance, with unnormalised weights (official code of arXiv 2504.04495, `disAdj`).

        out_i = sum_j exp(-|i - j| / scale) values_j

    The matrix is symmetric, so the backward pass is the op itself.

    values: (B, T, E) floating point; scale: > 0, in snippets
    lengths: (B,) int, to restrict i and j to t < lengths[b] (other rows of out are 0), or None
    Returns (B, T, E) in the values' dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or scale.
    Precision: the compiled backends accumulate in float32 or float64. A non-finite value reaches all rows of its video:
    unchanged in the compiled backends, as NaN in the reference where a weight underflows to 0.
    Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("distance_graph", ("values", values, "B T E"))
    check_positive("distance_graph", scale=scale)
    check_lengths("distance_graph", lengths, sizes["B"], sizes["T"], values.device)
    return _dispatch.run("distance_graph", backend, values, scale, lengths)
