"""The temporal encoder shared by teacher and student: window attention followed by graph convolutions."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import ops
from ..modules import MLP, TemporalAggregator, WindowAttention
from ..ops._autocast import activations
from ..ops._linear_act_cpu import spares
from ..ops._padding import ends_of, zero_padding
from . import groups


class ResidualAttentionBlock(nn.Module):
    """Pre-norm block with window attention: x = x + attn(LN1(x)); x = x + mlp(LN2(x))."""

    def __init__(self, dim: int, window: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        x = self.attn(x, residual=x, norm=self.ln_1, lengths=lengths)
        return self.mlp(x, residual=x, norm=self.ln_2, lengths=lengths)


class Standardize(nn.Module):
    """(x - mean) / std per dimension with statistics of the training set; padded rows stay zero.

    For features whose mean dominates their variation, such as rectified ones, from which a model otherwise learns
    little. The statistics are buffers, saved with the model.
    forward: x (B, T, D), lengths (B,) or None -> (B, T, D).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.fitted = False

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics, (D,) each, as returned by `moments`."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * std.max(), std, 1))  # constant dimensions are not scaled
        self.fitted = True

    def plain(self) -> bool:
        """Whether it still has no statistics, from `fit` or from loaded weights."""
        return not (self.fitted or self.mean.any() or (self.std != 1).any())

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return zero_padding((x - self.mean) / self.std, lengths)


def moments(batches: Iterable, streams: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation, (D,) float64, of each stream's valid rows, in one pass.

    batches: objects with `lengths` (B,) and streams (B, T, D) that are zero in padded rows, as `FeatureSet.batches()`
    Raises ValueError if there are no batches, or they lack a stream.
    """
    rows, sums = 0, {stream: torch.zeros((), device="cpu") for stream in streams}
    for batch in batches:
        rows += int(batch.lengths.sum())
        for stream in sums:
            if (x := getattr(batch, stream)) is None:
                raise ValueError(f"statistics of {stream!r} are required, but the batches have no such stream")
            x = x.double()
            sums[stream] = sums[stream] + torch.stack([x.sum((0, 1)), x.square().sum((0, 1))])
    if not rows:
        raise ValueError("statistics need a batch, and there is none; an iterator that was read before has none left")
    found = {}
    for stream, total in sums.items():
        mean, square = total / rows
        found[stream] = mean, (square - mean**2).clamp_min(0).sqrt()
    return found


class TemporalEncoder(nn.Module):
    """Contextualises snippets: position embeddings, `layers` window-attention blocks, then graph convolutions.

    forward: x (B, T, D) with T <= length, lengths (B,) or None -> (B, T, D). Raises ValueError on other shapes.
    """

    def __init__(self, dim: int, length: int, window: int, layers: int, heads: int = 1, padding: str = "masked"):
        super().__init__()
        self.padding, self.window = padding, window
        self.positions = nn.Embedding(length, dim)
        nn.init.normal_(self.positions.weight, std=0.01)
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(dim, window, heads) for _ in range(layers))
        self.aggregator = TemporalAggregator(dim, padding)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        length, width = self.positions.weight.shape
        if x.ndim != 3 or x.shape[2] != width:
            raise ValueError(f"TemporalEncoder: features must have shape [B, T, {width}], got {list(x.shape)}")
        rows = x.shape[1]
        if not 0 < rows <= length:
            remedy = "cut the video into chunks" if rows else "a video has at least one snippet"
            raise ValueError(f"TemporalEncoder: T={rows} does not lie in 1..{length}, the positions; {remedy}")
        official = self.padding == "official"
        if official and rows % self.window == 0 and groups.pays(x) and not x.requires_grad:
            x, alike = self._distinct(x)
            return self.aggregator(x, lengths, alike if spares(x) else None)
        x, positions = activations(x), activations(self.positions.weight[:rows])
        x = ops.add_act(x, positions.expand_as(x), "none")
        x = self._blocks(x, None if official else lengths)
        return self.aggregator(x, lengths)

    def _blocks(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, lengths)
        return x

    def _distinct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks over x + positions, without computing what is known to be the same twice.

        Also returns (B,) the row of each video from which on it holds nothing else.

        The blocks treat windows independently. Those of padding hold zeros and position embeddings, so each is the
        same in every video, and is computed once for all that have it.
        """
        windows, empty = (y.unflatten(-2, (-1, self.window)) for y in (x, self.positions.weight[: x.shape[1]]))
        seen = windows.any(3).any(2)  # [B, n] of windows [B, n, w, D] and empty [n, w, D]
        padding = ~seen.all(0)
        distinct = self._blocks(torch.cat([(windows + empty)[seen], empty[padding]]))
        count = int(seen.sum())
        index = (count - 1 + padding.cumsum(0)).repeat(len(x), 1)
        index[seen] = torch.arange(count, device=x.device)
        # Unlike indexing, index_select has a fast backward pass on a CPU.
        return distinct.index_select(0, index.flatten()).view(x.shape), ends_of(seen) * self.window
