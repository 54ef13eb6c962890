"""When Triton can serve, and its kernels as operators."""

import importlib.util
import os
from importlib import import_module

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly: for tests
_DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's tl.dot multiplies the bit patterns of bfloat16.
_DTYPES = (torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
_MISSING = importlib.util.find_spec("triton") is None


def triton_reason(*tensors: Tensor) -> str | None:
    """Why Triton's kernels cannot take these tensors, or None."""
    if _MISSING:
        return "triton is not installed"
    for x in tensors:
        if x.device.type != _DEVICE:
            return f"it runs on {_DEVICE}, and a tensor is on {x.device}"
        if x.dtype not in _DTYPES:
            return f"it takes {', '.join(str(d) for d in _DTYPES)}, not {x.dtype}"
    return None


def implement(operator: str, kernel: str, function: str) -> None:
    """Makes `function` of kernels/`kernel`.py what an operator runs; Triton is imported by the first call."""

    def run(*args):
        return getattr(import_module(f"avadclip_fast.kernels.{kernel}"), function)(*args)

    devices = ("CPU", "CUDA")  # CPU: Triton's interpreter
    torch.library.impl(f"avadclip_fast::{operator}", devices, run)
