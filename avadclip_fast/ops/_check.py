"""Argument checks shared by all ops. Every message states the expected and the actual value."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._autocast import autocasts

_WHOLE = int | np.integer | torch.SymInt
REAL = _WHOLE | float | np.floating | torch.SymFloat


def check_are_tensors(op: str, **values: object) -> None:
    """Raises ValueError if a value is not a tensor."""
    for name, value in values.items():
        _tensor(op, name, value)


def _tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    check_padded(op, name, value)
    return value


def check_padded(op: str, name: str, x: Tensor) -> None:
    """Raises ValueError if videos of several lengths come as a nested tensor."""
    if x.is_nested:
        remedy = f"give {name}.to_padded_tensor(0.0), and lengths"
        raise ValueError(f"{op}: {name} must be a padded tensor, got a nested one; {remedy}")


def check_tensors(op: str, *specs: tuple[str, Tensor | None, str], optional: tuple[str, ...] = ()) -> dict[str, int]:
    """Checks rank, sizes, dtype and device of an op's floating-point arguments; returns the sizes.

    specs: (name, tensor, shape); the letters of the shape must agree across arguments and may have a factor, as in
    ("gate_weight", w, "D 2D"); a number alone is a size
    optional: names that may be None
    Raises ValueError with the argument's name and the expected and actual shape, dtype or device.
    """
    sizes: dict[str, int] = {}
    first = specs[0][0]
    like = _tensor(op, first, specs[0][1])
    for name, given, shape in specs:
        if given is None and name in optional:
            continue
        x = _tensor(op, name, given)
        dims = shape.split()
        if x.ndim != len(dims):
            raise ValueError(f"{op}: {name} must have shape [{', '.join(dims)}], got {list(x.shape)}")
        for dim, size in zip(dims, x.shape, strict=True):
            letter = dim.lstrip("0123456789")
            factor = int(dim.removesuffix(letter) or 1)
            met = letter in sizes
            if letter and not met:
                sizes[letter] = size // factor
            if size != factor * sizes.get(letter, 1):
                known = " with " + ", ".join(f"{k}={v}" for k, v in sizes.items()) if met else ""
                raise ValueError(f"{op}: {name} must have shape [{', '.join(dims)}]{known}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")
        if x.device != like.device:
            raise ValueError(f"{op}: {name} is on {x.device}, but {first} is on {like.device}")
        if x.dtype != like.dtype and not autocasts(x.device.type):
            raise ValueError(f"{op}: {name} is {x.dtype}, but {first} is {like.dtype}; cast one, or use torch.autocast")
    return sizes


def check_lengths(
    op: str,
    lengths: Tensor | None,
    batch: int,
    rows: int,
    device: torch.device,
    required: bool = False,
    name: str = "lengths",
) -> None:
    """Checks that `lengths` is an integer tensor [B] with 1 <= lengths <= T, or None if not required.

    Values are checked on the CPU only, since reading them from a GPU would synchronise host and device.
    Raises ValueError.
    """
    if lengths is None and not required:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"{op}: {name} must be an int32 or int64 tensor, got {kind}")
    if lengths.shape != (batch,):
        raise ValueError(f"{op}: {name} must have shape [{batch}], got {list(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"{op}: {name} is on {lengths.device}, but the features are on {device}")
    if batch and (values := values_of(lengths)) is not None:
        if values.min() < 1 or values.max() > rows:
            raise ValueError(f"{op}: {name} must lie in 1..{rows}, got {values.min()}..{values.max()}")


def check_rows(module: str, width: int, lengths: Tensor | None, **rows: Tensor) -> None:
    """Checks what a module is given: rows (B, T, width) by name, and `lengths` (B,) or None. Raises ValueError."""
    sizes = check_tensors(module, *((name, x, f"B T {width}") for name, x in rows.items()))
    check_lengths(module, lengths, sizes["B"], sizes["T"], next(iter(rows.values())).device)


def leading(x: Tensor) -> str:
    """The dimensions before the last, for `check_tensors`."""
    return " ".join("BTSRQPMLJGFEA"[: x.ndim - 1])


def check_needed(op: str, needed: Tensor | None, x: Tensor) -> None:
    """Checks `needed`, (B,): how many rows of a result for x (B, T, I) are needed. Raises ValueError."""
    if needed is None:
        return
    if x.ndim != 3:
        raise ValueError(f"{op}: needed goes with x of shape [B, T, I], got {list(x.shape)}")
    check_lengths(op, needed, x.shape[0], x.shape[1], x.device, name="needed lengths")


def check_packed(op: str, lengths: Tensor, total: int, device: torch.device) -> None:
    """Checks lengths (B,), which must sum to `total`; values are checked on the CPU only. Raises ValueError."""
    check_are_tensors(op, lengths=lengths)
    check_lengths(op, lengths, lengths.numel(), total, device)
    values = values_of(lengths)
    if values is not None and values.sum() != total:
        raise ValueError(f"{op}: lengths must sum to the number of rows, {total}, got {values.sum()}")


def values_of(x: Tensor) -> np.ndarray | None:
    """What is in a tensor on the CPU, or None: traced, fake and wrapped tensors have no values."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or x.dtype == torch.bfloat16:  # which NumPy has not
        return None
    return x.numpy(force=x.requires_grad)  # adds no operators to a trace, unless forced


def check_positive(op: str, **values: Any) -> None:
    """Raises ValueError if a number is not positive."""
    for name, value in values.items():
        if not isinstance(value, REAL) or not value > 0:
            raise ValueError(f"{op}: {name} must be a number above zero, got {value!r}")


def check_counts(op: str, **values: Any) -> None:
    """Raises ValueError if a number is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _WHOLE) or value < 1:
            raise ValueError(f"{op}: {name} must be a whole number above zero, got {value!r}")
