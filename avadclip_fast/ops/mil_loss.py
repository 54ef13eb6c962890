"""mil_loss and mil_align_loss: the two multiple-instance losses over top-k pooled scores."""

import torch
from torch import Tensor

from .. import _build, reference
from . import _dispatch
from ._check import check_are_tensors, check_counts, check_lengths, check_tensors, values_of
from ._derivatives import differentiable, differentiable_once

CLASSES_MAX = 2047  # of mil_align_loss on CUDA: what csrc/mil_loss.cu refuses more of


def _compiled(logits: Tensor, labels: Tensor, lengths: Tensor, divisor: int) -> Tensor:
    return torch.ops.avadclip_fast.mil_loss(logits, labels.to(_kept(logits)), lengths, divisor)[0]


def _compiled_align(logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor, divisor: int) -> Tensor:
    labels = labels.to(_kept(logits))
    return torch.ops.avadclip_fast.mil_align_loss(logits, labels, lengths, alpha, divisor)[0]


def _kept(logits: Tensor) -> torch.dtype:
    """The dtype of the loss, labels and alpha."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _cuda_align_reason(logits: Tensor) -> str | None:
    if logits.shape[-1] > CLASSES_MAX:
        return f"it keeps the scores of {CLASSES_MAX} classes in shared memory, not of {logits.shape[-1]}"
    return _build.cuda_reason(logits)


def _supports(reason):
    def supports(logits: Tensor, labels: Tensor, *_) -> str | None:
        return "it does not compute gradients for labels" if labels.requires_grad else reason(logits)

    return supports


for _op, _function, _cuda_reason in (
    ("mil_loss", _compiled, _build.cuda_reason),
    ("mil_align_loss", _compiled_align, _cuda_align_reason),
):
    _dispatch.register(_op, "reference", getattr(reference, _op))
    _dispatch.register(_op, "cpp", _function, _supports(_build.cpp_reason))
    _dispatch.register(_op, "cuda", _function, _supports(_cuda_reason))

# Slopes are d loss / d logits and d loss / d alpha, in the loss's dtype; the backward pass multiplies them by grad.
torch.library.define(
    "avadclip_fast::mil_loss",
    "(Tensor logits, Tensor labels, Tensor lengths, int divisor) -> (Tensor loss, Tensor slope)",
)
torch.library.define("avadclip_fast::mil_loss_backward", "(Tensor grad, Tensor slope) -> Tensor")
torch.library.define(
    "avadclip_fast::mil_align_loss",
    "(Tensor logits, Tensor labels, Tensor lengths, Tensor alpha, int divisor)"
    " -> (Tensor loss, Tensor slope, Tensor alpha_slope)",
)
torch.library.define(
    "avadclip_fast::mil_align_loss_backward", "(Tensor grad, Tensor slope, Tensor alpha_slope) -> (Tensor, Tensor)"
)


@torch.library.register_fake("avadclip_fast::mil_loss")
def _(logits, labels, lengths, divisor):
    kept = _kept(logits)
    return logits.new_empty((), dtype=kept), logits.new_empty(logits.shape, dtype=kept)


@torch.library.register_fake("avadclip_fast::mil_loss_backward")
def _(grad, slope):
    return torch.empty_like(slope)


@torch.library.register_fake("avadclip_fast::mil_align_loss")
def _(logits, labels, lengths, alpha, divisor):
    kept = _kept(logits)
    loss, slope = logits.new_empty((), dtype=kept), logits.new_empty(logits.shape, dtype=kept)
    return loss, slope, alpha.new_empty(alpha.shape)


@torch.library.register_fake("avadclip_fast::mil_align_loss_backward")
def _(grad, slope, alpha_slope):
    return torch.empty_like(slope), torch.empty_like(alpha_slope)


def _save(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad):
    (slope,) = ctx.saved_tensors
    return torch.ops.avadclip_fast.mil_loss_backward(grad, slope).to(ctx.dtype), None, None, None


def _align_backward(ctx, grad):
    logits, alpha = torch.ops.avadclip_fast.mil_align_loss_backward(grad, *ctx.saved_tensors)
    if not logits.numel():  # an empty batch has a NaN loss, which does not depend on alpha
        alpha = torch.zeros_like(alpha)
    return logits.to(ctx.dtype), None, None, alpha, None


differentiable("mil_loss", _backward, _save, one_result=True)
differentiable("mil_align_loss", _align_backward, _save, one_result=True)
differentiable_once("mil_loss", "mil_loss_backward")
differentiable_once("mil_align_loss", "mil_align_loss_backward")


def mil_loss(logits: Tensor, labels: Tensor, lengths: Tensor, divisor: int = 16, backend: str | None = None) -> Tensor:
    """Binary cross-entropy of each video's top-k mean anomaly score (L_mil in the official code of arXiv 2504.04495).

        p_b = topk_mean(sigmoid(logits_b)),   out = mean_b BCE(p_b, 1 - labels[b, 0])

    Logarithms are clamped at -100, as in torch's binary_cross_entropy.

    logits: (B, T) floating point; labels: (B, C), class 0 is normal, in 0..1; lengths: (B,) int in 1..T
    divisor: >= 1; k_b = lengths[b] // divisor + 1
    Returns a float32 (float64) scalar.
    Raises ValueError on invalid shapes, dtypes, devices, labels, lengths or divisor.
    Precision: float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("mil_loss", ("logits", logits, "B T"))
    _check("mil_loss", logits, labels, lengths, divisor, sizes)
    # Counts would make a loss that falls without end; NaN propagates. On the CPU only, as for lengths.
    if len(labels) and (values := values_of(labels)) is not None:
        least, most = values[:, 0].min(), values[:, 0].max()
        if least < -1e-3 or most > 1 + 1e-3:  # by more than rounding
            raise ValueError(f"mil_loss: labels of class 0, normal, must lie in 0..1, got {least}..{most}")
    return _dispatch.run("mil_loss", backend, logits, labels, lengths, divisor)


def mil_align_loss(
    logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor, divisor: int = 16, backend: str | None = None
) -> Tensor:
    """Mean of cross-entropy and focal loss of top-k pooled class logits (official code of arXiv 2504.04495, L_align).

        s_bc = topk_mean(logits_bc),   y = labels / sum(labels),   ce = -sum_c y log_softmax(s)
        focal = (sum_c y alpha) · (1 - sum_c y softmax(s))² · ce,   out = mean_b (ce + focal) / 2

    logits: (B, T, C) floating point; labels: (B, C) multi-hot, at least one class per row; lengths: (B,) int in 1..T
    alpha: (C,) learnable focal weight per class; divisor: >= 1; k_b = lengths[b] // divisor + 1
    Returns a float32 (float64) scalar.
    Raises ValueError on invalid shapes, dtypes, devices, lengths or divisor.
    Precision: float32 (float64). Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("mil_align_loss", ("logits", logits, "B T C"))
    _check("mil_align_loss", logits, labels, lengths, divisor, sizes)
    check_are_tensors("mil_align_loss", alpha=alpha)
    if alpha.shape != (sizes["C"],) or alpha.device != logits.device:
        raise ValueError(
            f"mil_align_loss: alpha must have shape [{sizes['C']}] on {logits.device}, "
            f"got {list(alpha.shape)} on {alpha.device}"
        )
    alpha = alpha.to(_kept(logits))  # else float64 would widen the loss, in the reference alone
    return _dispatch.run("mil_align_loss", backend, logits, labels, lengths, alpha, divisor)


def _check(op: str, logits: Tensor, labels: Tensor, lengths: Tensor, divisor: int, sizes: dict[str, int]) -> None:
    check_are_tensors(op, labels=labels)
    classes = sizes.get("C", labels.shape[-1] if labels.ndim else 0)
    if labels.shape != (sizes["B"], classes) or labels.device != logits.device:
        raise ValueError(
            f"{op}: labels must have shape [{sizes['B']}, {sizes.get('C', 'C')}] on {logits.device}, "
            f"got {list(labels.shape)} on {labels.device}"
        )
    if classes < 1:
        raise ValueError(f"{op}: labels must have a class, the first being normal, got {list(labels.shape)}")
    check_counts(op, divisor=divisor)
    check_lengths(op, lengths, sizes["B"], sizes["T"], logits.device, required=True)
