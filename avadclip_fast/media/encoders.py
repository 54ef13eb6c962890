"""Visual and audio encoders, and the interface for custom ones.

A visual encoder is a callable with `size` (pixels per side) and `width` that maps uint8 (N, 3, size, size) to
(N, width). An audio encoder is a callable with `rate` (must be 16,000 Hz) and `width` that maps N windows to
(N, width). Windows are sliced like an array, windows[a:b] -> (b - a, samples) float32, because all of them may not fit
in memory. A call gets all windows of a video, but a stream passes them one by one. An encoder that standardises over
all windows therefore also provides statistics(windows) -> (mean, std) and accepts them as `statistics`, like Wav2CLIP.
"module:factory" names a function (device) -> encoder.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..device import device_of
from ..models.text import TextWeightsError, openai_weights, read_weights
from .decode import RATE, Windows
from .errors import MediaError
from .wav2clip import Wav2Clip

WAV2CLIP = "https://github.com/descriptinc/lyrebird-wav2clip/releases/download/v0.1.0-alpha/Wav2CLIP.pt"
BATCH = 64  # images per batch: 64 x 197 rows of 768 fill a GPU and fit in a small machine's memory
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
    """Specification of encoders and their device; small enough to send to workers, which load them."""

    visual: str = "clip"  # or module:factory
    visual_weights: str = "openai"
    audio: str = "wav2clip"  # or module:factory, or "none" to skip audio
    audio_weights: str | None = None
    device: str = "auto"  # resolved on loading
    path: str | None = None  # folder appended to sys.path for module:factory

    def load(self) -> tuple[VisualEncoder, AudioEncoder | None]:
        """Loads both encoders; the audio encoder is None for "none". Raises MediaError or DataError."""
        device = device_of(self.device)
        named = any(":" in name for name in (self.visual, self.audio))
        if named and self.path is not None and self.path not in sys.path:
            sys.path.append(self.path)  # last, so that its files cannot shadow libraries
        heard = None if self.audio == "none" else audio_encoder(self.audio, self.audio_weights, device)
        return visual_encoder(self.visual, self.visual_weights, device), heard


class ClipVisual(nn.Module):
    """CLIP ViT-B/16's image tower and projection, from open_clip: uint8 (N, 3, 224, 224) -> (N, 512) float32.

    weights: "openai" (downloaded once, verified by SHA-256), "random", or the path of CLIP's weights
    Raises MediaError if the weights are unavailable.
    Precision: bfloat16 autocast on a GPU, float32 on a CPU.
    """

    size, width = 224, 512
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path = "openai", device: str | torch.device = "cpu"):
        super().__init__()
        try:
            import open_clip
        except (ImportError, RuntimeError) as error:  # RuntimeError: with a torchvision of another torch
            raise MediaError(f"CLIP comes with open_clip: pip install open_clip_torch ({error})") from error
        try:
            # not by open_clip.create_model, which takes them from the Hub, where nothing pins their hash
            source = openai_weights("--visual-weights") if weights == "openai" else Path(weights)
        except TextWeightsError as error:
            raise MediaError(str(error)) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for "random"
            model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
        self.tower = model.visual.float().eval().requires_grad_(False)
        if weights != "random":
            self._load(source)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.to(device)

    def _load(self, path: Path) -> None:
        try:
            state = read_weights(path)
        except TextWeightsError as error:  # its message is about the text weights
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
    """Loads "clip" or "module:factory". Raises MediaError."""
    return ClipVisual(weights, device) if name == "clip" else _by_name(name, device, ("size", "width"))


def audio_encoder(name: str, weights: str | None, device: str | torch.device) -> AudioEncoder:
    """Loads "wav2clip" or "module:factory". Raises MediaError."""
    if name == "wav2clip":
        if weights is None:
            raise MediaError(
                f"Wav2CLIP needs weights: download {WAV2CLIP} and give its path as --audio-weights. Or give the URL "
                "followed by #sha256= and the file's SHA-256, or random, for tests only. --audio-encoder none leaves "
                "the sound out"
            )
        return Wav2Clip(weights, device)
    encoder: AudioEncoder = _by_name(name, device, ("rate", "width"))
    if encoder.rate != RATE:
        raise MediaError(f"audio encoder {name}: it requires {encoder.rate} Hz, but sound is decoded at {RATE} Hz")
    return encoder


def _by_name(name: str, device: str | torch.device, wanted: tuple[str, ...]) -> Any:
    module, _, factory = name.partition(":")
    try:
        encoder = getattr(importlib.import_module(module), factory)(device)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise MediaError(f"encoder {name!r}: expected module:factory, a function of a device ({error})") from error
    if missing := [attribute for attribute in wanted if not hasattr(encoder, attribute)]:
        raise MediaError(f"encoder {name!r}: the object returned by its factory has no {' and no '.join(missing)}")
    return encoder


def encoded(
    name: str, encoder: Any, given: Any, rows: int, dtype: npt.DTypeLike = np.float32, **options: Any
) -> np.ndarray:
    """Returns encoder(given) as (rows, width). Raises MediaError on a wrong shape, NaN, or values beyond `dtype`."""
    out = torch.as_tensor(encoder(given, **options)).detach().float().cpu().numpy()
    if out.shape != (rows, encoder.width):
        raise MediaError(f"the {name} encoder gave shape {out.shape}, expected {(rows, encoder.width)}")
    if not np.isfinite(out).all():
        raise MediaError(f"the {name} encoder gave NaN or infinity")
    largest, most = np.abs(out).max(initial=0), np.finfo(dtype).max
    if largest > most:
        raise MediaError(f"the {name} encoder gave {largest:g}, and {np.dtype(dtype)} ends at {most:g}: give --float32")
    return out.astype(dtype, copy=False)
