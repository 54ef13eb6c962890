"""Device selection by name, and the memory of a process that computes on its CPU."""

import contextlib
import ctypes
import os
import platform
import re

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
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise DataError(f"device {name!r}: it must be auto, cpu, cuda, or one of several, such as cuda:1")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    return device


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current GPU inside the block, as its streams and CUDA graphs require; no effect on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def keep_memory() -> None:
    """Keeps freed memory in the process, as torch does on a GPU. Affects the whole process; glibc only.

    glibc returns large blocks to the system, which clears all their pages when the next step allocates them: a tenth
    of a training step on two cores. The peak grows by about as much.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)  # all blocks from the heap
    libc.mallopt(trim_threshold, 2**31 - 1)
