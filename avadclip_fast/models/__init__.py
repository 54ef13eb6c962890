"""Complete models: teacher, student, text encoder and checkpoint formats."""

from .avadclip import AVadCLIP, AVadCLIPStudent, Output, objective
from .checkpoints import CheckpointError
from .text import TextWeightsError

__all__ = ["AVadCLIP", "AVadCLIPStudent", "CheckpointError", "Output", "TextWeightsError", "objective"]
