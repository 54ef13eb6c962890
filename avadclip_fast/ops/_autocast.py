"""References and activations under torch.autocast."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

LOWERING = ("cuda",)  # devices that pass activations on in autocast's dtype; a CPU casts them at each product


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. Torch raises for "meta", which has no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(reference: Callable) -> Callable:
    """Keeps a reference in the precision of its inputs, as the kernels are: a bf16 cosine would miss the threshold."""

    @functools.wraps(reference)
    def run(x: Tensor, *args, **kwargs):
        if not autocasts(x.device.type):
            return reference(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, *args, **kwargs)

    return run


def activations(x: Tensor) -> Tensor:
    """`x` as layers should pass it on: on a GPU under autocast, in autocast's dtype, which halves the traffic.

    Autocast itself casts only the inputs of products, so a float32 stream would stay float32 wherever something is
    added to it. As in torch's own layers, float64 stays float64.
    """
    device = x.device.type
    if device not in LOWERING or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products of x: autocast's if it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype of their products."""
    return tuple(x.to(product_dtype(x)) for x in tensors)
