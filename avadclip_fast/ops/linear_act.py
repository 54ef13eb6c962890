"""linear_act: a linear layer or k-tap convolution over time with norm, activation and residual around it."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_positive, check_tensors

_dispatch.register("linear_act", "reference", reference.linear_act)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    dilation: int = 1,
    causal: bool = False,
    lengths: Tensor | None = None,
    backend: str | None = None,
    dot: Tensor | None = None,
) -> Tensor:
    """A linear layer or temporal convolution that stays in [B, T, D], with what usually surrounds it.

        h_t = LayerNorm(x_t) if norm else x_t
        y_t = sum_k W[:, :, k] h_(t + (k - K//2)·dilation) + b         (causal: k - K + 1 in place of k - K//2)
        out = act(y) + residual;   with dot: out = <act(y), dot>

    x: (B, T, I) floating point; any leading shape where the weight is a matrix
    weight: (O, I) linear, or (O, I, K) convolution with K taps, zero outside the video
    bias: (O,) or None
    activation: "none", "relu", "gelu" (erf) or "quick_gelu" (y·sigmoid(1.702 y))
    residual: (B, T, O) or None, added after the activation
    norm: LayerNorm's weight and bias, each (I,), eps 1e-5; None for no norm
    dilation, causal: of the convolution; causal pads on the left alone
    lengths: (B,) int; a convolution then sees zeros at t >= lengths[b]. No effect on a linear layer.
    dot: (O,) or None; the result is then one number a row, and the rows of act(y) are never stored for it
    Returns (B, T, O), or with dot (B, T), in x's dtype. Raises ValueError on shapes, dtypes, devices or names that do
    not fit.
    Precision: LayerNorm in float32. Deterministic. Backends: see `avadclip-fast env`.
    """
    shape = "B T" if x.ndim == 3 else " ".join("BTSRQ"[: x.ndim - 1])
    sizes = check_tensors(
        "linear_act",
        ("x", x, f"{shape} I"),
        ("weight", weight, "O I" if weight.ndim == 2 else "O I K"),
        ("bias", bias, "O"),
        ("residual", residual, f"{shape} O"),
        ("dot", dot, "O"),
        *(() if norm is None else (("norm weight", norm[0], "I"), ("norm bias", norm[1], "I"))),
    )
    check_positive("linear_act", dilation=dilation)
    if activation not in reference.ACTIVATIONS:
        known = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"linear_act: activation must be one of {known}; got {activation!r}")
    if dot is not None and residual is not None:
        raise ValueError("linear_act: residual must be None where dot is given")
    if weight.ndim == 3:
        if x.ndim != 3:
            raise ValueError(f"linear_act: a convolution takes x of shape [B, T, I], got {list(x.shape)}")
        check_lengths("linear_act", lengths, sizes["B"], sizes["T"], x.device)
    return _dispatch.run(
        "linear_act", backend, x, weight, bias, activation, residual, norm, dilation, causal, lengths, dot
    )
