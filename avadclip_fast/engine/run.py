"""A complete training run, from list files to a model folder."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from .. import data
from ..data import DataError, FeatureSet
from ..data.dataset import load_row
from ..data.lists import Row
from ..data.packed import PACKED
from ..models import AVadCLIP, AVadCLIPStudent
from ..models.checkpoints import MODEL
from . import distributed, report
from .evaluate import check_truth, evaluate, score_rows
from .recipe import Recipe
from .state import STATE, alone
from .train import check_resumable, fit

_log = logging.getLogger("avadclip_fast")


def train_on_list(
    model: AVadCLIP | AVadCLIPStudent,
    recipe: Recipe,
    list_: Path,
    output: Path,
    codes: dict[str, str],
    *,
    teacher: AVadCLIP | None = None,
    root: Path | None = None,
    held_out: float = 0.1,
    held_out_list: Path | None = None,
    test_list: Path | None = None,
    gt: Path | None = None,
    frames_per_snippet: int = 16,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume: bool = False,
    profile: str | Path | None = None,
    graph: bool | None = None,
) -> Path:
    """Trains a model, or distils a student from `teacher`, on the videos of a list. All inputs are checked first.

    list_, held_out_list: official CSV lists, or files written by `data.pack`. root: base folder of the lists' paths.
    output: folder of the run. codes: label code -> class name, normal first.
    held_out: for select="val", the share of videos to hold out; they select the epoch and calibrate the model.
    held_out_list: a separate held-out list, used instead; it calibrates the model under any `select`.
    test_list, gt, frames_per_snippet: for select="test", the test list and its frame ground truth.
    resume, profile, graph: see `fit`.
    Returns the model's folder. Raises DataError on invalid lists, features or ground truth; otherwise as `fit`.
    """
    check_resumable(output, resume)  # before any feature is read
    if resume and not (output / STATE).exists() and distributed.is_main():
        _log.warning("%s holds no run to resume: starting one", output)
    if recipe.select == "test" and (test_list is None or gt is None):
        raise DataError("--select test needs --test-list and --gt")
    if recipe.select != "test" and (test_list is not None or gt is not None):
        raise DataError("--test-list and --gt are for --select test; `eval` scores a test list")
    if root is not None and all(part is None or part.suffix == PACKED for part in (list_, held_out_list, test_list)):
        raise DataError(f"--root is for lists; {list_} is packed, and needs no other files: leave it out")
    progress = progress and distributed.is_main()
    audio = "audio" in model.streams() or teacher is not None
    motion = model.motion or (teacher is not None and teacher.motion)

    def load(path: Path) -> tuple[FeatureSet, list[Row]]:
        if path.suffix == PACKED:
            return FeatureSet.open(path, codes, model.length, model.width, audio, motion)
        rows = data.read_list(path, root, audio=audio)
        shown = report.bar("reading features", "file") if progress else None
        return FeatureSet.load(rows, codes, model.length, model.width, audio, motion, progress=shown), rows

    features, rows = load(list_)
    if (warning := data.one_kind((row.label for row in rows), codes)) and distributed.is_main():
        _log.warning("%s: %s", list_, warning)
    held = None
    if held_out_list is not None:
        held, others = load(held_out_list)
        if both := _files(rows) & _files(others):
            raise DataError(
                f"{held_out_list}: {min(both)} is in {list_} too, and not held out; remove it from one of them"
            )
    elif recipe.select == "val":
        features, held = _split(list_, features, rows, held_out, recipe.seed, codes)
    test_ap = test_videos = None
    if test_list is not None and gt is not None:
        test_ap, test_videos = _test_ap(model, test_list, root, gt, frames_per_snippet, codes, device)
    model.fit_inputs(features.batches())
    with alone(output) if distributed.is_main() else contextlib.nullcontext():
        fit(
            model, features, recipe, output,
            teacher=teacher, held_out=held, test_ap=test_ap, test_videos=test_videos, device=device, progress=progress,
            resume=resume, profile=profile, graph=graph,
        )  # fmt: skip
    return output / MODEL


def _split(
    list_: Path, features: FeatureSet, rows: list[Row], share: float, seed: int, codes: dict[str, str]
) -> tuple[FeatureSet, FeatureSet]:
    """Splits the features of rows into those to train on, and a share to hold out. Raises DataError."""
    if share == 0:
        raise DataError("--held-out 0 holds no video out; use --select last")
    kept, out = data.split(rows, share, seed, codes)
    if not kept or not out:
        raise DataError(f"{list_}: too few videos to hold out {share:g} of them; use --select last")
    at = {row: i for i, row in enumerate(rows)}
    train, held = (features.subset(torch.tensor([at[row] for row in part])) for part in (kept, out))
    return train, held


def _files(rows: list[Row]) -> set[str]:
    """The visual files of rows, and their videos, which tell crops of one from others; links are followed."""
    return {os.path.realpath(path) for path in {*map(data.video_of, rows), *(row.visual for row in rows)}}


def _test_ap(
    model, list_: Path, root: Path | None, gt: Path, frames_per_snippet: int, codes: dict[str, str], device
) -> tuple[Callable[[torch.nn.Module], float], str]:
    """Checks the ground truth against a test list, and reads the features of the list once.

    Returns a function that computes a model's frame AP on the list, and a fingerprint of features and ground truth.
    """
    audio = "audio" in model.streams()
    rows, truth = data.read_list(list_, root, audio=audio), data.read_frame_gt(gt)
    check_truth(gt, truth, list_, rows, model.width, frames_per_snippet, codes)
    if not 0 < truth.sum() < len(truth):
        raise DataError(f"{gt}: the frames are all of one kind, of which there is no AP to select by")
    digest = hashlib.sha256(truth.tobytes())
    for row in rows:
        for x in load_row(row, model.width, audio):
            digest.update(b"" if x is None else x.data)

    def ap(model) -> float:
        scores = score_rows(model, rows, device, audio=audio, progress=False)
        return evaluate(scores, truth, model.classes, frames_per_snippet)["align"]["ap"]

    return ap, digest.hexdigest()
