"""distill_loss on Triton: the loss and all gradients in one pass.

    term = d² w + θ,   d = teacher - student,   w = 1 / (1e-6 + 2 exp(θ))
    d term / d student = -2 d w,   d term / d θ = 1 - 2 exp(θ) (d w)²

Traffic: three tensors read and two written, B·T·D each. The backward pass only scales the two gradients written here,
in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sizes import cdiv, jit

EPS = tl.constexpr(1e-6)


@jit
def distill_kernel(
    teacher, student, theta,  # [B, T, D]
    d_student, d_theta,  # [B·T, D], gradients of the sum of all terms
    sums,  # [programs] float32
    lengths,  # [B], or None
    count, rows, width,
    stride_vb, stride_vt, stride_vd, stride_sb, stride_st, stride_sd, stride_ob, stride_ot, stride_od,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS] out of B·T
    video, t = (r // rows).to(tl.int64), (r % rows).to(tl.int64)
    valid = r < count
    if lengths is not None:
        valid &= t < tl.load(lengths + video, mask=valid, other=0)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, width, COLS):
        d = first + tl.arange(0, COLS)
        written = (r < count)[:, None] & (d < width)[None, :]
        inside = valid[:, None] & (d < width)[None, :]  # [ROWS, COLS]
        at_v = (video * stride_vb + t * stride_vt)[:, None] + d[None, :] * stride_vd
        at_s = (video * stride_sb + t * stride_st)[:, None] + d[None, :] * stride_sd
        at_o = (video * stride_ob + t * stride_ot)[:, None] + d[None, :] * stride_od
        gap = tl.load(teacher + at_v, mask=inside, other=0.0).to(tl.float32)
        gap -= tl.load(student + at_s, mask=inside, other=0.0).to(tl.float32)
        log_variance = tl.load(theta + at_o, mask=inside, other=0.0).to(tl.float32)
        variance = 2 * tl.exp(log_variance)
        weighted = gap / (EPS + variance)
        total += tl.where(inside, gap * weighted + log_variance, 0.0)
        at = r.to(tl.int64)[:, None] * width + d[None, :]
        by_student = tl.where(inside, -2 * weighted, 0.0)
        by_theta = tl.where(inside, 1 - variance * weighted * weighted, 0.0)
        tl.store(d_student + at, by_student.to(d_student.dtype.element_ty), mask=written)
        tl.store(d_theta + at, by_theta.to(d_theta.dtype.element_ty), mask=written)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def scale_kernel(
    grad, terms,  # [] float32
    d_student, d_theta,  # [N], gradients of the sum of all terms
    by_student, by_theta,  # [N]
    count, SIZE: tl.constexpr,
):  # fmt: skip
    """by_x = d_x grad / terms, rounded once."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    scale = tl.div_rn(tl.load(grad).to(tl.float32), tl.load(terms))
    student = tl.load(d_student + i, mask=i < count, other=0.0).to(tl.float32) * scale
    theta = tl.load(d_theta + i, mask=i < count, other=0.0).to(tl.float32) * scale
    tl.store(by_student + i, student.to(by_student.dtype.element_ty), mask=i < count)
    tl.store(by_theta + i, theta.to(by_theta.dtype.element_ty), mask=i < count)


def kept(x: Tensor) -> torch.dtype:
    """The dtype of the saved gradients: float16 would overflow before they are divided by the number of terms."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def forward(
    teacher: Tensor, student: Tensor, theta: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op: (loss, gradients of the sum of terms wrt student and theta, number of terms as float32)."""
    batch, rows, width = student.shape
    count = batch * rows
    d_student = student.new_empty(student.shape, dtype=kept(student))
    d_theta = theta.new_empty(theta.shape, dtype=kept(theta))
    if lengths is None:
        terms = student.new_full((), count * width, dtype=torch.float32)
    else:
        terms = (lengths.clamp(max=rows).sum() * width).float()  # whatever torch's default dtype is
    if count == 0 or width == 0:
        return student.new_zeros((), dtype=torch.float32) / terms, d_student, d_theta, terms
    tile = (8, 128)
    programs = cdiv(count, tile[0])
    sums = student.new_empty(programs, dtype=torch.float32)
    distill_kernel[programs,](
        teacher, student, theta, d_student, d_theta, sums, lengths, count, rows, width,
        *teacher.stride(), *student.stride(), *theta.stride(), ROWS=tile[0], COLS=tile[1], num_warps=4,
    )  # fmt: skip
    return sums.sum() / terms, d_student, d_theta, terms


def backward(grad: Tensor, d_student: Tensor, d_theta: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of student and theta, from those of the sum of terms and the gradient of the loss."""
    by_student, by_theta = torch.empty_like(d_student), torch.empty_like(d_theta)
    if count := d_student.numel():
        size = 2048
        scale_kernel[(cdiv(count, size),)](grad, terms, d_student, d_theta, by_student, by_theta, count, SIZE=size)
    return by_student, by_theta
