"""PromptSimilarity: class logits as cosines between snippets and prompts."""

from torch import Tensor, nn

from .. import ops


class PromptSimilarity(nn.Module):
    """Class logits: cosines between snippets and per-video class prompts (arXiv 2504.04495, eq. 8).

        out_btc = cos(features_bt, prompts_bc) / temperature

    features: (B, T, D) floating point; prompts: (B, C, D)
    Returns (B, T, C) in the features' dtype.
    Raises ValueError on invalid shapes, dtypes, devices or temperature.
    Precision, determinism and backends: see `ops.prompt_similarity`.
    """

    def __init__(self, temperature: float = 0.07, backend: str | None = None):
        super().__init__()
        self.temperature, self.backend = temperature, backend

    def forward(self, features: Tensor, prompts: Tensor) -> Tensor:
        return ops.prompt_similarity(features, prompts, self.temperature, backend=self.backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
