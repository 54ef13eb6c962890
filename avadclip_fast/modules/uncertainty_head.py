"""UncertaintyHead: the student's feature and how sure it is of it."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from .linear_act import TemporalConv


class UncertaintyHead(nn.Module):
    """The mean and the log-variance of the student's features (arXiv 2504.04495, section III-D).

        mu = v, then three times mu = mu + ReLU(conv3(mu))
        θ = -(v + ReLU(conv1(conv3(ReLU(conv1(v))))))

    Nothing stands between the last conv3 and conv1, so where there are rows enough they are one convolution, whose
    weight is the product of theirs.

    forward: v (B, T, D), lengths (B,) or None (then padded rows are seen by the convolutions), uncertain (False: θ, for
    distillation alone, is None) -> (mu (B, T, D), θ (B, T, D)).
    Parameters carry the official names (`conv.i.conv.0`, `theta.theta.{0,2,3}`).
    Raises ValueError on shapes, dtypes or lengths that do not fit.
    """

    def __init__(self, dim: int = 512, backend: str | None = None):
        super().__init__()
        self.backend = backend
        self.conv = nn.ModuleList(_Named(conv=nn.Sequential(TemporalConv(dim, dim, 3, backend))) for _ in range(3))
        self.theta = _Named(
            theta=nn.Sequential(
                TemporalConv(dim, dim, 1, backend),
                nn.ReLU(),
                TemporalConv(dim, dim, 3, backend),
                TemporalConv(dim, dim, 1, backend),
            )
        )

    def forward(self, v: Tensor, lengths: Tensor | None = None, uncertain: bool = True) -> tuple[Tensor, Tensor | None]:
        mu = v
        for layer in cast(Iterable[_Named], self.conv):
            mu = layer.conv[0](mu, "relu", residual=mu, lengths=lengths)
        return mu, self._log_variance(v, lengths) if uncertain else None

    def _log_variance(self, v: Tensor, lengths: Tensor | None) -> Tensor:
        first, _, middle, last = cast(Iterable[TemporalConv], self.theta.theta)
        h = first(v, "relu")
        # The product of the weights costs 3·D³, the product it saves rows·D². An exported graph has no rows to go by.
        if torch.compiler.is_exporting() or v.shape[0] * v.shape[1] <= 3 * v.shape[2]:
            return -last(middle(h, lengths=lengths), "relu", residual=v)
        weight, bias = fold(middle, last)
        return -ops.linear_act(h, weight, bias, "relu", residual=v, lengths=lengths, backend=self.backend)


def fold(conv: TemporalConv, after: TemporalConv) -> tuple[Tensor, Tensor]:
    """Weight (O, I, K) and bias (O,) of the one convolution that equals `after`, of one tap, behind `conv`."""
    matrix = after.weight[:, :, 0]  # [O, M]
    weight = (matrix @ conv.weight.flatten(1)).unflatten(1, conv.weight.shape[1:])  # [O, M] @ [M, I·K]
    return weight, matrix @ conv.bias + after.bias


class _Named(nn.Module):
    """Holds children under given names, for the sake of the official parameter names."""

    conv: nn.Sequential
    theta: nn.Sequential

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
