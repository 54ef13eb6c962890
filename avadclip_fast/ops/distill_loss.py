"""distill_loss: uncertainty-weighted knowledge distillation."""

import torch
from torch import Tensor

from .. import reference
from . import _dispatch
from ._check import check_lengths, check_tensors
from ._derivatives import differentiable, differentiable_once
from ._triton import implement, triton_reason


def _triton(teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.ops.avadclip_fast.distill_loss(teacher, student, log_variance, lengths)[0]


def _triton_supports(teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None) -> str | None:
    if teacher.requires_grad and torch.is_grad_enabled():
        return "it does not compute gradients for the teacher"
    return triton_reason(teacher, student, log_variance)


_dispatch.register("distill_loss", "reference", reference.distill_loss)
_dispatch.register("distill_loss", "triton", _triton, _triton_supports)

# by_student, by_theta: gradients of the sum of all terms; the backward pass scales them
torch.library.define(
    "avadclip_fast::distill_loss",
    "(Tensor teacher, Tensor student, Tensor log_variance, Tensor? lengths)"
    " -> (Tensor loss, Tensor by_student, Tensor by_theta, Tensor terms)",
)
torch.library.define(
    "avadclip_fast::distill_loss_backward",
    "(Tensor grad, Tensor by_student, Tensor by_theta, Tensor terms) -> (Tensor, Tensor)",
)

implement("distill_loss", "distill_loss", "forward")
implement("distill_loss_backward", "distill_loss", "backward")


@torch.library.register_fake("avadclip_fast::distill_loss_backward")
def _(grad, by_student, by_theta, terms):
    return torch.empty_like(by_student), torch.empty_like(by_theta)


@torch.library.register_fake("avadclip_fast::distill_loss")
def _(teacher, student, log_variance, lengths):
    kept = (torch.float32 if x.dtype == torch.float16 else x.dtype for x in (student, log_variance))
    scalar = student.new_empty((), dtype=torch.float32)
    by = (x.new_empty(x.shape, dtype=k) for x, k in zip((student, log_variance), kept, strict=True))
    return scalar, *by, torch.empty_like(scalar)


def _save(ctx, inputs, output):
    ctx.dtypes = inputs[1].dtype, inputs[2].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad):
    grads = torch.ops.avadclip_fast.distill_loss_backward(grad, *ctx.saved_tensors)
    return None, *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None


differentiable("distill_loss", _backward, _save, one_result=True)
differentiable_once("distill_loss", "distill_loss_backward")


def distill_loss(
    teacher: Tensor, student: Tensor, log_variance: Tensor, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Student-to-teacher squared distance weighted by the student's uncertainty (arXiv 2504.04495, eq. 11).

        out = mean over B, T, D of (teacher - student)² / (1e-6 + 2 exp(θ)) + θ,      θ = log_variance

    This is the form of the official code; the paper gives (..)²/σ² + ln σ².

    teacher, student, log_variance: (B, T, D) floating point
    lengths: (B,) int, to average over rows t < lengths[b], or None, to average over all rows
    Returns a float32 (float64) scalar.
    Raises ValueError on invalid shapes, dtypes, devices or lengths.
    Precision: float32 (float64) throughout. Gradients are about 1e-15, which underflows in float16 but not bfloat16.
    Deterministic. Backends: see `avadclip-fast env`.
    """
    sizes = check_tensors(
        "distill_loss",
        ("teacher", teacher, "B T D"),
        ("student", student, "B T D"),
        ("log_variance", log_variance, "B T D"),
    )
    check_lengths("distill_loss", lengths, sizes["B"], sizes["T"], student.device)
    return _dispatch.run("distill_loss", backend, teacher, student, log_variance, lengths)
