"""Stand-in encoders that workers of a cluster load; they import little, so that a worker starts soon."""

import os
import signal
from pathlib import Path

import numpy as np
import torch

FLAGS = "DEADLY_FLAGS"  # the environment variable of the folder where workers leave word of what they did


class Grey:
    """The mean level of an image."""

    size, width = 32, 512

    def __init__(self, device):
        pass

    def __call__(self, images):
        return images.float().mean((1, 2, 3))[:, None].expand(-1, 512)


class Deadly(Grey):
    """Kills the process that it runs in: at white always, at a light grey the first time."""

    def __call__(self, images):
        level, killed = images.float().mean(), Path(os.environ[FLAGS], "killed")
        if level > 240 or (level > 200 and not killed.exists()):
            if level <= 240:
                killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images)


class Loudness:
    """The root mean square of a window."""

    rate, width = 16_000, 512

    def __init__(self, device):
        pass

    def __call__(self, windows):
        return torch.from_numpy(np.sqrt((windows[:] ** 2).mean(1)))[:, None].expand(-1, 512)
