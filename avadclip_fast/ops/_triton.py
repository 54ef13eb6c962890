"""Triton support: availability checks, and kernels registered as operators."""

import importlib.util
import os
from importlib import import_module

import torch
from torch import Tensor

from .._build import once_a_device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run slowly on the CPU, for tests
_DEVICE = "cpu" if INTERPRETED else "cuda"
# No bfloat16 in the interpreter: its tl.dot multiplies bit patterns.
_DTYPES = (torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
_OLDEST = (8, 0)  # compute capability that Triton supports
_MISSING = importlib.util.find_spec("triton") is None


def triton_reason(*tensors: Tensor) -> str | None:
    """Returns why the Triton kernels cannot take these tensors, or None."""
    if _MISSING:
        return "triton is not installed"
    for x in tensors:
        if x.device.type != _DEVICE:
            return f"it runs on {_DEVICE}, and a tensor is on {x.device}"
        if x.dtype not in _DTYPES:
            return f"it takes {', '.join(str(d) for d in _DTYPES)}, not {x.dtype}"
    return None if INTERPRETED else _too_old(tensors[0].device)


@once_a_device
def _too_old(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found >= _OLDEST:
        return None
    oldest, own = (".".join(map(str, capability)) for capability in (_OLDEST, found))
    return f"it needs compute capability {oldest}, and {device} has {own}"


def implement(operator: str, kernel: str, function: str) -> None:
    """Registers `function` of kernels/`kernel`.py as an operator's implementation; the first call imports Triton."""

    def run(*args):
        # Kernels read vectors, such as lengths and biases, without their strides.
        dense = [x.contiguous() if isinstance(x, Tensor) and x.ndim == 1 else x for x in args]
        # Triton launches on the current GPU, which is not always that of the tensors.
        with torch.cuda.device_of(args[0]):
            return getattr(import_module(f"avadclip_fast.kernels.{kernel}"), function)(*dense)

    devices = ("CPU", "CUDA")  # CPU: Triton's interpreter
    torch.library.impl(f"avadclip_fast::{operator}", devices, run)
