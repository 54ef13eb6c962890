"""Ops that are differentiable once."""

import torch

from ._dispatch import BackendError


def differentiable_once(op: str, backward: str) -> None:
    """Makes a gradient through `backward`, the operator of `op`'s backward pass, raise.

    To torch, the result of an operator without a derivative is a constant: second derivatives would lack a term.
    """

    def refuse(ctx, *grads):
        raise BackendError(f"{op} is not differentiable twice here; use backend='reference'")

    torch.library.register_autograd(f"avadclip_fast::{backward}", refuse)
