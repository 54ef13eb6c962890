"""act(x * W + b) + residual: a linear layer or a k-tap convolution over time, kept in [B, T, D]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._numerics import at_least_float32, zero_padding

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,  # the exact (erf) form
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
LAYER_NORM_EPS = 1e-5


def gain(p: float) -> float:
    """What keeps the mean of numbers of which a share p is dropped."""
    return 1 / (1 - p) if p < 1 else 0.0


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    dilation: int = 1,
    causal: bool = False,
    lengths: Tensor | None = None,
    dot: Tensor | None = None,
    dropout: tuple[Tensor, float] | None = None,
) -> Tensor:
    """
    h_t = LayerNorm(x_t) if norm else x_t,      h_t = 0 for t outside [0, lengths[b])
    y_t = sum_k W[:, :, k] h_(t + (k - K//2)·dilation) + b         (causal: k - K + 1 in place of k - K//2)
    out = act(y) ⊙ kept / (1 - p) + residual, (kept, p) = dropout;   with dot: out = <act(y), dot>
    """
    lengths = lengths if weight.ndim == 3 else None
    x = zero_padding(x, lengths)  # before the norm too: what padding holds may be NaN
    if norm is not None:
        scale, shift = (at_least_float32(p) for p in norm)
        h = F.layer_norm(at_least_float32(x), x.shape[-1:], scale, shift, LAYER_NORM_EPS).to(x.dtype)
    else:
        h = x
    if weight.ndim == 2:
        y = F.linear(h, weight, bias)
    else:
        reach = (weight.shape[2] - 1) * dilation
        h, before = zero_padding(h, lengths), reach if causal else weight.shape[2] // 2 * dilation
        if before != reach - before:
            h, before = F.pad(h, (0, 0, before, reach - before)), 0  # [B, T + reach, D]
        # conv1d would transpose h; images of height 1 with channels last are h as it lies in memory.
        image = h.transpose(1, 2).unsqueeze(2)  # [B, D, 1, T]
        y = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, before), dilation=(1, dilation))
        y = y.squeeze(2).transpose(1, 2)
    return epilogue(y, activation, dropout, residual, dot)


def epilogue(
    y: Tensor,
    activation: str,
    dropout: tuple[Tensor, float] | None,
    residual: Tensor | None,
    dot: Tensor | None,
) -> Tensor:
    """What is made of the product y, as in `linear_act`."""
    y = ACTIVATIONS[activation](y)
    if dropout is not None:
        kept, p = dropout
        y = y * kept * gain(p)
    if dot is not None:
        return y @ dot
    return y if residual is None else y + residual
