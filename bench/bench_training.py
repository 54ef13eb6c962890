"""Whole epochs of training by `fit`, from features that are there, teacher and student.

On a GPU with as many samples as XD-Violence has, ten crops a video; on a processor with a few. "load" is what comes
before: the features' way from host memory to where they stay. The first epoch includes what precedes it: compiling,
recording, and for a student its teacher's features. Of ten epochs, which differ in nothing else, a few are timed, and
none that would begin after SECONDS.
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
SECONDS = 20  # into a run: bench.gpu stops the bench after 90
DRAWN = 64  # samples that differ; the others repeat them, which costs a step the same


class Enough(Exception):
    """The time is up."""


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
    """Seconds of each epoch, what precedes it included. `fit` asks for a test score after each: that is the clock."""
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
    """Features in float16, as a packed file holds them."""
    lengths = torch.randint(16, ROWS + 1, (samples,))
    labels = torch.eye(len(CLASSES))[torch.randint(len(CLASSES), (samples,))]
    drawn = torch.randn(2, DRAWN, ROWS, WIDTH).half()
    visual, audio = (x.repeat(-(-samples // DRAWN), 1, 1)[:samples] for x in drawn)
    return FeatureSet(visual, audio, lengths, labels, checksum=f"{samples} made up")  # else all rows would be summed up


if __name__ == "__main__":
    harness.command("bench_training", run)
