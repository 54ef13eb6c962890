"""pack_rows and unpack_rows: from a padded batch to its valid rows, and back."""

import torch
from torch import Tensor

from .. import _build, reference
from . import _dispatch
from ._check import check_counts, check_lengths, check_packed, check_tensors
from ._derivatives import adjoint

_dispatch.register("pack_rows", "reference", reference.pack_rows)
_dispatch.register("unpack_rows", "reference", reference.unpack_rows)


def _pack(padded: Tensor, lengths: Tensor, total: int) -> Tensor:
    return torch.ops.avadclip_fast.pack_rows(padded, lengths, total)


def _unpack(packed: Tensor, lengths: Tensor, rows: int) -> Tensor:
    return torch.ops.avadclip_fast.unpack_rows(packed, lengths, rows)


for _op, _function in (("pack_rows", _pack), ("unpack_rows", _unpack)):
    _dispatch.register(_op, "cpp", _function, lambda x, lengths, size: _build.cpp_reason(x))
    _dispatch.register(_op, "cuda", _function, lambda x, lengths, size: _build.cuda_reason(x))

# Each is the other's backward pass.
torch.library.define("avadclip_fast::pack_rows", "(Tensor padded, Tensor lengths, SymInt total) -> Tensor")
torch.library.define("avadclip_fast::unpack_rows", "(Tensor packed, Tensor lengths, SymInt rows) -> Tensor")


@torch.library.register_fake("avadclip_fast::pack_rows")
def _(padded, lengths, total):
    return padded.new_empty(total, padded.shape[2])


@torch.library.register_fake("avadclip_fast::unpack_rows")
def _(packed, lengths, rows):
    return packed.new_empty(lengths.shape[0], rows, packed.shape[1])


adjoint("pack_rows", of="unpack_rows", dim=1)
adjoint("unpack_rows", of="pack_rows", dim=0)


def pack_rows(padded: Tensor, lengths: Tensor, total: int | None = None, backend: str | None = None) -> Tensor:
    """Concatenates the valid rows of a padded batch, so that row-wise work spends nothing on padding.

        out = [padded_b[: lengths[b]] for each b],      N = sum(lengths)

    padded: (B, T, D) floating point; lengths: (B,) int in 1..T
    total: N; computed from `lengths` if None, which synchronises host and device on a GPU
    Returns (N, D) in the same dtype.
    Raises ValueError on invalid shapes, dtypes, devices or lengths.
    Precision: exact. Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("pack_rows", ("padded", padded, "B T D"))
    check_lengths("pack_rows", lengths, sizes["B"], sizes["T"], padded.device, required=True)
    if total is None:
        total = int(lengths.sum())
    check_packed("pack_rows", lengths, total, padded.device)
    return _dispatch.run("pack_rows", backend, padded, lengths, total)


def unpack_rows(packed: Tensor, lengths: Tensor, rows: int, backend: str | None = None) -> Tensor:
    """Scatters packed rows into a padded batch, the inverse of `pack_rows`; rows t >= lengths[b] are zero.

    packed: (N, D) floating point; lengths: (B,) int in 1..rows, with sum N; rows: T
    Returns (B, T, D) in the same dtype.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or `rows`.
    Precision: exact. Deterministic. Backends: see `avadclip-fast env`.
    """
    check_tensors("unpack_rows", ("packed", packed, "N D"))
    check_counts("unpack_rows", rows=rows)
    check_packed("unpack_rows", lengths, packed.shape[0], packed.device)
    check_lengths("unpack_rows", lengths, lengths.shape[0], rows, packed.device)
    return _dispatch.run("unpack_rows", backend, packed, lengths, rows)
