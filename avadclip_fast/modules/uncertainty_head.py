"""UncertaintyHead: the student's features and their log-variance."""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from .. import ops
from ..ops._check import check_rows
from ..ops._dispatch import exporting
from ..streams import aside
from .linear_act import TemporalConv


class UncertaintyHead(nn.Module):
    """Mean and log-variance of the student's features (arXiv 2504.04495, section III-D; official `fe_net`).

        mu = v, then three times mu = mu + ReLU(conv3(mu))
        θ = -(v + ReLU(conv1(conv3(ReLU(conv1(v))))))

    No activation separates the last conv3 and conv1. With enough rows they run as one convolution, whose weight is the
    product of both.

    v: (B, T, D) floating point
    lengths: (B,) int, or None, in which case the convolutions see padded rows
    uncertain: False skips θ, which only distillation needs
    Returns (mu (B, T, D), θ (B, T, D) or None). Rows t >= lengths[b] mean nothing.
    Raises ValueError on invalid shapes, dtypes, devices or lengths.
    Parameters have the official names (`conv.i.conv.0`, `theta.theta.{0,2,3}`).
    """

    def __init__(self, dim: int = 512, backend: str | None = None):
        super().__init__()
        self.dim, self.backend = dim, backend
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
        check_rows("UncertaintyHead", self.dim, lengths, v=v)
        log_variance = aside("theta", lambda: self._log_variance(v, lengths)) if uncertain else None
        mu = v
        for layer in cast(Iterable[_Named], self.conv):
            mu = layer.conv[0](mu, "relu", residual=mu, lengths=lengths)
        return mu, log_variance() if log_variance is not None else None

    def _log_variance(self, v: Tensor, lengths: Tensor | None) -> Tensor:
        first, _, middle, last = cast(Iterable[TemporalConv], self.theta.theta)
        h = first(v, "relu", lengths=lengths)
        # Folding costs 3·D³ and saves rows·D². An exported graph must not depend on the number of rows.
        if exporting() or v.shape[0] * v.shape[1] <= 3 * v.shape[2]:
            return -last(middle(h, lengths=lengths), "relu", residual=v, lengths=lengths)
        weight, bias = fold(middle, last)
        return -ops.linear_act(
            h, weight, bias, "relu", residual=v, lengths=lengths, needed=lengths, backend=self.backend
        )


def fold(conv: TemporalConv, after: TemporalConv) -> tuple[Tensor, Tensor]:
    """Weight (O, I, K) and bias (O,) of the convolution that equals `conv` followed by the one-tap `after`."""
    matrix = after.weight[:, :, 0]  # [O, M]
    weight = (matrix @ conv.weight.flatten(1)).unflatten(1, conv.weight.shape[1:])  # [O, M] @ [M, I·K]
    return weight, matrix @ conv.bias + after.bias


class _Named(nn.Module):
    """Registers children under given names, which reproduces the official parameter names."""

    conv: nn.Sequential
    theta: nn.Sequential

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
