"""Causal self-attention of sequences that begin with the same rows: those are computed once and attended to by all."""

import torch
from torch import Tensor

from ._numerics import at_least_float32


def prefix_attention(qkv: Tensor, prefix: int, rows: int, heads: int) -> Tensor:
    """
    out_i = sum_j softmax_j(<q_i, k_j> / sqrt(W/heads)) v_j    over j <= i in the prefix or in i's own sequence
    """
    first = _heads(qkv[:prefix].unsqueeze(0), heads)  # 3 x [1, H, P, W/H]
    own = _heads(qkv[prefix:].unflatten(0, (-1, rows)), heads)  # 3 x [C, H, S, W/H]
    keys, values = (torch.cat([first[i].expand(len(own[i]), -1, -1, -1), own[i]], dim=2) for i in (1, 2))
    parts = _attend(*first), _attend(own[0], keys, values)
    return torch.cat([part.transpose(1, 2).flatten(0, 1).flatten(1) for part in parts])


def _heads(qkv: Tensor, heads: int) -> list[Tensor]:
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last query sees every key, each one before it sees one fewer. q [C, H, S, D], k and v [C, H, P + S, D]."""
    q, k = at_least_float32(q) * q.shape[3] ** -0.5, at_least_float32(k)
    hidden = q.new_full((q.shape[2], k.shape[2]), -torch.inf).triu(k.shape[2] - q.shape[2] + 1)
    return (q @ k.transpose(2, 3) + hidden).softmax(dim=-1).to(v.dtype) @ v
