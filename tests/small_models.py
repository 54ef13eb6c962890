"""Small teachers and students with every parameter drawn, and batches for them: for tests of whole models."""

import torch
from torch import Tensor, nn

from avadclip_fast import AVadCLIP, AVadCLIPStudent

CLASSES = ["normal", "fighting", "car accident"]
TOKENS = [[49406, 5, 49407], [49406, 300, 49407], [49406, 7, 4000, 49407]]
SIZES = {"width": 32, "text_width": 64, "text_layers": 1, "length": 24, "text_weights": "random"}


def teacher(seed: int = 0, **settings) -> AVadCLIP:
    return draw(AVadCLIP(**{"classes": CLASSES, "class_tokens": TOKENS, **SIZES, "dropout": 0.0, **settings}), seed)


def student(seed: int = 0, **settings) -> AVadCLIPStudent:
    return draw(AVadCLIPStudent(**{"classes": CLASSES, "class_tokens": TOKENS, **SIZES, "window": 8, **settings}), seed)


def draw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter; biases that start at zero, and norms that start at one, would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.ndim < 2 or name.endswith("weight_g"):
                p.copy_(0.1 * x + (1 if name.rsplit(".", 1)[-1] in ("weight", "weight_g") else 0))
            elif "token_embedding" not in name:  # random already, and large
                gain = 0.3 if "gc" in name or "classifier" in name else 1.0  # keeps sigmoid and exp unsaturated
                p.copy_(gain * x / p[0].numel() ** 0.5)
    return module


def batch(
    lengths: list[int], rows: int, classes: int = 3, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """visual, audio (B, T, D), zero beyond each length; labels (B, C) multi-hot; lengths (B,)."""
    generator = torch.Generator().manual_seed(seed)
    streams = torch.randn(2, len(lengths), rows, width, generator=generator).to(dtype)
    labels = torch.zeros(len(lengths), classes, dtype=dtype)
    for b, n in enumerate(lengths):
        streams[:, b, n:] = 0
        labels[b, b % classes] = 1
        if b % 3 == 2:
            labels[b, (b + 1) % classes] = 1
    return streams[0], streams[1], labels, torch.tensor(lengths)
