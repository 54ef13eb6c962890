"""Cropping of frames for the encoder.

"crops" is the geometry of XD-Violence's features: the frame is resized to 340 x 256 and cropped to 224 x 224 at five
positions (centre, top left, top right, bottom left, bottom right), then the same five are flipped. Crop 5, the flipped
centre, is the authors' test crop. "clip" is CLIP's geometry: the shorter side is resized to 224, then centre-cropped.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

WIDTH, HEIGHT, SIDE = 340, 256, 224
COUNTS = (1, 5, 10)


def cut(image: np.ndarray, crops: int = 1, geometry: str = "crops", side: int = SIDE) -> Tensor:
    """Crops image (H, W, 3) uint8 -> (crops, 3, side, side) uint8.

    crops: 1 (the centre), 5 or 10; only 1 with geometry "clip"
    Raises ValueError on other geometries or crops.
    """
    if geometry not in ("crops", "clip") or crops not in COUNTS or (geometry == "clip" and crops != 1):
        raise ValueError(f"geometry is 'crops' with 1, 5 or 10 of them, or 'clip' with 1; got {geometry!r}, {crops}")
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # [3, H, W]; image[..., ::-1] of BGR is a view
    cubic = transform.InterpolationMode.BICUBIC
    if geometry == "clip":
        return transform.center_crop(transform.resize(x, [side], cubic, antialias=True), [side])[None]
    scale = side / SIDE  # for encoders with inputs larger than 224 x 224
    height, width = round(HEIGHT * scale), round(WIDTH * scale)
    x = transform.resize(x, [height, width], cubic, antialias=True)
    if crops == 1:
        return transform.center_crop(x, [side])[None]
    corners = transform.five_crop(x, [side])  # top left, top right, bottom left, bottom right, centre
    five = torch.stack([corners[4], *corners[:4]])
    return five if crops == 5 else torch.cat([five, five.flip(-1)])
