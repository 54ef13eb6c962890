"""Wav2CLIP: audio embeddings in CLIP's space (Wu, Seetharaman, Kumar, Bello: arXiv 2110.11499; MIT).

    power spectrogram (n_fft = window = 512, Hann, hop 353, centred, reflect padding) -> log(x + 1e-7)
    -> (x - mean) / (std + 1e-9) -> ResNet-18 with one input channel -> Linear, ReLU, Linear

mean and std are taken over all windows of a call, so an embedding depends on the other windows. A call gets the windows
of one video only.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.text import load_tensors, tensors, unreadable
from .errors import MediaError
from .fetch import fetch

FFT, HOP = 512, 353
CHUNK = 64  # windows per batch
PREFIXES = {"audio_encoder.": "encoder.", "audio_transform.": "transform."}


class Wav2Clip(nn.Module):
    """Embeds windows of 16 kHz mono audio as vectors of width 512.

    weights: path of the released Wav2CLIP.pt, a URL such as "https://...#sha256=<64 digits>", or "random"
    Raises MediaError if the weights are unavailable or do not match.
    """

    rate, width = 16_000, 512

    def __init__(self, weights: str | Path, device: str | torch.device = "cpu"):
        super().__init__()
        from torchvision.models import resnet18

        self.encoder: Any = resnet18()  # Any: for attributes unknown to nn.Module
        self.encoder.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        self.encoder.fc = nn.Identity()
        self.encoder.spectrogram = nn.Module()  # checkpoints contain the window under this name
        self.encoder.spectrogram.register_buffer("window", torch.hann_window(FFT))
        layers = nn.Linear(512, 512), nn.ReLU(), nn.Identity(), nn.Linear(512, 512)  # the third is dropout in training
        self.transform: Any = nn.Module()
        self.transform.sequential = nn.Sequential(*layers)
        if weights == "random":
            self.randomize()
        else:
            self.load(weights)
        self.eval().requires_grad_(False).to(device)

    def randomize(self) -> None:
        """Draws every weight from a separate generator, the same each time."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5)

    def load(self, weights: str | Path) -> None:
        path = fetch(weights)
        try:
            state = load_tensors(path)
        except Exception as error:
            raise MediaError(f"{path}: {unreadable(error)}") from error
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        state = tensors(state)
        for old, new in PREFIXES.items():
            state = {new + name.removeprefix(old) if name.startswith(old) else name: x for name, x in state.items()}
        wanted = {n: x for n, x in self.state_dict().items() if not n.endswith("num_batches_tracked")}
        state = {"encoder.spectrogram.window": self.encoder.spectrogram.window, **state}  # may be missing
        wrong = [n for n, x in wanted.items() if n not in state or state[n].shape != x.shape]
        if wrong:
            raise MediaError(f"{path}: not Wav2CLIP's weights: {', '.join(wrong[:3])} missing or of another shape")
        self.load_state_dict({n: state[n].float() for n in wanted}, strict=False)

    def spectrogram(self, windows: np.ndarray | Tensor) -> Tensor:
        """Log power spectrograms: (N, samples) -> (N, 1, 257, frames) float32. Raises MediaError on short windows."""
        x = torch.as_tensor(windows, dtype=torch.float32, device=self.encoder.conv1.weight.device)
        if x.shape[1] <= FFT // 2:
            raise MediaError(
                f"a window of sound has {x.shape[1]} samples, Wav2CLIP needs {FFT // 2 + 1}: use longer snippets"
            )
        window = self.encoder.spectrogram.window
        spectrum = torch.stft(x, FFT, HOP, FFT, window, center=True, pad_mode="reflect", return_complex=True)
        return (spectrum.abs() ** 2 + 1e-7).log()[:, None]

    @torch.no_grad()
    def forward(self, windows: Any, statistics: tuple[float, float] | None = None) -> Tensor:
        """Embeds windows (N, samples), or an object whose slices are such arrays, as (N, 512) float32 on the CPU.

        Reads the windows in batches, and twice unless `statistics` is given.

        statistics: (mean, std) to use instead of those of the windows
        """
        parts = [slice(start, start + CHUNK) for start in range(0, len(windows), CHUNK)]
        mean, std = statistics or self.statistics(windows)
        out = [
            self.transform.sequential(self.encoder((self.spectrogram(windows[p]) - mean) / (std + 1e-9))) for p in parts
        ]
        return torch.cat(out).cpu() if out else torch.zeros(0, self.width)

    @torch.no_grad()
    def statistics(self, windows: Any) -> tuple[float, float]:
        """Mean and unbiased standard deviation over the spectrograms of all windows."""
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for start in range(0, len(windows), CHUNK):
            x = self.spectrogram(windows[start : start + CHUNK]).double()
            count, total, squares = count + x.numel(), total + x.sum(), squares + x.square().sum()
        if count < 2:
            return 0.0, 1.0
        mean = total / count
        return float(mean), float(((squares - count * mean**2) / (count - 1)).clamp_min(0).sqrt())
