"""Device selection by name."""

import contextlib
import os

import torch

from .data.errors import DataError


def device_of(name: str) -> torch.device:
    """Returns the device for a name such as cpu or cuda:1; "auto" is a GPU if available, else the CPU.

    Under torchrun, "auto" and "cuda" select the GPU of LOCAL_RANK. Raises DataError if the device is unavailable.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it must be auto, cpu or cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current GPU inside the block, as its streams and CUDA graphs require; no effect on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
