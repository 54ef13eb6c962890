"""uniform_pool: pools videos of any length to a fixed number of rows."""

import torch
from torch import Tensor

from .. import _build, reference
from . import _dispatch
from ._check import check_counts, check_packed, check_tensors
from ._derivatives import adjoint


def _compiled(features: Tensor, lengths: Tensor, rows: int) -> Tensor:
    return torch.ops.avadclip_fast.uniform_pool(features, lengths, rows)


_dispatch.register("uniform_pool", "reference", reference.uniform_pool)
_dispatch.register("uniform_pool", "cpp", _compiled, lambda features, lengths, rows: _build.cpp_reason(features))
_dispatch.register("uniform_pool", "cuda", _compiled, lambda features, lengths, rows: _build.cuda_reason(features))

torch.library.define("avadclip_fast::uniform_pool", "(Tensor features, Tensor lengths, SymInt rows) -> Tensor")
torch.library.define("avadclip_fast::uniform_pool_backward", "(Tensor grad, Tensor lengths, SymInt total) -> Tensor")


@torch.library.register_fake("avadclip_fast::uniform_pool")
def _(features, lengths, rows):
    return features.new_empty(lengths.shape[0], rows, features.shape[1])


@torch.library.register_fake("avadclip_fast::uniform_pool_backward")
def _(grad, lengths, total):
    return grad.new_empty(total, grad.shape[2])


adjoint("uniform_pool", of="uniform_pool_backward", dim=0)
adjoint("uniform_pool_backward", of="uniform_pool", dim=1)


def uniform_pool(features: Tensor, lengths: Tensor, rows: int, backend: str | None = None) -> Tensor:
    """Pools each video to `rows` rows by averaging equal time ranges (official code of arXiv 2504.04495).

        bounds_r = int(r · n_b / rows),   out_br = mean of features_b[bounds_r : bounds_{r+1}]

    An empty range, which occurs if n_b < rows, takes its first row.

    features: (N, D) floating point, the videos concatenated; lengths: (B,) int >= 1, with sum N; rows: >= 1
    Returns (B, rows, D) in the features' dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or `rows`.
    Precision: sums in float32 or finer (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    check_tensors("uniform_pool", ("features", features, "N D"))
    check_counts("uniform_pool", rows=rows)
    check_packed("uniform_pool", lengths, features.shape[0], features.device)
    return _dispatch.run("uniform_pool", backend, features, lengths, rows)
