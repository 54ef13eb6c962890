"""UncertaintyHead: the student's feature and how sure it is of it."""

from torch import Tensor, nn

from .linear_act import TemporalConv


class UncertaintyHead(nn.Module):
    """The mean and the log-variance of the student's features (arXiv 2504.04495, section III-D).

        mu = v, then three times mu = mu + ReLU(conv3(mu))
        θ = -(v + ReLU(conv1(conv3(ReLU(conv1(v))))))

    forward: v (B, T, D), lengths (B,) or None (then padded rows are seen by the convolutions)
    -> (mu (B, T, D), θ (B, T, D)). Parameters carry the official names (`conv.i.conv.0`, `theta.theta.{0,2,3}`).
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

    def forward(self, v: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mu = v
        for layer in self.conv:
            mu = layer.conv[0](mu, "relu", residual=mu, lengths=lengths)
        first, _, middle, last = self.theta.theta
        h = middle(first(v, "relu"), lengths=lengths)
        return mu, -last(h, "relu", residual=v)


class _Named(nn.Module):
    """Holds children under given names, for the sake of the official parameter names."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
