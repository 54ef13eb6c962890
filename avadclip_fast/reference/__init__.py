"""Every op in plain PyTorch: the definition of correct. Imported by `ops` and by tests only."""

from .add_act import add_act
from .attention_pool import attention_pool
from .distance_graph import distance_graph
from .distill_loss import distill_loss
from .gated_fusion import gated_fusion
from .linear_act import ACTIVATIONS, linear_act
from .mil_loss import mil_align_loss, mil_loss
from .pack_rows import pack_rows, unpack_rows
from .prefix_attention import prefix_attention
from .prompt_similarity import prompt_similarity
from .similarity_graph import similarity_graph
from .topk_mean import topk_mean
from .uniform_pool import uniform_pool
from .window_attention import window_attention

__all__ = [
    "ACTIVATIONS",
    "add_act",
    "attention_pool",
    "distance_graph",
    "distill_loss",
    "gated_fusion",
    "linear_act",
    "mil_align_loss",
    "mil_loss",
    "pack_rows",
    "prefix_attention",
    "prompt_similarity",
    "similarity_graph",
    "topk_mean",
    "uniform_pool",
    "unpack_rows",
    "window_attention",
]
