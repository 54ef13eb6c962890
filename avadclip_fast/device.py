"""A device by its name."""

import torch

from .data.errors import DataError


def device_of(name: str) -> torch.device:
    """The device of a name such as cpu or cuda:1; "auto" is a GPU where there is one. Raises DataError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device {name!r} is not to be had: {str(error).splitlines()[0]}") from error
    return device
