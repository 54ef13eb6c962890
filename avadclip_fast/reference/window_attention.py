"""Block-diagonal self-attention: snippet i attends to j only if i // window == j // window."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._numerics import at_least_float32, valid_mask, zero_padding


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    heads: int = 1,
    lengths: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """
    out_i = sum_j softmax_j(<q_i, k_j> / sqrt(D/heads)) v_j + residual_i    over j in i's window (and j < lengths[b])
    The last window is shorter where `window` does not divide T. With lengths, the sum is 0 for i >= lengths[b].
    """
    batch, rows, width = q.shape
    windows = -(-rows // window)
    q, k, v = (
        F.pad(zero_padding(x, lengths), (0, 0, 0, windows * window - rows))
        .reshape(batch, windows, window, heads, width // heads)
        .transpose(2, 3)  # [B, W, H, w, D/H]
        for x in (q, k, v)
    )
    keys = torch.arange(windows * window, device=q.device) < rows
    keys = keys.expand(batch, -1) if lengths is None else keys & valid_mask(lengths, windows * window)
    keys = keys.reshape(batch, windows, 1, 1, window)
    scores = at_least_float32(q) @ at_least_float32(k).transpose(-2, -1) * q.shape[-1] ** -0.5
    lowest = torch.finfo(scores.dtype).min  # not -inf: a window without any key must stay finite
    weights = scores.masked_fill(~keys, lowest).softmax(dim=-1) * keys
    out = (weights.to(v.dtype) @ v).transpose(2, 3).reshape(batch, windows * window, width)
    out = zero_padding(out[:, :rows], lengths)
    return out if residual is None else out + residual
