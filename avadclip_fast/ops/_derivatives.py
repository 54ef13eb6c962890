"""Derivatives that several operators have in the same way."""

import torch

from ._dispatch import BackendError


def differentiable_once(op: str, backward: str) -> None:
    """Makes a gradient through `backward`, the operator of `op`'s backward pass, raise.

    To torch, the result of an operator without a derivative is a constant: second derivatives would lack a term.
    """

    def refuse(ctx, *grads):
        raise BackendError(f"{op} is not differentiable twice here; use backend='reference'")

    torch.library.register_autograd(f"avadclip_fast::{backward}", refuse)


def adjoint(operator: str, of: str, dim: int) -> None:
    """Makes the operator `of` the derivative of `operator`; both are (Tensor x, Tensor lengths, int size), linear in x.

    dim: of x, whose extent is the size that `of` has to give back.
    """

    def save(ctx, inputs, output):
        ctx.size = inputs[0].shape[dim]
        ctx.save_for_backward(inputs[1])

    def backward(ctx, grad):
        return getattr(torch.ops.avadclip_fast, of)(grad, *ctx.saved_tensors, ctx.size), None, None

    torch.library.register_autograd(f"avadclip_fast::{operator}", backward, setup_context=save)
