"""WindowAttention: block-diagonal self-attention with its projections."""

import torch
from torch import Tensor, nn

from .. import ops


class WindowAttention(nn.Module):
    """Self-attention inside windows of `window` consecutive snippets; the last window may be shorter.

        qkv = in_proj(norm(x)),   out_i = out_proj(sum_j softmax_j(<q_i, k_j> / sqrt(D/heads)) v_j) + residual

    Parameters carry nn.MultiheadAttention's names. forward: x (B, T, D), residual (B, T, D) or None, norm a LayerNorm
    or None, lengths (B,) or None to leave padded keys out -> (B, T, D). Raises ValueError on what does not fit.
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
        residual: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        affine = None if norm is None else (norm.weight, norm.bias)
        qkv = ops.linear_act(x, self.in_proj_weight, self.in_proj_bias, norm=affine, backend=self.backend)
        mixed = ops.window_attention(qkv, self.window, self.heads, lengths, backend=self.backend)
        return ops.linear_act(mixed, self.out_proj.weight, self.out_proj.bias, residual=residual, backend=self.backend)

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}"
