"""Encoders by name, and what they must be.

`--visual-encoder package.module:factory` calls factory(weights=..., device=...), which gives a VisualEncoder, and
`--audio-encoder` likewise an AudioEncoder; weights is what the user gave, or None.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .clip import ClipImages
from .errors import MediaError
from .wav2clip import Wav2Clip

BUILT_IN = {"clip": ClipImages, "wav2clip": Wav2Clip}


@runtime_checkable
class VisualEncoder(Protocol):
    """Images in, one row each out; it is called with parts of a video, so a row depends on its image alone."""

    side: int  # pixels of the square images that it wants
    width: int  # of its rows

    def __call__(self, images: Tensor) -> Tensor:
        """images (N, 3, side, side) uint8 RGB -> (N, width) float32, on the CPU."""
        ...


@runtime_checkable
class AudioEncoder(Protocol):
    """Windows of sound in, one row each out; it is called once a video, with all of its windows."""

    width: int

    def __call__(self, windows: Sequence) -> Tensor:
        """windows: slices of it, windows[a:b], are (b - a, samples) float32 in [-1, 1], 16 kHz mono -> (N, width)."""
        ...


def make_encoder(name: str, kind: type, weights: str | None, device: str | torch.device):
    """The encoder of a built-in name or of "module:factory". Raises MediaError where it is not one of `kind`."""
    options = {} if weights is None and name in BUILT_IN else {"weights": weights}
    encoder = find(name)(**options, device=device)
    if not isinstance(encoder, kind):
        wanted = ", ".join([*kind.__annotations__, "__call__"])
        raise MediaError(f"{name} gave a {type(encoder).__name__}, which is no {kind.__name__}: it needs {wanted}")
    return encoder


def find(name: str) -> Callable:
    """What a name of an encoder stands for. Raises MediaError."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise MediaError(f"no encoder {name!r}: give {' or '.join(BUILT_IN)}, or your own as package.module:factory")
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise MediaError(f"encoder {name}: {error}; its module must be importable from here") from error
