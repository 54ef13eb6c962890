"""WindowAttention: block-diagonal self-attention with projections."""

import torch
from torch import Tensor, nn

from .. import ops


class WindowAttention(nn.Module):
    """Self-attention within windows of `window` consecutive snippets (official code of arXiv 2504.04495).

        qkv = in_proj(norm(x)),   out_i = out_proj(sum_j softmax_j(<q_i, k_j> / sqrt(D/heads)) v_j) + residual

    If `window` does not divide T, the last window is shorter.

    x: (B, T, D) floating point
    lengths: (B,) int, to exclude padded keys, or None
    residual: (B, T, D) or None; norm: LayerNorm or None
    Returns (B, T, D) in x's dtype.
    Raises ValueError on invalid settings, shapes, dtypes, devices or lengths.
    Parameters have the names of nn.MultiheadAttention.
    """

    def __init__(self, dim: int = 512, window: int = 64, heads: int = 1, backend: str | None = None):
        super().__init__()
        if window < 1 or heads < 1 or dim % heads:
            raise ValueError(f"WindowAttention: window={window} and heads={heads} must be >= 1, heads divide dim={dim}")
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
        affine = None if norm is None else (norm.weight, norm.bias)
        qkv = ops.linear_act(x, self.in_proj_weight, self.in_proj_bias, norm=affine, backend=self.backend)
        mixed = ops.window_attention(qkv, self.window, self.heads, lengths, backend=self.backend)
        return ops.linear_act(mixed, self.out_proj.weight, self.out_proj.bias, residual=residual, backend=self.backend)

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}"
