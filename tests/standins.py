"""Encoders that stand in for CLIP and Wav2CLIP, and a teacher and a student that were trained on what they give."""

import os

import numpy as np
import pytest
import torch
from filelock import FileLock  # torch brings it

from avadclip_fast import AVadCLIP, AVadCLIPStudent, data
from avadclip_fast.engine.recipe import ROBUST, Recipe
from avadclip_fast.engine.train import fit

WIDTH = 64  # of their features and models: those of CLIP take eight times as long to train, to save and to read
AXES = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((WIDTH, 3)))[0].T.astype(np.float32))
CODES = {"A": "normal", "B1": "fighting", "G": "explosion"}


def seen(level):
    """Dark, grey and bright as three directions, as long as CLIP's features are; (N,) in 0..255 -> (N, WIDTH)."""
    level = torch.as_tensor(level, dtype=torch.float32)
    near = torch.stack([1 - (level - at).abs() / 60 for at in (30, 120, 220)], 1).clamp_min(0)  # [N, 3]
    return 10 * near @ AXES


class Sight:
    size, width = 32, WIDTH

    def __init__(self, device):
        pass

    def __call__(self, images):
        return seen(images.float().mean((1, 2, 3)))


class Hearing:
    rate, width = 16_000, WIDTH

    def __init__(self, device):
        pass

    def __call__(self, windows):
        few = max(1, 2**22 // windows[:1].size) if len(windows) else 1  # of hours, not all at once
        parts = (windows[start : start + few] for start in range(0, len(windows), few))
        loud = torch.from_numpy(np.concatenate([np.sqrt((part**2).mean(1)) for part in parts]))
        return loud[:, None] * AXES[2]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A folder of teacher/ and student/, trained to know grey as fighting and bright as explosion."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the first process that asks trains them for all
    folder = root / "pair"
    with FileLock(root / "pair.lock"):
        if not (folder / "trained").exists():
            folder.mkdir(exist_ok=True)
            train_pair(folder)
            (folder / "trained").touch()
    return folder


def train_pair(folder):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        code = list(CODES)[i % 3] if i % 2 else "A"
        n = int(rng.integers(20, 32))
        level = rng.uniform(15, 45, n)
        if code != "A":
            start = int(rng.integers(0, n - 3))
            level[start : start + 3] = rng.uniform(-15, 15, 3) + {"B1": 120, "G": 220}[code]
        sound = torch.from_numpy(rng.uniform(0, 0.4, n).astype(np.float32))[:, None] * AXES[2]
        paths = folder / f"{i}.npy", folder / f"{i}_sound.npy"
        for path, x, scale in zip(paths, (seen(level), sound), (0.1, 0.01), strict=True):
            np.save(path, x.numpy() + rng.normal(0, scale, x.shape).astype(np.float32))
        rows.append(data.Row(*paths, code, i))
    features = data.FeatureSet.load(rows, CODES, 32, WIDTH)
    torch.manual_seed(0)
    teacher = AVadCLIP(
        list(CODES.values()), length=32, width=WIDTH, text_width=WIDTH, text_weights="random", text_layers=1
    )
    # Twenty: the tests ask for spans to a snippet, which models this narrow learn late.
    recipe = Recipe(**{**ROBUST, "epochs": 20, "milestones": (16,), "batch_size": 12, "noise": 1.0})
    fit(teacher, features, recipe, folder / "teacher", progress=False)
    student = AVadCLIPStudent.beside(teacher, window=4)
    fit(student, features, recipe, folder / "student", teacher=teacher, progress=False)


def overlap(event, start, end):
    """Intersection over union, of times."""
    first, last = event
    return (min(last, end) - max(first, start)) / (max(last, end) - min(first, start))


NAMED = ["--visual-encoder", "standins:Sight", "--audio-encoder", "standins:Hearing"]
