"""distance_graph: features mixed with weights that decay exponentially in time."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_positive, check_tensors

_dispatch.register("distance_graph", "reference", reference.distance_graph)


def distance_graph(
    values: Tensor, scale: float = torch.e, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Mixes each snippet with its neighbours in time; the weights are not normalised.

        out_i = sum_j exp(-|i - j| / scale) values_j

    values: (B, T, E) floating point; scale: > 0, in snippets
    lengths: (B,) int; i and j then run over t < lengths[b] (other rows of out are 0), else over all T
    Returns (B, T, E) in the values' dtype. Raises ValueError on shapes, dtypes, lengths or a scale that do not fit.
    The matrix is symmetric, so the backward pass is the op itself. Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("distance_graph", ("values", values, "B T E"))
    check_positive("distance_graph", scale=scale)
    check_lengths("distance_graph", lengths, sizes["B"], sizes["T"], values.device)
    return _dispatch.run("distance_graph", backend, values, scale, lengths)
