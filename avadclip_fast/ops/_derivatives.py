"""Derivatives of the operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor, autograd

from ._dispatch import BackendError

_library = torch.library.Library("avadclip_fast", "FRAGMENT")


def differentiable(op: str, backward: Callable, save: Callable, one_result: bool = False) -> None:
    """Registers backward(ctx, *grads) as the derivative of an operator, and save(ctx, inputs, output) before it.

    one_result: only the first output is a result; the others serve the backward pass, which is then
    backward(ctx, grad), and is not run if the result has no gradient

    As torch.library.register_autograd, but without filling in defaults of arguments, of which there are none: that took
    most of 57 us a call, now 18. A step without a CUDA graph makes hundreds of calls.
    """
    operator = getattr(torch.ops.avadclip_fast, op).default

    def plain(*args):
        # As torch's own operators, it does not note views: nobody may write to a result that is noted as one.
        with _C._AutoDispatchBelowADInplaceOrView():
            return operator(*args)

    def forward(ctx, *args):
        result = plain(*args)
        if one_result:
            ctx.mark_non_differentiable(*result[1:])
            ctx.set_materialize_grads(False)
        save(ctx, [_savable(x) for x in args], result)
        return result

    def of_first(ctx, grad, *_):
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad)

    # The class names its nodes in the graph, where profiling and errors look for whose they are.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_first if one_result else backward)}
    derivative: Any = type(f"avadclip_fast_{op}", (autograd.Function,), methods)

    def run(*args):
        needed = torch.is_grad_enabled() and _C._any_requires_grad(*args)
        return derivative.apply(*args) if needed else plain(*args)

    _library.impl(op, run, "Autograd")


def _savable(x: Any) -> Any:
    """An argument as torch saves it: a tensor of inference mode, which it refuses, as a copy."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def differentiable_once(op: str, backward: str) -> None:
    """Makes differentiating `backward`, the operator of `op`'s backward pass, raise BackendError.

    Torch treats the result of an operator without a derivative as a constant, so second derivatives would silently
    lack a term.
    """

    def refuse(ctx, *grads):
        # Not backend='reference': the models take none.
        raise BackendError(f"{op} is not differentiable twice here; run the forward pass in use_backend('reference')")

    differentiable(backward, refuse, lambda ctx, inputs, output: None)


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

    differentiable(operator, backward, save)


def empty_grads(needs: Sequence[bool], *like: Tensor) -> tuple[Tensor, ...]:
    """Placeholders for gradients of tensors like these if none are computed: empty where `needs` is False."""
    return tuple(x.new_empty(x.shape if need else 0) for x, need in zip(like, needs, strict=True))


def wanted(needs: Sequence[bool], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """An operator's gradients in the form that autograd takes: None where `needs` is False."""
    return tuple(x if need else None for x, need in zip(grads, needs, strict=True))
