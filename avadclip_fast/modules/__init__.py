"""Drop-in modules: parameters under the official names, maths in `avadclip_fast.ops`."""

from .attention_pool import AVPrompt
from .distance_graph import DistanceGraph
from .distill_loss import UncertaintyDistillationLoss
from .gated_fusion import AVFusion
from .linear_act import MLP, TemporalConv, TemporalConvNet
from .mil_loss import MILAlignLoss, MILLoss
from .prompt_similarity import PromptSimilarity
from .similarity_graph import SimilarityGraph
from .temporal_aggregator import TemporalAggregator
from .topk_mean import TopKMean
from .uncertainty_head import UncertaintyHead
from .window_attention import WindowAttention

__all__ = [
    "MLP",
    "AVFusion",
    "AVPrompt",
    "DistanceGraph",
    "MILAlignLoss",
    "MILLoss",
    "PromptSimilarity",
    "SimilarityGraph",
    "TemporalAggregator",
    "TemporalConv",
    "TemporalConvNet",
    "TopKMean",
    "UncertaintyDistillationLoss",
    "UncertaintyHead",
    "WindowAttention",
]
