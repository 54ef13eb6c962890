"""Training recipes: the paper's, and one for sets of only hundreds of videos."""

import math
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

PRECISIONS = ("fp32", "tf32", "bf16")
SELECT = ("last", "val", "test")


class RecipeError(ValueError):
    """A recipe is invalid, or the data or the device does not support it."""


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters; the defaults are the paper's."""

    epochs: int = 10
    batch_size: int = 96
    lr: float = 1e-5
    milestones: tuple[int, ...] = (3, 6)  # epochs after which lr falls tenfold
    weight_decay: float = 0.01
    seed: int = 234
    text_weight: float = 1e-4
    distill_weight: float = 1e-8
    select: str = "last"  # "last", "val" (lowest held-out loss) or "test" (highest frame AP, as in the official code)
    checkpoint_every: int | None = None  # steps; by default what `steps_between_checkpoints` says
    # Of matrix products: "fp32", "tf32" (on a GPU or AMX), "bf16" (autocast). Weights, moments, losses stay float32.
    precision: str = "fp32"
    # Against overfitting to the visual features of the training videos (docs/training-that-hears.md):
    temporal_lr: float = 1.0  # learning rate of the temporal encoder (visual branch), relative to lr
    noise: float = 0.0  # added to visual features, in standard deviations of the training rows

    def __post_init__(self):
        for name, value in vars(self).items():  # a state is JSON, which holds no number of NumPy's
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        try:
            object.__setattr__(self, "milestones", tuple(map(index, self.milestones)))
        except TypeError as error:  # "36" is not (3, 6)
            raise RecipeError(f"milestones must be epochs, such as (3, 6); got {self.milestones!r}") from error
        for name, known in (("precision", PRECISIONS), ("select", SELECT)):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= 1):
                raise RecipeError(f"{name} must be an integer of at least 1; got {value!r}")
        if not isinstance(self.seed, int):
            raise RecipeError(f"seed must be an integer; got {self.seed!r}")
        for name in ("lr", "weight_decay", "text_weight", "distill_weight", "temporal_lr", "noise"):
            # below 0, training would go the wrong way, and say nothing; YAML reads 1e-3 as text
            if not (isinstance(value := getattr(self, name), int | float) and 0 <= value < math.inf):
                raise RecipeError(f"{name} must be a finite number of at least 0; got {value!r}")
        if any(m < 1 for m in self.milestones):
            raise RecipeError(f"milestones must be at least 1; got {', '.join(map(str, self.milestones))}")

    def steps_between_checkpoints(self, device: str) -> int:
        """Returns `checkpoint_every`, or its default: on a GPU ("cuda"), 100 steps take less time than saving them."""
        return self.checkpoint_every or (500 if device == "cuda" else 100)

    def lr_at(self, epoch: int) -> float:
        """Returns the learning rate of an epoch, counted from 0."""
        return self.lr * 0.1 ** sum(epoch >= m for m in self.milestones)


# Changes to the defaults for sets of hundreds of videos, not thousands; measured on FightSurv, see
# docs/training-that-hears.md.
ROBUST: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 16,
    "lr": 2e-4,
    "milestones": (4,),
    "temporal_lr": 0.05,
    "noise": 3.0,
    "distill_weight": 10.0,
}
# For an audio-only student: audio passes through its temporal encoder too, and is not overfitted; noise is on sight.
ROBUST_HEARER = {**ROBUST, "temporal_lr": 1.0, "noise": 0.0}
ROBUST_STREAMS: dict[str, Any] = {"motion": True, "standardize": ["audio", "visual"]}  # arguments of AVadCLIP
