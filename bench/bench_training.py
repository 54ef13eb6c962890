"""Whole epochs of `fit` from features in memory, for the teacher and for a student.

A GPU runs with as many samples as XD-Violence has with ten crops per video, a CPU with a few. "load" is the preceding
transfer of the features from host memory to their final place. The first epoch includes the preceding work:
compilation, graph capture and, for a student, the teacher features. Of the ten epochs of a real run, which are all
alike, only the first few are timed, and none that would start after SECONDS.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
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
EPOCHS = 3
SECONDS = 20  # time limit of a run; bench.gpu stops the bench after 120
DRAWN = 64  # distinct samples; the others repeat them, at the same cost per step


class Enough(Exception):
    """The time limit is reached."""


def run(options: argparse.Namespace) -> Iterator[list[dict]]:
    device, samples = torch.device(options.device), SAMPLES[options.device]
    precision = "bf16" if options.dtype == "bfloat16" else "fp32"
    batch_size = 96 if device.type == "cuda" else 16
    recipe = Recipe(epochs=EPOCHS, batch_size=batch_size, precision=precision, select="test")
    teacher = AVadCLIP(CLASSES, text_weights="random", padding="official")
    student = AVadCLIPStudent.beside(teacher, padding="official")
    features = made_up(samples)
    begun = time.perf_counter()
    features, told = residency.place(features, device, recipe.batch_size)
    if device.type == "cuda":
        torch.cuda.synchronize()
    yield row(f"load, {samples:,} samples", [time.perf_counter() - begun])
    print(told, flush=True)
    for name, model, guide in (("teacher", teacher, None), ("student", student, teacher)):
        first, *others = epochs(model, features, recipe, guide, device)
        yield row(f"{name}, first epoch of {samples:,} samples", [first])
        if others:
            yield row(f"{name}, a later epoch of {samples:,} samples", others)


def epochs(model, features: FeatureSet, recipe: Recipe, guide: AVadCLIP | None, device: torch.device) -> list[float]:
    """Returns the seconds of each epoch, including preceding work, from the calls of `test_ap` after each epoch."""
    ends = [time.perf_counter()]

    def score(_: torch.nn.Module) -> float:
        ends.append(time.perf_counter())
        if ends[-1] - ends[0] > SECONDS:
            raise Enough
        return 0.0

    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(model, features, recipe, Path(folder), teacher=guide, test_ap=score, device=device, progress=False)
        except Enough:
            print(f"{len(ends) - 1} of {recipe.epochs} epochs were timed: {SECONDS} s are up", flush=True)
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def row(case: str, seconds: list[float]) -> list[dict]:
    return harness.compare(case, {"ours": seconds}, "ours")


def made_up(samples: int) -> FeatureSet:
    """Returns random float16 features, as in a packed file."""
    lengths = torch.randint(16, ROWS + 1, (samples,))
    labels = torch.eye(len(CLASSES))[torch.randint(len(CLASSES), (samples,))]
    drawn = torch.randn(2, DRAWN, ROWS, WIDTH).half()
    visual, audio = (x.repeat(-(-samples // DRAWN), 1, 1)[:samples] for x in drawn)
    return FeatureSet(visual, audio, lengths, labels, checksum=f"{samples} made up")  # avoids hashing all rows


if __name__ == "__main__":
    harness.command("bench_training", run, dtypes=("float32", "bfloat16"))
