"""What turns frames and sound into vectors, and how to bring another encoder.

A visual encoder is anything with `size` (pixels a side) and `width` that takes uint8 (N, 3, size, size) and gives
(N, width); an audio encoder anything with `rate` (it must be 16,000 Hz) and `width` that takes N windows of samples and
gives (N, width). Windows are sliced like an array, windows[a:b] -> (b - a, samples) float32: they may be too many to
hold at once. One video's windows come together; in a stream they come one by one, and an encoder which standardises
by all of them has statistics(windows) -> (mean, std) besides, and takes them as `statistics`, as Wav2CLIP's does.
"module:factory" names a function (device) -> encoder.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..device import device_of
from ..models.text import TextWeightsError, read_weights
from .decode import RATE, Windows
from .errors import MediaError
from .wav2clip import Wav2Clip

BATCH = 64  # images at once: 64 x 197 rows of 768 fill a GPU, and fit a small machine's memory
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


class VisualEncoder(Protocol):
    size: int
    width: int

    def __call__(self, images: Tensor) -> Tensor: ...


class AudioEncoder(Protocol):
    rate: int
    width: int

    def __call__(self, windows: Windows) -> Tensor: ...


@dataclass(frozen=True)
class Encoders:
    """Which encoders, and where they run: small enough to be sent to a worker, which loads them itself."""

    visual: str = "clip"  # or module:factory
    visual_weights: str = "openai"
    audio: str = "wav2clip"  # or module:factory; "none" leaves the sound out
    audio_weights: str | None = None
    device: str = "auto"  # is made out where they are loaded
    path: str | None = None  # a folder that module:factory is looked for in last

    def load(self) -> tuple[VisualEncoder, AudioEncoder | None]:
        """Both, the second None for "none". Raises MediaError, DataError."""
        device = device_of(self.device)
        named = any(":" in name for name in (self.visual, self.audio))
        if named and self.path is not None and self.path not in sys.path:
            sys.path.append(self.path)  # last: a file there must not be taken for a library
        heard = None if self.audio == "none" else audio_encoder(self.audio, self.audio_weights, device)
        return visual_encoder(self.visual, self.visual_weights, device), heard


class ClipVisual(nn.Module):
    """CLIP ViT-B/16's image tower, with its projection, from open_clip: uint8 (N, 3, 224, 224) -> (N, 512) float32.

    weights: "openai" (downloaded once, checked by SHA-256), "random", or the path of CLIP's weights. Computes in
    bfloat16 on a GPU. Raises MediaError where the weights cannot be had.
    """

    size, width = 224, 512
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path = "openai", device: str | torch.device = "cpu"):
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise MediaError(
                "CLIP comes with open_clip, which is not installed: pip install open_clip_torch"
            ) from error
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # what "random" draws
                pretrained = "openai" if weights == "openai" else None
                model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=pretrained, device="cpu")
        except Exception as error:  # the network, a proxy, a full disk: whatever it was, the remedy is the same
            raise MediaError(
                f"CLIP's ViT-B/16 weights could not be had ({type(error).__name__}: {error}). Put ViT-B-16.pt into "
                "~/.cache/clip, or give its path as --visual-weights; 'random' runs without them, for tests only"
            ) from error
        self.tower = model.visual.float().eval().requires_grad_(False)
        if weights not in ("openai", "random"):
            self._load(Path(weights))
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.to(device)

    def _load(self, path: Path) -> None:
        try:
            state = read_weights(path)
        except TextWeightsError as error:  # what reads CLIP's file speaks of its other half
            reason = "cannot be read as CLIP's weights" if path.is_file() else "no such file"
            raise MediaError(f"{path}: {reason}; give openai, random or the path of ViT-B-16.pt") from error
        own = self.tower.state_dict()
        wrong = [n for n, x in own.items() if f"visual.{n}" not in state or state[f"visual.{n}"].shape != x.shape]
        if wrong:
            raise MediaError(f"{path}: not CLIP's ViT-B/16: visual.{wrong[0]} missing or of another shape")
        self.tower.load_state_dict({name: state[f"visual.{name}"].float() for name in own})

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        out = []
        for part in images.split(BATCH):
            x = (part.to(self.mean.device, torch.float32) / 255 - self.mean) / self.std
            with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
                out.append(self.tower(x).float().cpu())
        return torch.cat(out)


def visual_encoder(name: str, weights: str, device: str | torch.device) -> VisualEncoder:
    """ "clip", or "module:factory". Raises MediaError."""
    return ClipVisual(weights, device) if name == "clip" else _by_name(name, device, ("size", "width"))


def audio_encoder(name: str, weights: str | None, device: str | torch.device) -> AudioEncoder:
    """ "wav2clip", or "module:factory". Raises MediaError."""
    if name == "wav2clip":
        if weights is None:
            raise MediaError(
                "Wav2CLIP's weights are wanted: --audio-weights with the path of Wav2CLIP.pt (its authors' release "
                "v0.1.0-alpha), an https:// address that ends in #sha256=<digits>, or random, for tests only"
            )
        return Wav2Clip(weights, device)
    encoder: AudioEncoder = _by_name(name, device, ("rate", "width"))
    if encoder.rate != RATE:
        raise MediaError(f"audio encoder {name}: it wants {encoder.rate} Hz; sound is given at {RATE}")
    return encoder


def _by_name(name: str, device: str | torch.device, wanted: tuple[str, ...]) -> Any:
    module, _, factory = name.partition(":")
    try:
        encoder = getattr(importlib.import_module(module), factory)(device)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise MediaError(f"encoder {name!r}: expected module:factory, a function of a device ({error})") from error
    if missing := [attribute for attribute in wanted if not hasattr(encoder, attribute)]:
        raise MediaError(f"encoder {name!r}: what its factory made has no {' and no '.join(missing)}")
    return encoder


def encoded(name: str, encoder: Any, given: Any, rows: int, **options: Any) -> np.ndarray:
    """encoder(given) as (rows, width) float32. Raises MediaError where an encoder does not keep to the protocol."""
    out = torch.as_tensor(encoder(given, **options)).detach().float().cpu().numpy()
    if out.shape != (rows, encoder.width):
        raise MediaError(f"the {name} encoder gave shape {out.shape}, expected {(rows, encoder.width)}")
    if not np.isfinite(out).all():
        raise MediaError(f"the {name} encoder gave NaN or infinity")
    return out
