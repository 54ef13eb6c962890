"""How to train: the paper's recipe, and one for hundreds of videos."""

from dataclasses import dataclass
from typing import Any

PRECISIONS = ("fp32", "tf32", "bf16")
SELECT = ("last", "val", "test")


class RecipeError(ValueError):
    """A recipe that cannot be followed: a name that does not exist, or what the data or the device do not have."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's."""

    epochs: int = 10
    batch_size: int = 96
    lr: float = 1e-5
    milestones: tuple[int, ...] = (3, 6)  # epochs after which lr falls tenfold
    weight_decay: float = 0.01
    seed: int = 234
    text_weight: float = 1e-4
    distill_weight: float = 1e-8
    select: str = "last"  # "last", "val" (lowest held-out loss) or "test" (highest frame AP, as the official code)
    checkpoint_every: int = 100  # steps
    # Of the products: "tf32" (of float32, on a GPU or AMX), "bf16" (autocast). Weights, moments, losses stay float32.
    precision: str = "fp32"
    # Against learning the training videos' sights by heart (docs/training-that-hears.md):
    temporal_lr: float = 1.0  # of the temporal encoder, through which sight alone passes, as a share of lr
    noise: float = 0.0  # added to sight, in standard deviations of the training rows

    def __post_init__(self):
        for name, known in (("precision", PRECISIONS), ("select", SELECT)):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1; got {getattr(self, name)!r}")

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * 0.1 ** sum(epoch >= m for m in self.milestones)


# What differs from the defaults where there are hundreds of videos, not thousands; measured on FightSurv, see
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
# Of a student of the sound alone: it passes through the temporal encoder too, and is not learnt by heart.
ROBUST_HEARER = {**ROBUST, "temporal_lr": 1.0}
ROBUST_STREAMS: dict[str, Any] = {"motion": True, "standardize": ["audio", "visual"]}  # how a teacher is to take them
