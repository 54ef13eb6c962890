"""uniform_pool on one long video, against the loop over rows and against numpy's reduceat."""

import numpy as np
import torch

from avadclip_fast import ops
from avadclip_fast.data.features import pool

from . import harness

ROWS, DIM = 256, 512


def loop(features: np.ndarray) -> np.ndarray:
    """A row at a time, as official code does."""
    out = np.zeros((ROWS, features.shape[1]), np.float32)
    bounds = np.linspace(0, len(features), ROWS + 1, dtype=int)
    for i in range(ROWS):
        empty = bounds[i] == bounds[i + 1]
        out[i] = features[bounds[i]] if empty else features[bounds[i] : bounds[i + 1]].mean(0)
    return out


def run(rounds: int) -> list[dict]:
    rows = []
    for count in (300, 1000, 4000):
        array = np.random.default_rng(0).standard_normal((count, DIM), dtype=np.float32)
        features, lengths = torch.from_numpy(array), torch.tensor([count])
        calls = {
            "loop": lambda x=array: loop(x),
            "numpy": lambda x=array: pool(x, ROWS),
            "cpp": lambda x=features, n=lengths: ops.uniform_pool(x, n, ROWS, backend="cpp"),
        }
        moved = 4 * DIM * (count + ROWS)
        rows += harness.compare(f"{count} -> {ROWS}", harness.measure(calls, rounds), "cpp", bytes=moved)
    return rows


if __name__ == "__main__":
    harness.main("bench_uniform_pool", run)
