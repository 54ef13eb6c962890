"""A training step: a batch's noise and rows, the losses and their gradients, and AdamW."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..data import Batch, FeatureSet
from ..models import AVadCLIP, AVadCLIPStudent, objective
from ..models.avadclip import Detector
from ..models.encoder import moments
from ..ops._linear_act_cpu import HAS_AMX
from ..ops._padding import valid_mask
from ..profiling import span
from . import distributed
from .distributed import WHOLE, Part
from .lowering import lowered_weights
from .recipe import Recipe, RecipeError


def feature_std(data: FeatureSet) -> Tensor:
    """Returns the standard deviation (D,) of each visual feature dimension over the valid rows of a set."""
    return moments(data.batches(), ["visual"])["visual"][1].float()


def add_noise(batch: Batch, scale: Tensor, drawn: Tensor | None = None) -> Batch:
    """Adds Gaussian noise of standard deviation `scale` (D,) to every valid visual row; padded rows are unchanged.

    drawn: (B, T, D) standard normal, or None to draw it here.
    """
    drawn = torch.randn(batch.visual.shape, device=batch.visual.device) if drawn is None else drawn
    valid = valid_mask(batch.lengths, batch.visual.shape[1])[..., None]
    return batch._replace(visual=torch.where(valid, batch.visual + scale * drawn, batch.visual))


def trim(batch: Batch, *models: Detector, longest: int | None = None) -> Batch:
    """Drops the rows past the longest video. They affect the result only if a model's padding is "official".

    longest: number of rows to keep; by default read from `lengths`, which on a GPU makes the host wait.
    """
    if any(model.padding == "official" for model in models):
        return batch
    longest = int(batch.lengths.max()) if longest is None else longest
    audio = None if batch.audio is None else batch.audio[:, :longest]
    return batch._replace(visual=batch.visual[:, :longest], audio=audio)


@contextlib.contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Allows or forbids tf32 for float32 matrix products and cuDNN convolutions (tf32 by default) inside the block.

    Raises RecipeError if the device has no tf32.

    On a CPU's AMX tile units, "tf32" is more precise than its name: products keep 16 significant bits, not 11.
    """
    if precision == "tf32" and device.type != "cuda" and not HAS_AMX:
        raise RecipeError("precision tf32 needs a GPU, or a processor with tile units (AMX); choose fp32 or bf16")
    # fp32_precision reflects both of torch's APIs; the getters of the older one raise once the newer one was used.
    backends: Any = torch.backends
    gpu, cpu = backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
    convolutions = backends.cudnn.conv.fp32_precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision({"tf32": "high", "bf16": "medium"}.get(cpu, "highest"))
        backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = gpu, cpu
        backends.cudnn.allow_tf32 = convolutions


def adamw(model: torch.nn.Module, recipe: Recipe, device: torch.device, graph: bool = False) -> torch.optim.Optimizer:
    """AdamW on the trainable parameters, with `recipe.temporal_lr` times the learning rate for the temporal encoder.

    graph: make it capturable in a CUDA graph.
    """
    groups: list[dict] = [{"params": [], "share": share} for share in (1.0, recipe.temporal_lr)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("temporal.")]["params"].append(parameter)
    for group in groups:  # on a GPU the rate is a tensor, so that a replayed graph reads its current value
        group["lr"] = torch.tensor(recipe.lr, device=device) if device.type == "cuda" or graph else recipe.lr
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True, capturable=graph)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group to its share of `lr`, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["share"])
        else:
            group["lr"] = lr * group["share"]


def train_step(
    model: AVadCLIP | AVadCLIPStudent,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    known: Tensor | None,
    recipe: Recipe,
    part: Part = WHOLE,
    ask: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Runs the forward pass, the losses, the backward pass and AdamW without synchronizing with the device.

    known: (B, T, D) teacher features, or None. part: this rank's part of the full batch. ask: this rank asks to stop.
    Returns the losses of the full batch, and how many ranks ask to stop (None if the world size is 1).
    """
    several = distributed.world() > 1
    losses = gradients(model, optimizer, batch, known, recipe, shares(part, model, recipe) if several else None)
    asked = None
    if several:
        with span("all-reduce"):
            flat = distributed.flattened(model.parameters(), losses.values())
            distributed.add_up(flat, ask)
            *means, asked = distributed.spread(flat, model.parameters())
            losses = dict(zip(losses, means, strict=True))
    with span("optimizer"):
        optimizer.step()
    return losses, asked


def shares(part: Part, model: Detector, recipe: Recipe) -> tuple[float, float, float]:
    """Returns the weights of a rank's losses in the full batch's: for distillation, for the others, and for
    distillation relative to the others in the total.

    Distillation is a mean over rows, and a rank's share of the rows differs from its share of the samples.
    """
    rows = part.rows if model.padding == "masked" else part.samples
    return rows, part.samples, recipe.distill_weight * (rows / part.samples if part.samples else 1.0)


def gradients(
    model: AVadCLIP | AVadCLIPStudent, optimizer: torch.optim.Optimizer, batch: Batch, known: Tensor | None,
    recipe: Recipe, weights: Sequence[float | Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Computes gradients. Returns the losses. weights: those of `shares`, or None for a whole batch."""
    distill, share, relative = weights or (1.0, 1.0, recipe.distill_weight)
    with torch.autocast(batch.visual.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        with span("forward"):
            cast, inputs = lowered_weights(model, batch.visual.device.type), (*model.inputs(batch), batch.lengths)
            out = functional_call(model, cast, inputs) if cast else model(*inputs)
        with span("losses"):
            losses = objective(model, out, batch.labels, batch.lengths, known, relative, recipe.text_weight)
    with span("backward"):
        optimizer.zero_grad(set_to_none=True)
        (losses["total"] if weights is None else share * losses["total"]).backward()
    if weights is None:
        return losses
    return {name: (distill if name == "distill" else share) * loss.detach() for name, loss in losses.items()}
