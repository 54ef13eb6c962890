"""mil_loss and mil_align_loss: the two multiple-instance losses over top-k pooled scores."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_positive, check_tensors

_dispatch.register("mil_loss", "reference", reference.mil_loss)
_dispatch.register("mil_align_loss", "reference", reference.mil_align_loss)


def mil_loss(logits: Tensor, labels: Tensor, lengths: Tensor, divisor: int = 16, backend: str | None = None) -> Tensor:
    """Binary cross-entropy of each video's top-k mean anomaly score against "is anything wrong in it".

        p_b = topk_mean(sigmoid(logits_b)),   out = mean_b BCE(p_b, 1 - labels[b, 0])

    logits: (B, T) floating point; labels: (B, C), class 0 normal; lengths: (B,) int in 1..T
    divisor: k_b = lengths[b] // divisor + 1
    Returns a float32 (float64) scalar; logarithms are clamped at -100 as in torch's binary_cross_entropy.
    Raises ValueError on shapes, dtypes, devices or lengths that do not fit. Deterministic.
    Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("mil_loss", ("logits", logits, "B T"))
    _check("mil_loss", logits, labels, lengths, divisor, sizes)
    return _dispatch.run("mil_loss", backend, logits, labels, lengths, divisor)


def mil_align_loss(
    logits: Tensor, labels: Tensor, lengths: Tensor, alpha: Tensor, divisor: int = 16, backend: str | None = None
) -> Tensor:
    """Cross-entropy and focal loss of each video's top-k pooled class logits against its (multi-hot) labels.

        s_bc = topk_mean(logits_bc),   y = labels / sum(labels),   ce = -sum_c y log_softmax(s)
        focal = (sum_c y alpha) · (1 - sum_c y softmax(s))² · ce,   out = mean_b (ce + focal) / 2

    logits: (B, T, C) floating point; labels: (B, C), every row with at least one class; lengths: (B,) int in 1..T
    alpha: (C,) focal weight per class, learnable; divisor: k_b = lengths[b] // divisor + 1
    Returns a float32 (float64) scalar. Raises ValueError on shapes, dtypes, devices or lengths that do not fit.
    Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors("mil_align_loss", ("logits", logits, "B T C"))
    _check("mil_align_loss", logits, labels, lengths, divisor, sizes)
    if alpha.shape != (sizes["C"],) or alpha.device != logits.device:
        raise ValueError(
            f"mil_align_loss: alpha must have shape [{sizes['C']}] on {logits.device}, "
            f"got {list(alpha.shape)} on {alpha.device}"
        )
    return _dispatch.run("mil_align_loss", backend, logits, labels, lengths, alpha, divisor)


def _check(op: str, logits: Tensor, labels: Tensor, lengths: Tensor, divisor: int, sizes: dict[str, int]) -> None:
    classes = sizes.get("C", labels.shape[-1] if labels.ndim else 0)
    if labels.shape != (sizes["B"], classes) or labels.device != logits.device:
        raise ValueError(
            f"{op}: labels must have shape [{sizes['B']}, {sizes.get('C', 'C')}] on {logits.device}, "
            f"got {list(labels.shape)} on {labels.device}"
        )
    check_positive(op, divisor=divisor)
    if lengths is None:
        raise ValueError(f"{op}: lengths must be an int tensor [B], got None")
    check_lengths(op, lengths, sizes["B"], sizes["T"], logits.device)
