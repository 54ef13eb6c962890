"""Whole training runs: epochs by `fit`, from features that are there to the saved model, teacher and student.

On a GPU ten epochs of as many samples as XD-Violence has, ten crops a video; on a processor an epoch of a few. "load"
is what comes before: the features' way from host memory to where they stay. A run is timed once: it is long, and its
steps are many.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from avadclip_fast import AVadCLIP, AVadCLIPStudent
from avadclip_fast.data import FeatureSet
from avadclip_fast.engine import residency
from avadclip_fast.engine.recipe import Recipe
from avadclip_fast.engine.train import fit

from . import harness
from .bench_step import CLASSES, ROWS, WIDTH

SAMPLES = {"cpu": 64, "cuda": 39_540}
EPOCHS = {"cpu": 1, "cuda": 10}
DRAWN = 64  # samples that differ; the others repeat them, which costs a step the same


def run(options: argparse.Namespace) -> list[dict]:
    device, samples, epochs = torch.device(options.device), SAMPLES[options.device], EPOCHS[options.device]
    precision = "bf16" if options.dtype == "bfloat16" else "fp32"
    recipe = Recipe(epochs=epochs, batch_size=96 if device.type == "cuda" else 16, precision=precision)
    teacher = AVadCLIP(CLASSES, text_weights="random", padding="official")
    student = AVadCLIPStudent.beside(teacher, padding="official")
    features = made_up(samples)
    begun = time.perf_counter()
    features, told = residency.place(features, device, recipe.batch_size)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = {"load": time.perf_counter() - begun}
    print(told, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, model, guide in (("teacher", teacher, None), ("student", student, teacher)):
            begun = time.perf_counter()
            fit(model, features, recipe, Path(folder) / name, teacher=guide, device=device, progress=False)
            seconds[name] = time.perf_counter() - begun
    case = f"{epochs} epoch{'s' * (epochs > 1)} of {samples:,} samples"
    return [row for name, s in seconds.items() for row in harness.compare(f"{name}, {case}", {"ours": [s, s]}, "ours")]


def made_up(samples: int) -> FeatureSet:
    """Features in float16, as a packed file holds them."""
    lengths = torch.randint(16, ROWS + 1, (samples,))
    labels = torch.eye(len(CLASSES))[torch.randint(len(CLASSES), (samples,))]
    drawn = torch.randn(2, DRAWN, ROWS, WIDTH).half()
    visual, audio = (x.repeat(-(-samples // DRAWN), 1, 1)[:samples] for x in drawn)
    return FeatureSet(visual, audio, lengths, labels)


if __name__ == "__main__":
    harness.command("bench_training", run)
