"""WindowAttention: block-diagonal self-attention with projections."""

from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._autocast import as_autocast, product_dtype
from ..ops._check import check_counts, check_lengths, check_tensors
from ..ops._dispatch import exporting
from ..ops._layer_norm import layer_norm
from ..ops._residual_block import residual_attention
from ..ops._triton import fused
from ..ops.window_attention import longest
from .linear_act import unnormed


class WindowAttention(nn.Module):
    """Self-attention within windows of `window` consecutive snippets (official code of arXiv 2504.04495).

        q, k, v = in_proj(norm(x)),   out_i = out_proj(sum_j softmax_j(<q_i, k_j> / sqrt(D/heads)) v_j) + residual

    If `window` does not divide T, the last window is shorter. With one head and enough rows, two products with the
    rows do the work of four: keys are norm(x) itself, and out_proj acts on the values (see `fold`).

    x: (B, T, D) floating point
    lengths: (B,) int, to exclude padded keys, or None
    residual: (B, T, D) or None; norm: LayerNorm or None
    Returns (B, T, D) in x's dtype. Rows t >= lengths[b] mean nothing.
    Raises ValueError on invalid settings, shapes, dtypes, devices or lengths.
    Parameters have the names of nn.MultiheadAttention.
    """

    def __init__(self, dim: int = 512, window: int = 64, heads: int = 1, backend: str | None = None):
        super().__init__()
        check_counts("WindowAttention", dim=dim, window=window, heads=heads)
        if dim % heads:
            raise ValueError(f"WindowAttention: window={window} and heads={heads}: heads must divide dim={dim}")
        self.window, self.heads, self.backend = window, heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        width = self.out_proj.in_features
        rows, scale = ("x", x, f"B T {width}"), ("norm", getattr(norm, "weight", None), f"{width}")
        sizes = check_tensors("WindowAttention", rows, scale, optional=("norm",))
        check_lengths("WindowAttention", lengths, sizes["B"], sizes["T"], x.device)
        layer = partial(ops.linear_act, needed=lengths, backend=self.backend)
        # Folding costs 2·D³ and saves 2·rows·D². An exported graph must not even ask for the number of rows.
        if exporting() or self.heads > 1 or x.shape[0] * x.shape[1] <= width:
            h, affine = unnormed(x, norm)
            q, k, v = layer(h, self.in_proj_weight, self.in_proj_bias, norm=affine).chunk(3, dim=-1)
            mixed = ops.window_attention(q, k, v, self.window, self.heads, lengths, backend=self.backend)
            return layer(mixed, self.out_proj.weight, self.out_proj.bias, residual=residual)
        query, value = fold(self.in_proj_weight, self.in_proj_bias, self.out_proj)
        h, affine = unnormed(x, norm)
        fits = min(self.window, x.shape[1]) <= longest(product_dtype(x))
        if fits and residual is x and affine is not None and fused(self.backend, x, query[0], *affine):
            weight, bias = (torch.cat(pair) for pair in zip(query, value, strict=True))
            return residual_attention(x, affine, weight, bias, self.window, lengths)
        keys = h if affine is None else layer_norm(h, *affine, backend=self.backend)
        (keys,) = as_autocast(keys)
        q, v = layer(keys, *query), layer(keys, *value)
        return ops.window_attention(q, keys, v, self.window, 1, lengths, residual, backend=self.backend)

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}"


def fold(weight: Tensor, bias: Tensor, after: nn.Linear) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights and biases that map rows x to queries and values, for single-head attention whose keys are x.

        <Wq x_i + bq, Wk x_j + bk> = <Wk'Wq x_i + Wk'bq, x_j> + a term equal for all j, which cancels
        Wo (sum_j p_ij (Wv x_j + bv)) + bo = sum_j p_ij (WoWv x_j + Wo bv + bo)      since sum_j p_ij = 1

    weight, bias: (3D, D) and (3D,) of the queries, keys and values; after: the output projection.
    """
    query, key, value = weight.chunk(3)
    query_bias, _, value_bias = bias.chunk(3)
    return (key.T @ query, query_bias @ key), (after.weight @ value, after.weight @ value_bias + after.bias)
