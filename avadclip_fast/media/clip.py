"""CLIP's image tower, ViT-B/16 by OpenAI (Radford et al. 2021), through open_clip."""

from pathlib import Path

import torch
from torch import Tensor

from ..models.text import OPENAI, read_weights
from .crops import SIDE
from .errors import MediaError


class ClipImages:
    """Square images in, one vector of 512 each out; not normalised, as the authors' features are.

    weights: "openai" (downloaded once, checked by SHA-256), the path of CLIP's ViT-B-16.pt or of an official AVadCLIP
    checkpoint, or "random". On a GPU it computes in bfloat16. Raises MediaError, TextWeightsError.
    """

    side, width = SIDE, 512

    def __init__(self, weights: str | Path = "openai", device: str | torch.device = "cpu"):
        try:
            import open_clip
        except ImportError as error:
            raise MediaError("CLIP's image tower comes from open_clip: pip install open_clip_torch") from error
        with torch.random.fork_rng(devices=[]):  # drawn weights are the same each time, and change nobody's draws
            torch.manual_seed(0)
            self.tower = open_clip.create_model(OPENAI[0], pretrained=None, force_quick_gelu=True).visual
        if weights != "random":
            path = _download() if weights == "openai" else Path(weights)
            own, state = self.tower.state_dict(), read_weights(path)
            wrong = [n for n, p in own.items() if f"visual.{n}" not in state or state[f"visual.{n}"].shape != p.shape]
            if wrong:
                raise MediaError(f"{path} does not hold CLIP's ViT-B/16 image tower: {', '.join(wrong[:3])} do not fit")
            self.tower.load_state_dict({n: state[f"visual.{n}"].float() for n in own})
        self.device = torch.device(device)
        self.tower.eval().requires_grad_(False).to(self.device)
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=self.device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images (N, 3, 224, 224) uint8 -> (N, 512) float32, on the CPU."""
        x = (images.to(self.device).float() / 255 - self.mean) / self.std
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.tower(x).float().cpu()


def _download() -> Path:
    from open_clip.pretrained import download_pretrained_from_url, get_pretrained_url

    try:
        return Path(download_pretrained_from_url(get_pretrained_url(*OPENAI)))
    except Exception as error:  # the network, a proxy, a full disk: whatever it was, the remedy is the same
        raise MediaError(
            f"CLIP's ViT-B/16 weights could not be fetched ({type(error).__name__}: {error}). Give the path of "
            "ViT-B-16.pt as --visual-weights; 'random' runs without them, for tests only"
        ) from error
