"""AVadCLIP, fast and exact: audio-visual video anomaly detection with fused kernels (arXiv 2504.04495)."""

import importlib
from typing import TYPE_CHECKING

from .modules import (
    AVFusion,
    AVPrompt,
    DistanceGraph,
    MILAlignLoss,
    MILLoss,
    PromptSimilarity,
    SimilarityGraph,
    TemporalAggregator,
    TopKMean,
    UncertaintyDistillationLoss,
    UncertaintyHead,
    WindowAttention,
)
from .ops import BackendError, use_backend

__version__ = "0.1.0"

_MODELS = ("AVadCLIP", "AVadCLIPStudent", "objective")

__all__ = [
    "AVFusion",
    "AVPrompt",
    "AVadCLIP",
    "AVadCLIPStudent",
    "BackendError",
    "DistanceGraph",
    "MILAlignLoss",
    "MILLoss",
    "PromptSimilarity",
    "SimilarityGraph",
    "TemporalAggregator",
    "TopKMean",
    "UncertaintyDistillationLoss",
    "UncertaintyHead",
    "WindowAttention",
    "objective",
    "use_backend",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .models import AVadCLIP, AVadCLIPStudent, objective
else:  # hidden from type checkers, so that they report misspelt names

    def __getattr__(name: str):
        # Lazy: the models import huggingface_hub, but importing this package must need only torch and numpy.
        if name in _MODELS:
            return getattr(importlib.import_module(".models", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
