"""Triton support: availability checks, and kernels registered as operators."""

import functools
import importlib.util
import os
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._build import once_a_device
from . import _dispatch
from ._autocast import product_dtype

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


def declines_exact(weight: Tensor) -> str | None:
    """Returns why the automatic choice leaves the products with a weight to the reference, or None.

    In exact float32 no tensor core helps, and cuBLAS is several times faster. A convolution is left to cuDNN only if
    cuDNN is exact too: by default, it multiplies float32 in tf32.
    """
    if INTERPRETED or product_dtype(weight) != torch.float32 or not _torch_is_exact(weight.ndim == 3):
        return None
    return "in float32 without tf32, cuBLAS and cuDNN multiply faster"


def fused(backend: str | None, x: Tensor, *weights: Tensor) -> bool:
    """Whether a whole layer of x is one operator here: gradients are wanted, and Triton serves its products.

    backend: as for an op
    """
    wanted = backend or _dispatch.forced()
    if wanted not in (None, "triton") or _dispatch.exporting() or _dispatch.transformed():
        return False
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))):
        return False
    return triton_reason(x, *weights) is None and (wanted == "triton" or declines_exact(weights[0]) is None)


def _torch_is_exact(convolution: bool) -> bool:
    """Whether torch's own products in float32 are exact ones."""
    # fp32_precision reflects both settings; reading allow_tf32 raises once fp32_precision has been set.
    cudnn: Any = torch.backends.cudnn
    settings = [torch.backends.cuda.matmul, *([cudnn.conv] if convolution else [])]
    return all(setting.fp32_precision != "tf32" for setting in settings)


# torch.compile cannot look inside, takes the answer for a constant, and compiles anew where the setting changes.
_torch_is_exact._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _addressable(x):
    """Returns an argument as kernels can read it: vectors without strides, and a video by offsets of 32 bits."""
    if not isinstance(x, Tensor) or x.is_contiguous():
        return x
    far = any((n - 1) * stride >= 2**31 for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x.contiguous() if far or x.ndim == 1 else x


def implement(operator: str, kernel: str, function: str) -> None:
    """Registers `function` of kernels/`kernel`.py as an operator's implementation; the first call imports Triton."""

    @functools.cache
    def module() -> ModuleType:
        return import_module(f"avadclip_fast.kernels.{kernel}")

    def run(*args):
        # Triton launches on the current GPU, which is not always that of the tensors.
        with torch.cuda.device_of(args[0]):
            return getattr(module(), function)(*map(_addressable, args))

    devices = ("CPU", "CUDA")  # CPU: Triton's interpreter
    torch.library.impl(f"avadclip_fast::{operator}", devices, run)
