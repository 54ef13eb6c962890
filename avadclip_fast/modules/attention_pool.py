"""AVPrompt: audio-visual class prompts and class logits."""

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._check import check_tensors
from .linear_act import MLP
from .prompt_similarity import PromptSimilarity


class AVPrompt(nn.Module):
    """Adapts the class prompts to each video and compares every snippet with them (arXiv 2504.04495, eq. 4-8).

        g_b = normalised sum_t anomaly_logits_bt · features_bt
        y_bc = text_c + w_bc g_b,   X_bc = y_bc + mlp1(y_bc),   class_logits_btc = cos(features_bt, X_bc) / 0.07

    prompt: "official" sets w_bc = 1, as in the official code (its softmax runs over identical columns);
    "paper" uses w_b = softmax over the classes of `<text_c, g_b>` (eq. 5), X_bc = text_c + mlp1(y_bc) (eq. 7)

        prompt = AVPrompt(512)
        class_logits = prompt(features, text, anomaly_logits, lengths)     # (B, T, C)

    features: (B, T, D) floating point; text: (C, D); anomaly_logits: (B, T), before the sigmoid
    lengths: (B,) int, or None; excludes padded rows from g
    Returns the class logits, (B, T, C).
    Raises ValueError on an unknown `prompt`, or invalid shapes, dtypes, devices or lengths.
    Parameters have the official names (`mlp1.c_fc`, `mlp1.c_proj`).
    """

    def __init__(self, dim: int = 512, prompt: str = "official", temperature: float = 0.07, backend: str | None = None):
        super().__init__()
        if prompt not in ("official", "paper"):
            raise ValueError(f"AVPrompt: prompt must be 'official' or 'paper', got {prompt!r}")
        self.prompt, self.backend = prompt, backend
        self.mlp1 = MLP(dim, backend)
        self.similarity = PromptSimilarity(temperature, backend=backend)

    def prompts(self, features: Tensor, text: Tensor, anomaly_logits: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Class prompts X of each video: features (B, T, D), text (C, D), anomaly_logits (B, T) -> (B, C, D)."""
        check_tensors("AVPrompt", ("features", features, "B T D"), ("text", text, "C D"))
        pooled = ops.attention_pool(features, anomaly_logits, lengths, backend=self.backend)[:, None]  # [B, 1, D]
        if self.prompt == "official":
            y = text + pooled  # [B, C, D]
            return self.mlp1(y, residual=y)
        weights = torch.softmax(pooled @ text.T, dim=-1)  # [B, 1, C]
        y = text + weights.transpose(1, 2) * pooled
        return self.mlp1(y, residual=text.expand_as(y))

    def forward(self, features: Tensor, text: Tensor, anomaly_logits: Tensor, lengths: Tensor | None = None) -> Tensor:
        """features (B, T, D), text (C, D), anomaly_logits (B, T), lengths (B,) or None -> class logits (B, T, C)."""
        return self.similarity(features, self.prompts(features, text, anomaly_logits, lengths))

    def extra_repr(self) -> str:
        return f"prompt={self.prompt!r}"
