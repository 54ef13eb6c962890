"""Trains a teacher, or a student distilled from a teacher; both use the same loop."""

import contextlib
import hashlib
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from ..data import FeatureSet
from ..data.atomic import remove_left, write_json
from ..device import current
from ..models import AVadCLIP, AVadCLIPStudent, objective
from ..models.checkpoints import CONFIG, MODEL
from ..models.encoder import Standardize
from ..profiling import trace
from . import distributed, residency
from .calibrate import calibrate, has_both_kinds
from .graph import recordable
from .loop import Board, Loop, check_finite
from .recipe import Recipe, RecipeError
from .state import STATE, Saver, StateError, frozen_digest, load_state, model_digest, read_info, shape_of, writing
from .step import adamw, feature_std, float32_products, set_lr, trim
from .stop import Stopped, listening
from .teacher_cache import kept_features

BEST, HISTORY = "best.safetensors", "history.json"
MAY_CHANGE = ("epochs", "checkpoint_every")  # of a recipe, on resuming; epochs only upwards
PROFILED = 10  # traced steps, after the warm-up steps

_log = logging.getLogger("avadclip_fast")


def fit(
    model: AVadCLIP | AVadCLIPStudent,
    data: FeatureSet,
    recipe: Recipe,
    folder: str | Path,
    *,
    teacher: AVadCLIP | None = None,
    held_out: FeatureSet | None = None,
    test_ap: Callable[[torch.nn.Module], float] | None = None,
    test_videos: str | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
    profile: str | Path | None = None,
    graph: bool | None = None,
) -> list[dict]:
    """Trains `model` on `data`, loads the selected weights into it, and saves them to `folder`/model.

    teacher: model to distil from (`model` is then a student); it is frozen and put in eval mode.
    held_out: required by select="val". Its loss is logged after each epoch, and the selected model is calibrated on it
    into `folder`/model/calibration.json. test_ap: returns a model's frame AP; required by select="test".
    test_videos: a fingerprint of what `test_ap` scores, which must be the same on resuming.
    resume: continue from `folder`/state.safetensors if it exists. The result is bitwise equal to that of an
    uninterrupted run on the same device with the same thread count, also one with more epochs than the run so far.
    profile: folder for trace.json, a trace of a few steps.
    graph: run each step as one CUDA graph, or in a distributed run as two with an all-reduce between, with identical
    results; default: on a GPU.

    In a distributed run (`distributed.joined`), every rank calls this with the same arguments and processes its part
    of every batch; only rank 0 writes, and it broadcasts its weights. All ranks must see `folder`.

    Returns one record per epoch. Raises StateError if the state in `folder` does not match, would be overwritten, or
    cannot be written; RecipeError on settings that do not fit; FloatingPointError if losses or weights are no longer
    finite; Stopped after SIGTERM or SIGINT, once the state is saved; PeerLost if another process of the run ends.
    """
    folder, device = Path(folder), torch.device(device)
    main, progress = distributed.is_main(), progress and distributed.is_main()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if main:
            for left in (folder, folder / MODEL):
                remove_left(left)
    _check_fits(model, data, recipe, teacher, held_out, test_ap)
    if graph and not recordable(device):
        where = f"this needs a GPU, and the device is {device.type}"
        raise RecipeError(f"steps cannot be recorded in a CUDA graph: {where}")
    graph = recordable(device) if graph is None else graph
    model.to(device)
    distributed.share_weights(model)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
        distributed.share_weights(teacher)
    optimizer = adamw(model, recipe, device, graph)
    noise = recipe.noise * feature_std(data).to(device) if recipe.noise else None
    run = _settings(model, teacher, data, held_out, test_videos, recipe)
    check_resumable(folder, resume)
    info, state = _begun(folder, model, optimizer, run), folder / STATE
    _check_fitted(model)
    _check_same(folder, info)
    steps = -(-len(data) // recipe.batch_size)
    first = info["epoch"]
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(contextlib.closing(Board(folder, first * steps + info["step"]))) if main else None
        stack.enter_context(float32_products(recipe.precision, device))
        stack.enter_context(current(device))
        part = -(-recipe.batch_size // distributed.world())
        lengths = data.valid().cpu()  # on the host, so that a batch's longest video is known without a sync
        source, told = residency.place(data, device, part)
        lines = [told]
        cache = None
        if teacher is not None:
            made_by = {"teacher": run["teacher"], "data": run["training videos"]}
            if recipe.precision != "fp32":
                made_by["precision"] = recipe.precision
            cache, told = kept_features(teacher, data, source, made_by, folder, device, part, progress, graph)
            lines.append(told)
        if graph:
            several = distributed.world() > 1
            lines.append(f"steps: {'two CUDA graphs, with one all-reduce between' if several else 'one CUDA graph'}")
        if progress:
            tqdm.write("\n".join(lines))
        request = stack.enter_context(listening())  # the work before this is redone, or resumes from its own file
        step_done = stack.enter_context(trace(profile, PROFILED)) if profile is not None and main else None
        saver = stack.enter_context(Saver())
        loop = Loop(
            model, teacher, cache, source, lengths, recipe, optimizer, noise, state, saver, board, device, progress,
            request, step_done,
        )  # fmt: skip
        if graph:
            loop.record()
        for epoch in range(first, recipe.epochs):
            set_lr(optimizer, recipe.lr_at(epoch))
            loop.epoch(info)
            found = {}
            if held_out is not None:
                found["val"] = validation_loss(model, held_out, recipe.batch_size, device)
            if test_ap is not None and recipe.select == "test":
                found["test_ap"] = distributed.agreed(test_ap(model))
            check_finite(found, model, epoch, steps - 1)
            if board is not None:
                for name, value in found.items():
                    board.add_scalar(f"epoch/{name}", value, (epoch + 1) * steps)
            best = _note_epoch(info, recipe, found)
            if main and best:
                saver.save(folder / BEST, model, None, info["best"])  # before the state that refers to it
            if main:
                saver.save(state, model, optimizer, info)
            _say(progress, info["history"][-1])
            if epoch + 1 < recipe.epochs and distributed.any_of(request.number is not None):
                saver.wait()
                raise Stopped(request.number or signal.SIGTERM)
    if main:
        _keep_best(folder, model, info, held_out, recipe.batch_size, device)
    distributed.share_weights(model.eval())  # also a barrier: all ranks wait until the folder is complete
    return info["history"]


def _check_fits(model, data: FeatureSet, recipe: Recipe, teacher, held_out: FeatureSet | None, test_ap) -> None:
    """Raises RecipeError on arguments of `fit` that do not go together, or are a path, rows or a dict."""
    typed: tuple[tuple[str, Any, type], ...] = (
        ("data", data, FeatureSet), ("held_out", held_out, FeatureSet), ("recipe", recipe, Recipe),
    )  # fmt: skip
    for argument, value, kind in typed:
        if not isinstance(value, kind) and not (value is None and argument == "held_out"):
            raise RecipeError(f"{argument} must be a {kind.__name__}; got {type(value).__name__}")
    for name, videos in (("data", data), ("held_out", held_out)):
        if videos is not None and not len(videos):
            raise RecipeError(f"{name} has no videos; give at least one")
    if teacher is not None and not isinstance(teacher, AVadCLIP):
        given = type(teacher).__name__
        raise RecipeError(f"teacher must be an AVadCLIP; got {given}: load one with AVadCLIP.from_pretrained(folder)")
    for one, videos in ((model, data), (teacher, data), (model, held_out)):
        if one is None or videos is None:
            continue
        if "audio" in one.streams() and videos.audio is None:
            raise RecipeError(f"{type(one).__name__} takes sound, and the set has none: load it with audio=True")
        if "visual" in one.streams() and videos.visual.shape[2] != one.width_of("visual"):
            wanted = f"{one.width_of('visual')}, {'with' if one.motion else 'without'} motion"
            raise RecipeError(f"sight has {videos.visual.shape[2]} numbers a row; the model takes {wanted}")
        if "audio" in one.streams() and videos.audio is not None and videos.audio.shape[2] != one.width:
            raise RecipeError(f"sound has {videos.audio.shape[2]} numbers a row; the model takes {one.width}")
        if (rows := videos.visual.shape[1]) > one.length:
            remedy = f"load it with length={one.length}"
            raise RecipeError(f"the set has {rows} rows a video; the {type(one).__name__} takes {one.length}: {remedy}")
        if one is model and videos.labels.shape[1] != len(model.classes):
            raise RecipeError(f"labels are of {videos.labels.shape[1]} classes; the model has {len(model.classes)}")
    if teacher is not None and not isinstance(model, AVadCLIPStudent):
        raise RecipeError(f"a teacher distils a student; the model is an {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        # and not requires_grad_(), which would train the text encoder too
        raise RecipeError("the model is frozen, as a teacher is once it was given to fit: make it or load it again")
    if recipe.select == "val" and held_out is None or recipe.select == "test" and test_ap is None:
        raise RecipeError(f"select={recipe.select!r} needs {'held_out' if recipe.select == 'val' else 'test_ap'}")


def _check_fitted(model) -> None:
    """Raises RecipeError if the model standardises a stream, and neither `fit_inputs` nor a state gave statistics."""
    if unfitted := [name for name, inputs in model.standardize.items() if cast(Standardize, inputs).plain()]:
        remedy = "call model.fit_inputs(data.batches()) first"
        raise RecipeError(f"{type(model).__name__} standardises {unfitted[0]} and has no statistics of it: {remedy}")


def check_resumable(folder: Path, resume: bool) -> None:
    """Raises StateError if `folder` holds a run that is not to be resumed, or cannot be the folder of a run."""
    if os.fsencode(folder) != str(folder).encode(errors="replace"):  # TensorBoard and safetensors know no other paths
        raise StateError(f"{folder}: a path that is not UTF-8, which a run needs; choose another output folder")
    if folder.exists() and not folder.is_dir():
        raise StateError(f"{folder} is a file; name a folder for the run")
    if (folder / CONFIG).is_file():
        raise StateError(f"{folder} holds a model, which would be taken for the run's; choose another output folder")
    if (folder / STATE).exists() and not resume:
        raise StateError(f"{folder} holds a run already: go on with --resume, or choose another output folder")


@torch.no_grad()
def validation_loss(model, data: FeatureSet, batch_size: int, device) -> float:
    """Returns the mean L_mil + L_align of a held-out set in eval mode; each rank computes its part of every batch."""
    model.eval()
    text, total = model.encode_text(), 0.0
    lengths = data.valid()
    for index in torch.arange(len(data)).split(batch_size):
        part = distributed.part(lengths[index])
        batch = trim(data.batch(index[part.where]), model).to(device)
        out = model.infer(*model.inputs(batch), lengths=batch.lengths, text_features=text)
        losses = objective(model, out, batch.labels, batch.lengths)
        total += (losses["mil"] + losses["align"]).item() * (part.samples * len(index))
    return distributed.total(torch.tensor(total, dtype=torch.float64)).item() / len(data)


def _settings(
    model, teacher, data: FeatureSet, held_out: FeatureSet | None, test_videos: str | None, recipe: Recipe
) -> dict[str, Any]:
    """The settings that must match to resume a run, keyed by the names used in the error message."""
    settings = {
        "recipe": asdict(recipe),
        "model": shape_of(model),
        "samples": len(data),
        "training videos": data.fingerprint(),
        "held-out videos": None if held_out is None else held_out.fingerprint(),
        "test videos": test_videos,
        "teacher": None if teacher is None else model_digest(teacher),
        "frozen": frozen_digest(model),
    }
    return json.loads(json.dumps(settings))  # as loaded from a state: tuples become lists


def _begun(folder: Path, model, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> dict:
    """How far the run in `folder` has got, whose state is loaded. run: its settings. Raises StateError."""
    start: dict = {"epoch": 0, "step": 0, "sums": {}, "history": [], "best": None, "run": run}
    if not (folder / STATE).exists():
        return start
    info, epochs = read_info(folder / STATE), run["recipe"]["epochs"]
    if not isinstance(info, dict) or not info.keys() >= start.keys():  # such as BEST under its name
        raise StateError(
            f"{folder / STATE} does not hold the state of a run; put that back, or choose another output folder"
        )
    _check_continues(folder, info, run)  # before weights that do not fit: it names the settings
    load_state(folder / STATE, model, optimizer)
    if info["epoch"] == epochs and load_state(folder / BEST, model) != info["best"]:
        raise StateError(  # a kill came between the two files
            f"{folder} has gone beyond {epochs} epochs: {BEST} is of a later one; resume it with more epochs"
        )
    return info | {"run": run}


def _note_epoch(info: dict, recipe: Recipe, found: dict[str, float]) -> bool:
    """Adds the epoch that has ended to how far the run has got, `info`. Returns whether it is the best so far.

    found: its "val" and "test_ap", if computed
    """
    epoch = info["epoch"]
    record = {"epoch": epoch + 1, "lr": recipe.lr_at(epoch), **info["last"], **found}
    score = {"last": epoch, "val": -found.get("val", 0), "test": found.get("test_ap", 0)}[recipe.select]
    best = info["best"] is None or score > info["best"]["score"]
    if best:
        info["best"] = {"epoch": epoch + 1, "score": score}
    info |= {"epoch": epoch + 1, "step": 0, "sums": {}, "history": [*info["history"], record]}
    return best


def _check_same(folder: Path, info: dict) -> None:
    """Raises StateError on every rank if one sees another state of the run than rank 0, as on a disk of its own."""
    text = json.dumps([info["epoch"], info["step"], info["run"]], sort_keys=True)
    own = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # which float64 holds exactly
    if distributed.any_of(own != distributed.agreed(own)):
        raise StateError(
            f"{folder}: the processes of the run see different states there, this one that of epoch {info['epoch']}, "
            f"step {info['step']}, or differ in model, data or options; the folder must be one that all of them share"
        )


def _keep_best(folder: Path, model, info: dict, held_out: FeatureSet | None, batch_size: int, device) -> None:
    """Loads the selected weights, and writes the model, its calibration and the history. Raises StateError."""
    load_state(folder / BEST, model)
    history = {"run": info["run"], "selected_epoch": info["best"]["epoch"], "epochs": info["history"]}
    fitted = None  # before the model is written: after a kill in between, it would pass for one without calibration
    if held_out is not None and has_both_kinds(held_out):
        fitted = calibrate(model, held_out, batch_size, device)
    elif held_out is not None:
        _log.warning("not calibrated: the held-out videos are all normal, or all abnormal")
    with writing(folder):
        model.save_pretrained(folder / MODEL)
        if fitted is not None:
            fitted.save(folder / MODEL)
        write_json(folder / HISTORY, history)


def _check_continues(folder: Path, info: dict, run: dict[str, Any]) -> None:
    """Raises StateError unless the run of a state, `info`, can be continued under the settings `run`, bit for bit.

    More epochs can follow: no epoch depends on their number, since milestones, seeds and selection are by epoch.
    """
    if changed := _differing(info["run"], run):
        raise StateError(f"{folder} was started with other settings ({', '.join(changed)}); resume with the same ones")
    before, now = (settings["recipe"]["epochs"] for settings in (info["run"], run))
    if now < before:
        raise StateError(
            f"{folder} is a run of {before} epochs, {info['epoch']} of them done, and cannot end after {now}; "
            f"resume it with --epochs {before} or more, or choose another output folder"
        )


def _differing(before: dict, now: dict) -> list[str]:
    """Returns the names in `now` whose values differ from those in `before`, also in nested dictionaries.

    Leaves out what a resumed run may change.
    """
    names = []
    for name, value in now.items():
        if name in MAY_CHANGE:
            continue
        if isinstance(value, dict):
            names += _differing(before.get(name, {}), value)
        elif before.get(name) != value:
            names.append(name)
    return names


def _say(progress: bool, record: dict) -> None:
    if progress:
        parts = (f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "lr"))
        tqdm.write(f"epoch {record['epoch']}: " + "  ".join(parts))
