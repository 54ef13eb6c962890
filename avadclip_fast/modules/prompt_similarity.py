"""PromptSimilarity: class logits as cosines with prompts."""

from torch import Tensor, nn

from .. import ops


class PromptSimilarity(nn.Module):
    """Class logits: cosines of snippets with per-video class prompts, over a temperature (arXiv 2504.04495, eq. 8).

        out_btc = cos(features_bt, prompts_bc) / temperature

    forward: features (B, T, D), prompts (B, C, D) -> (B, T, C). Raises ValueError on shapes that do not fit.
    """

    def __init__(self, temperature: float = 0.07, backend: str | None = None):
        super().__init__()
        self.temperature, self.backend = temperature, backend

    def forward(self, features: Tensor, prompts: Tensor) -> Tensor:
        return ops.prompt_similarity(features, prompts, self.temperature, backend=self.backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
