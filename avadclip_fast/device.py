"""A device by its name."""

import os

import torch

from .data.errors import DataError


def device_of(name: str) -> torch.device:
    """The device of a name such as cpu or cuda:1; "auto" is a GPU where there is one. Raises DataError.

    Of the processes that torchrun starts on a machine, each has its own GPU as "auto" and "cuda".
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device {name!r} is not to be had: {str(error).splitlines()[0]}") from error
    return device
