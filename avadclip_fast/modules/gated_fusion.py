"""AVFusion: audio-visual fusion."""

from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._check import check_rows, check_tensors
from ..ops._padding import valid_mask, zero_padding

MODES = ("gated", "add", "concat", "cross_attention")
HEADS = 8  # of cross_attention


class AVFusion(nn.Module):
    """Fuses audio features into visual features, snippet by snippet (arXiv 2504.04495, section III-C and Table VII).

        gated:            z = [v | a],   out = v + sigmoid(Wg z + bg) ⊙ (Wr GELU(Wh z + bh) + br)
        add:              out = v + a
        concat:           out = W [v | a] + b
        cross_attention:  out = v + MHA(query=v, key=a, value=a), 8 heads

    The model uses "gated" (eq. 1-3); the other modes reproduce the paper's ablation and run in plain PyTorch.

        fusion = AVFusion(512)
        fused = fusion(visual, audio)      # visual, audio: (B, T, 512) -> (B, T, 512)

    Raises ValueError on an unknown mode, a backend that it lacks, a width not divisible by the heads, or invalid
    shapes, dtypes or devices.
    Parameters have the official names (`gate_proj.0`, `residual_proj.0`, `residual_proj.2`).
    """

    def __init__(self, dim: int = 512, mode: str = "gated", backend: str | None = None):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"AVFusion: mode must be one of {', '.join(MODES)}; got {mode!r}")
        if mode != "gated" and backend not in (None, "reference"):
            raise ValueError(f"AVFusion: mode {mode!r} has no backend but 'reference'; got {backend!r}")
        if mode == "cross_attention" and dim % HEADS:
            raise ValueError(f"AVFusion: cross_attention has {HEADS} heads, and dim must be a multiple; got {dim}")
        self.dim, self.mode, self.backend = dim, mode, backend
        if mode == "gated":
            self.gate_proj = nn.Sequential(nn.Linear(2 * dim, dim), nn.Sigmoid())
            self.residual_proj = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, dim))
        elif mode == "concat":
            self.proj = nn.Linear(2 * dim, dim)
        elif mode == "cross_attention":
            self.attention = nn.MultiheadAttention(dim, num_heads=HEADS, batch_first=True)

    def forward(self, visual: Tensor, audio: Tensor, lengths: Tensor | None = None) -> Tensor:
        """visual, audio (B, T, D) -> (B, T, D). With `lengths` (B,), rows t >= lengths[b] mean nothing."""
        check_rows("AVFusion", self.dim, lengths, visual=visual, audio=audio)
        if self.mode == "gated":
            layers = self.gate_proj[0], self.residual_proj[0], self.residual_proj[2]
            gate, hidden, residual = (cast(nn.Linear, layer) for layer in layers)
            return ops.gated_fusion(
                visual, audio, gate.weight, gate.bias, hidden.weight, hidden.bias, residual.weight, residual.bias,
                needed=lengths, backend=self.backend,
            )  # fmt: skip
        if self.mode == "add":
            return visual + audio
        if self.mode == "concat":
            check_tensors("AVFusion", ("visual", visual, "B T D"), ("proj.weight", self.proj.weight, "D 2D"))
            return self.proj(torch.cat([visual, audio], dim=-1))
        projection = self.attention.in_proj_weight
        check_tensors("AVFusion", ("visual", visual, "B T D"), ("attention.in_proj_weight", projection, "3D D"))
        padding = None
        if lengths is not None:
            padding = ~valid_mask(lengths, audio.shape[1])
            audio = zero_padding(audio, lengths)  # a weight of 0 does not undo NaN
        attended, _ = self.attention(visual, audio, audio, key_padding_mask=padding, need_weights=False)
        return visual + attended

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"
