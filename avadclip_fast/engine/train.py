"""Training: the teacher on its own, or a student distilled from one. One loop serves both."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import Batch, FeatureSet, epoch_order
from ..data.atomic import atomic_write
from ..data.packed import Field, open_packed, write_packed
from ..models import AVadCLIP, AVadCLIPStudent, objective
from ..models.avadclip import Detector
from .calibrate import calibrate, has_both_kinds
from .recipe import Recipe, RecipeError
from .state import StateError, frozen_digest, load_state, save_state, weights_digest
from .stop import Stopped, listening

STATE, BEST, MODEL, HISTORY = "state.safetensors", "best.safetensors", "model", "history.json"
TEACHER_FEATURES = "teacher_features.safetensors"
CACHE_LIMIT = 4 << 30  # bytes of teacher features kept in memory; more go to a file

_log = logging.getLogger("avadclip_fast")


def spread(data: FeatureSet) -> Tensor:
    """The standard deviation (D,) of each dimension of sight, over the valid rows of a set."""
    rows, sums = 0, torch.zeros(())
    for batch in data.batches():
        x = batch.visual.double()
        rows, sums = rows + int(batch.lengths.sum()), sums + torch.stack([x.sum((0, 1)), x.square().sum((0, 1))])
    mean, square = sums / rows
    return (square - mean**2).clamp_min(0).sqrt().float()


def noisy(batch: Batch, scale: Tensor) -> Batch:
    """With Gaussian noise of `scale` (D,) on every row of sight; padded rows stay as they are."""
    valid = torch.arange(batch.visual.shape[1], device=batch.lengths.device) < batch.lengths[:, None]
    drawn = batch.visual + scale * torch.randn_like(batch.visual)
    return batch._replace(visual=torch.where(valid[..., None], drawn, batch.visual))


def inputs(model: AVadCLIP | AVadCLIPStudent, batch: Batch) -> tuple[Tensor, ...]:
    """The streams of a batch that a model takes."""
    return tuple(getattr(batch, stream) for stream in model.streams())


def trim(batch: Batch, *models: Detector) -> Batch:
    """Without the rows past the longest video, which change nothing unless a model's padding is "official"."""
    if any(model.padding == "official" for model in models):
        return batch
    longest = int(batch.lengths.max())
    audio = None if batch.audio is None else batch.audio[:, :longest]
    return batch._replace(visual=batch.visual[:, :longest], audio=audio)


@contextlib.contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Lets float32 products be tf32 inside the block, or forbids it. Raises RecipeError where there is no tf32."""
    if precision == "tf32" and device.type != "cuda":
        raise RecipeError(f"precision tf32 is CUDA's; on {device.type} choose fp32 or bf16")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def teacher_features(teacher: AVadCLIP, batch: Batch) -> Tensor:
    """The frozen teacher's fused features (B, T, D): they depend on the sample alone."""
    return teacher.fuse(batch.visual, batch.audio, batch.lengths)


def fit(
    model: AVadCLIP | AVadCLIPStudent,
    data: FeatureSet,
    recipe: Recipe,
    folder: str | Path,
    *,
    teacher: AVadCLIP | None = None,
    held_out: FeatureSet | None = None,
    test_ap: Callable[[torch.nn.Module], float] | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> list[dict]:
    """Trains `model` on `data` and leaves the selected weights in it and in `folder`/model.

    teacher: distils from it (the model is then a student); it is frozen and put in eval mode.
    held_out: needed by select="val"; its loss is logged after each epoch, and the selected model is calibrated by it,
    into `folder`/model/calibration.json. test_ap: needed by select="test".
    resume: goes on from `folder`/state.safetensors if there is one; the result is bit for bit that of an unbroken run
    on the same device and thread count.
    Returns one record per epoch. Raises StateError where the folder's state does not fit, or would be overwritten;
    RecipeError on settings that do not fit; Stopped after SIGTERM or SIGINT, the state having been saved.
    """
    folder, device = Path(folder), torch.device(device)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.select == "val" and held_out is None or recipe.select == "test" and test_ap is None:
        raise RecipeError(f"select={recipe.select!r} needs {'held_out' if recipe.select == 'val' else 'test_ap'}")
    model.to(device)
    groups: list[dict] = [{"params": [], "share": share} for share in (1.0, recipe.temporal_lr)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("temporal.")]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    noise = recipe.noise * spread(data).to(device) if recipe.noise else None
    run: dict = {"recipe": _plain(asdict(recipe)), "samples": len(data), "frozen": frozen_digest(model)}
    info: dict = {"epoch": 0, "step": 0, "sums": {}, "history": [], "best": None, "run": run}
    state = folder / STATE
    if state.exists():
        if not resume:
            raise StateError(f"{folder} holds a run already: go on with --resume, or choose another output folder")
        info = load_state(state, model, optimizer)
        if info["run"] != run:
            changed = [k for k in run["recipe"] if info["run"]["recipe"].get(k) != run["recipe"][k]]
            changed += [k for k in ("samples", "frozen") if info["run"][k] != run[k]]
            raise StateError(
                f"{folder} was started with other settings ({', '.join(changed)}); resume with the same ones"
            )
    steps = -(-len(data) // recipe.batch_size)
    first = info["epoch"]
    board = _board(folder, purge_step=first * steps + info["step"])
    with float32_products(recipe.precision, device), listening() as request, contextlib.closing(board):
        known = _teacher_source(teacher, data, folder, device, progress)
        for epoch in range(first, recipe.epochs):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch) * group["share"]
            _train_epoch(
                model, teacher, known, data, recipe, optimizer, noise, info, state, board, device, progress, request
            )
            record = {"epoch": epoch + 1, "lr": recipe.lr_at(epoch), **info["last"]}
            if held_out is not None:
                record["val"] = validation_loss(model, held_out, recipe.batch_size, device)
            if test_ap is not None and recipe.select == "test":
                record["test_ap"] = test_ap(model)
            for name in ("val", "test_ap"):
                if name in record:
                    board.add_scalar(f"epoch/{name}", record[name], (epoch + 1) * steps)
            score = {"last": epoch, "val": -record.get("val", 0), "test": record.get("test_ap", 0)}[recipe.select]
            if info["best"] is None or score > info["best"]["score"]:
                info["best"] = {"epoch": epoch + 1, "score": score}
                save_state(folder / BEST, model, None, info["best"])  # before the state that names it
            info |= {"epoch": epoch + 1, "step": 0, "sums": {}, "history": [*info["history"], record]}
            save_state(state, model, optimizer, info)
            _say(progress, record)
            if request.number and epoch + 1 < recipe.epochs:
                raise Stopped(request.number)
    load_state(folder / BEST, model)
    model.eval()
    model.save_pretrained(folder / MODEL)
    if held_out is not None and has_both_kinds(held_out):
        calibrate(model, held_out, recipe.batch_size, device).save(folder / MODEL)
    with atomic_write(folder / HISTORY) as file:
        history = {"run": run, "selected_epoch": info["best"]["epoch"], "epochs": info["history"]}
        file.write(json.dumps(history, indent=1).encode())
    return info["history"]


def _train_epoch(
    model, teacher, known, data, recipe, optimizer, noise, info, state, board, device, progress, request
) -> None:
    """The rest of an epoch from step info["step"]; leaves its mean losses in info["last"]."""
    model.train()
    epoch, size = info["epoch"], recipe.batch_size
    order = epoch_order(len(data), recipe.seed, epoch)
    chunks = order.split(size)
    bar = tqdm(
        total=len(data),
        initial=min(info["step"] * size, len(data)),
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        unit="sample",
        disable=not progress,
    )
    # Sums stay on the device between checkpoints: reading a loss each step would make the host wait.
    sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in info["sums"].items()}
    shown = time.monotonic()
    for step in range(info["step"], len(chunks)):
        # Dropout and noise depend on seed and step alone, so that a resumed run draws what an unbroken one would.
        torch.manual_seed(recipe.seed + 1_000_003 * (epoch * len(chunks) + step))
        index = chunks[step]
        batch = trim(data.batch(index), model, *([teacher] if teacher else [])).to(device)
        features = None if known is None else known(index, batch)
        batch = batch if noise is None else noisy(batch, noise)  # what the teacher says stays of the clean one
        weights = recipe.distill_weight, recipe.text_weight
        with torch.autocast(batch.visual.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            out = model(*inputs(model, batch), batch.lengths)
            losses = objective(model, out, batch.labels, batch.lengths, features, *weights)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        optimizer.step()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach().double() * len(index)
        bar.update(len(index))
        if progress and time.monotonic() - shown > 1:
            shown = time.monotonic()
            bar.set_postfix(loss=f"{losses['total'].item():.4f}")
        last = step + 1 == len(chunks)
        if ((step + 1) % recipe.checkpoint_every == 0 or request.number) and not last:
            info |= {"step": step + 1, "sums": {name: total.item() for name, total in sums.items()}}
            _check_finite(info["sums"], epoch, step)
            save_state(state, model, optimizer, info)
            if request.number:
                raise Stopped(request.number)
        if (step + 1) % 10 == 0 or last:
            for name, loss in losses.items():
                board.add_scalar(f"train/{name}", loss.detach(), epoch * len(chunks) + step + 1)
    bar.close()
    totals = {name: total.item() for name, total in sums.items()}
    _check_finite(totals, epoch, len(chunks) - 1)
    info["last"] = {name: total / len(data) for name, total in totals.items()}


@torch.no_grad()
def validation_loss(model, data: FeatureSet, batch_size: int, device) -> float:
    """L_mil + L_align over a held-out set in eval mode."""
    model.eval()
    text, total = model.encode_text(), 0.0
    for index in torch.arange(len(data)).split(batch_size):
        batch = trim(data.batch(index), model).to(device)
        losses = objective(
            model, model(*inputs(model, batch), batch.lengths, text_features=text), batch.labels, batch.lengths
        )
        total += (losses["mil"] + losses["align"]).item() * len(index)
    return total / len(data)


def _teacher_source(teacher, data: FeatureSet, folder: Path, device, progress: bool):
    """(index, batch) -> teacher features, computed once a sample and kept: in memory if they fit, else on disk."""
    if teacher is None:
        return None
    teacher.to(device).eval().requires_grad_(False)
    _, rows, width = data.visual.shape
    field = Field("float32", (rows, width))

    def compute(index: Tensor) -> np.ndarray:
        known = np.zeros((len(index), rows, width), np.float32)
        features = teacher_features(teacher, trim(data.batch(index), teacher).to(device))
        known[:, : features.shape[1]] = features.float().cpu().numpy()
        return known

    def shown(blocks):
        return tqdm(blocks, desc="teacher features", unit="batch", disable=not progress)

    if len(data) * field.row_bytes <= CACHE_LIMIT:
        cache = torch.zeros(len(data), rows, width)
        for index in shown(torch.arange(len(data)).split(32)):
            cache[index] = torch.from_numpy(compute(index))
    else:
        path = folder / TEACHER_FEATURES
        made_by = {"teacher": weights_digest(teacher), "data": data.fingerprint()}
        if path.exists() and open_packed(path)[1] != made_by:
            raise StateError(
                f"{path} holds the features of another teacher or other data; remove it, and they are made anew"
            )
        if not path.exists():
            _log.warning("teacher features of %d samples are kept in %s", len(data), path)
            fields = {"features": field}
            write_packed(
                path, fields, len(data), lambda start, stop: {"features": compute(torch.arange(start, stop))},
                made_by, block=32, progress=shown,
            )  # fmt: skip
        cache = open_packed(path)[0]["features"]
    return lambda index, batch: cache[index, : batch.visual.shape[1]].to(device)


def _check_finite(sums: dict[str, float], epoch: int, step: int) -> None:
    bad = [name for name, value in sums.items() if value != value or abs(value) == float("inf")]
    if bad:
        raise FloatingPointError(
            f"the loss is no longer finite ({', '.join(bad)}) at epoch {epoch + 1}, step {step + 1}; "
            "lower --lr, and look at the features with `avadclip-fast check`"
        )


def _board(folder: Path, purge_step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", purge_step=purge_step)


def _say(progress: bool, record: dict) -> None:
    if progress:
        parts = (f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "lr"))
        tqdm.write(f"epoch {record['epoch']}: " + "  ".join(parts))


def _plain(settings: dict) -> dict:
    """As JSON gives it back: tuples are lists there."""
    return json.loads(json.dumps(settings))
