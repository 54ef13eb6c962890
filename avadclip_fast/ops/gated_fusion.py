"""gated_fusion: the audio-visual fusion attention."""

from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_tensors

_dispatch.register("gated_fusion", "reference", reference.gated_fusion)


def gated_fusion(
    visual: Tensor,
    audio: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    residual_weight: Tensor,
    residual_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Adds to each visual feature what the audio has to say, through a learned gate (arXiv 2504.04495, eq. 1-3).

        z = [v | a],   W = sigmoid(Wg z + bg),   R = Wr GELU(Wh z + bh) + br,   out = v + W ⊙ R

    visual, audio: (B, T, D) floating point
    gate_weight, hidden_weight: (D, 2D), the visual half first; gate_bias, hidden_bias: (D,)
    residual_weight: (D, D); residual_bias: (D,)
    Returns (B, T, D) in the inputs' dtype. Raises ValueError on shapes, dtypes or devices that do not fit.
    Each row depends on itself alone, so padding needs no care. Deterministic. Backends: see `avadclip-fast env`.
    """
    check_tensors(
        "gated_fusion",
        ("visual", visual, "B T D"),
        ("audio", audio, "B T D"),
        ("gate_weight", gate_weight, "D 2D"),
        ("gate_bias", gate_bias, "D"),
        ("hidden_weight", hidden_weight, "D 2D"),
        ("hidden_bias", hidden_bias, "D"),
        ("residual_weight", residual_weight, "D D"),
        ("residual_bias", residual_bias, "D"),
    )
    return _dispatch.run(
        "gated_fusion",
        backend,
        visual,
        audio,
        gate_weight,
        gate_bias,
        hidden_weight,
        hidden_bias,
        residual_weight,
        residual_bias,
    )
