"""Derivatives shared by several operators."""

import torch

from ._dispatch import BackendError


def differentiable_once(op: str, backward: str) -> None:
    """Makes differentiating `backward`, the operator of `op`'s backward pass, raise BackendError.

    Torch treats the result of an operator without a derivative as a constant, so second derivatives would silently
    lack a term.
    """

    def refuse(ctx, *grads):
        raise BackendError(f"{op} is not differentiable twice here; use backend='reference'")

    torch.library.register_autograd(f"avadclip_fast::{backward}", refuse)


def adjoint(operator: str, of: str, dim: int) -> None:
    """Registers the operator `of` as the derivative of `operator`, its adjoint.

    Both have the signature (Tensor x, Tensor lengths, int size) and are linear in x.

    dim: dimension of x whose extent is passed to `of` as its size
    """

    def save(ctx, inputs, output):
        ctx.size = inputs[0].shape[dim]
        ctx.save_for_backward(inputs[1])

    def backward(ctx, grad):
        return getattr(torch.ops.avadclip_fast, of)(grad, *ctx.saved_tensors, ctx.size), None, None

    torch.library.register_autograd(f"avadclip_fast::{operator}", backward, setup_context=save)
