"""The whole models: teacher, student, text side, checkpoint formats."""

from .avadclip import AVadCLIP, AVadCLIPStudent, Output, objective
from .checkpoints import CheckpointError
from .text import TextWeightsError

__all__ = ["AVadCLIP", "AVadCLIPStudent", "CheckpointError", "Output", "TextWeightsError", "objective"]
