"""Layers built on linear_act: MLP, binary head, temporal convolution and the audio TCN."""

from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._binary_head import binary_head as fused_head
from ..ops._check import REAL, check_counts, check_rows
from ..ops._keep import keep
from ..ops._layer_norm import LAYER_NORM_EPS
from ..ops._linear_act_cpu import spares
from ..ops._padding import ends_of
from ..ops._residual_block import residual_mlp
from ..ops._triton import fused


class MLP(nn.Module):
    """CLIP's two-layer perceptron: c_proj(QuickGELU(c_fc(norm(x)))) + residual, hidden width 4D.

    forward: x (B, T, D), residual (B, T, D) or None, norm a LayerNorm or None, lengths (B,) or None -> (B, T, D).
    Rows t >= lengths[b] of the result mean nothing. Raises ValueError on invalid shapes, dtypes, devices or lengths.
    """

    def __init__(self, dim: int, backend: str | None = None):
        super().__init__()
        self.backend = backend
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        h, affine = unnormed(x, norm)
        if residual is x and affine is not None and fused(self.backend, x, *self.parameters(), *affine):
            fc, proj = ((layer.weight, layer.bias) for layer in (self.c_fc, self.c_proj))
            return residual_mlp(x, affine, fc, proj, lengths)
        layer = partial(ops.linear_act, needed=lengths, backend=self.backend)
        h = layer(h, self.c_fc.weight, self.c_fc.bias, "quick_gelu", norm=affine)
        return layer(h, self.c_proj.weight, self.c_proj.bias, residual=residual)


def unnormed(x: Tensor, norm: nn.LayerNorm | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x, and the weight and bias of the LayerNorm if linear_act can apply it; else x after the norm, and None.

    linear_act supports LayerNorms of a single eps, with both weight and bias; a BatchNorm has the same attributes.
    """
    if norm is None:
        return x, None
    if not isinstance(norm, nn.LayerNorm) or norm.eps != LAYER_NORM_EPS or norm.weight is None or norm.bias is None:
        return norm(x), None
    return x, (norm.weight, norm.bias)


def binary_head(x: Tensor, mlp: MLP, classifier: nn.Linear, lengths: Tensor | None = None) -> Tensor:
    """classifier(mlp(x) + x) for a single-output classifier, without the MLP's second matrix product.

        w·(P h + p + x) + b  =  (Pᵀw)·h + w·x + (w·p + b),      h = QuickGELU(c_fc x), c_proj = (P, p)

    x: (B, T, D), lengths: (B,) or None -> (B, T). Rows t >= lengths[b] mean nothing.
    """
    w = classifier.weight[0]  # [D]
    folded = w @ mlp.c_proj.weight  # [4D]
    c_fc = mlp.c_fc
    if fused(mlp.backend, x, c_fc.weight, c_fc.bias, folded, w):
        return fused_head(x, c_fc.weight, c_fc.bias, folded, w, lengths) + (w @ mlp.c_proj.bias + classifier.bias)
    hidden = ops.linear_act(x, c_fc.weight, c_fc.bias, "quick_gelu", dot=folded, needed=lengths, backend=mlp.backend)
    return hidden + x @ w + (w @ mlp.c_proj.bias + classifier.bias)


class TemporalConv(nn.Conv1d):
    """Conv1d over time on (B, T, D) tensors; zero padding keeps T. Parameters as in nn.Conv1d.

    forward: x (B, T, I), activation, residual (B, T, O) or None, lengths (B,) or None -> (B, T, O).
    Rows t >= lengths[b] of x count as zero, and those of the result mean nothing. See `ops.linear_act`.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or activation names.
    """

    bias: nn.Parameter  # never None

    def __init__(self, inputs: int, outputs: int, taps: int, backend: str | None = None):
        super().__init__(inputs, outputs, taps, padding=taps // 2)
        self.backend = backend

    def forward(
        self, x: Tensor, activation: str = "none", residual: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        return ops.linear_act(
            x,
            self.weight,
            self.bias,
            activation,
            residual=residual,
            lengths=lengths if self.kernel_size[0] > 1 else None,  # one tap reads no padding into a valid row
            needed=lengths,
            backend=self.backend,
        )


class CausalConv(nn.Module):
    """Causal, dilated, weight-normed convolution: w = g · v / |v|, with one norm per output channel.

    Parameters have the names of torch.nn.utils.weight_norm (`weight_g`, `weight_v`), as in official checkpoints.
    forward: (B, T, D), activation, dropout (kept, p) or None, lengths (B,) or None, ends (B,) or None -> (B, T, D).
    Rows t >= lengths[b] of the result mean nothing; rows t >= ends[b] of the input count as zero.
    """

    def __init__(self, dim: int, taps: int, dilation: int, backend: str | None = None):
        super().__init__()
        self.dilation, self.backend = dilation, backend
        self.bias = nn.Parameter(torch.zeros(dim))
        self.weight_g = nn.Parameter(torch.empty(dim, 1, 1))
        self.weight_v = nn.Parameter(torch.empty(dim, dim, taps))
        nn.init.normal_(self.weight_v, std=0.01)
        with torch.no_grad():
            self.weight_g.copy_(self.weight_v.norm(dim=(1, 2), keepdim=True))

    def forward(
        self,
        x: Tensor,
        activation: str = "none",
        dropout: tuple[Tensor, float] | None = None,
        lengths: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)  # torch's one kernel for it
        return ops.linear_act(
            x,
            weight,
            self.bias,
            activation,
            dilation=self.dilation,
            causal=True,
            lengths=ends,
            dropout=dropout,
            needed=lengths,
            backend=self.backend,
        )


class TemporalBlock(nn.Module):
    """One level of the audio TCN: out = ReLU(h2 + x), h1 = drop(ReLU(conv1 x)), h2 = drop(ReLU(conv2 h1)).

    forward: (B, T, D), lengths (B,) or None, ends (B,) or None -> (B, T, D); lengths and ends as for `CausalConv`.
    """

    def __init__(self, dim: int, taps: int, dilation: int, dropout: float, backend: str | None = None):
        super().__init__()
        self.dropout, self.backend = dropout, backend
        self.conv1 = CausalConv(dim, taps, dilation, backend)
        self.conv2 = CausalConv(dim, taps, dilation, backend)

    def forward(self, x: Tensor, lengths: Tensor | None = None, ends: Tensor | None = None) -> Tensor:
        h = x
        for conv, until in ((self.conv1, ends), (self.conv2, None)):
            dropout = (keep(x, self.dropout), self.dropout) if self.training and self.dropout else None
            h = conv(h, "relu", dropout, lengths, until)
        return ops.add_act(h, x, "relu", backend=self.backend)


class TemporalConvNet(nn.Module):
    """Audio encoder: residual levels of causal convolutions with dilation 1, 2, 4, ... (official `temporalconvnet`).

    forward: (B, T, D), lengths (B,) or None -> (B, T, D). It is causal, so trailing padding never reaches a valid row.
    Rows t >= lengths[b] mean nothing. Raises ValueError on invalid settings, shapes, dtypes, devices or lengths.
    """

    def __init__(
        self, dim: int = 512, levels: int = 3, taps: int = 2, dropout: float = 0.1, backend: str | None = None
    ):
        super().__init__()
        check_counts("TemporalConvNet", dim=dim, levels=levels, taps=taps)
        if not isinstance(dropout, REAL) or not 0 <= dropout <= 1:
            raise ValueError(f"TemporalConvNet: dropout must lie in 0..1, got {dropout!r}")
        self.dim = dim
        self.network = nn.Sequential(*(TemporalBlock(dim, taps, 2**i, float(dropout), backend) for i in range(levels)))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        check_rows("TemporalConvNet", self.dim, lengths, x=x)
        ends = None
        if lengths is None and spares(x) and not x.requires_grad:  # zeros need no products
            ends = ends_of(x.any(2)).clamp_min(1)
        for level in self.network:
            x, ends = level(x, lengths, ends), None
        return x
