"""Trains a teacher, or a student distilled from a teacher; both use the same loop."""

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from ..data import Batch, FeatureSet, epoch_order
from ..data.atomic import atomic_write, remove_left
from ..data.packed import Field, open_packed, write_packed
from ..device import current
from ..models import AVadCLIP, AVadCLIPStudent, objective
from ..models.avadclip import Detector
from ..models.encoder import moments
from ..ops._autocast import LOWERING
from ..ops._linear_act_cpu import HAS_AMX
from ..ops._padding import valid_mask, zero_padding
from ..profiling import span, trace
from . import distributed, residency
from .calibrate import calibrate, has_both_kinds
from .distributed import WHOLE, Part
from .graph import StepGraph, changed_by, refusal
from .lowering import lowered_weights
from .recipe import Recipe, RecipeError
from .state import STATE, Saver, StateError, frozen_digest, load_state, model_digest, shape_of, trained, writing
from .stop import Request, Stopped, listening

BEST, MODEL, HISTORY = "best.safetensors", "model", "history.json"
TEACHER_FEATURES = "teacher_features.safetensors"
MAY_CHANGE = ("epochs", "checkpoint_every")  # of a recipe, on resuming; epochs only upwards
CACHE_LIMIT = 4 << 30  # bytes; a larger teacher feature cache goes to a file
CACHE_BLOCK = 64  # samples per teacher forward pass
RECORDED = 8  # such passes, from which on recording one saves time
PROFILED = 10  # traced steps, after the warm-up steps

_log = logging.getLogger("avadclip_fast")


def feature_std(data: FeatureSet) -> Tensor:
    """Returns the standard deviation (D,) of each visual feature dimension over the valid rows of a set."""
    return moments(data.batches(), ["visual"])["visual"][1].float()


def add_noise(batch: Batch, scale: Tensor, drawn: Tensor | None = None) -> Batch:
    """Adds Gaussian noise of standard deviation `scale` (D,) to every valid visual row; padded rows are unchanged.

    drawn: (B, T, D) standard normal, or None to draw it here.
    """
    drawn = torch.randn(batch.visual.shape, device=batch.visual.device) if drawn is None else drawn
    valid = valid_mask(batch.lengths, batch.visual.shape[1])[..., None]
    return batch._replace(visual=torch.where(valid, batch.visual + scale * drawn, batch.visual))


def trim(batch: Batch, *models: Detector, longest: int | None = None) -> Batch:
    """Drops the rows past the longest video. They affect the result only if a model's padding is "official".

    longest: number of rows to keep; by default read from `lengths`, which on a GPU makes the host wait.
    """
    if any(model.padding == "official" for model in models):
        return batch
    longest = int(batch.lengths.max()) if longest is None else longest
    audio = None if batch.audio is None else batch.audio[:, :longest]
    return batch._replace(visual=batch.visual[:, :longest], audio=audio)


@contextlib.contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Allows or forbids tf32 for float32 matrix products and cuDNN convolutions (tf32 by default) inside the block.

    Raises RecipeError if the device has no tf32.

    On a CPU's AMX tile units, "tf32" is more precise than its name: products keep 16 significant bits, not 11.
    """
    if precision == "tf32" and device.type != "cuda" and not HAS_AMX:
        raise RecipeError("precision tf32 needs a GPU, or a processor with tile units (AMX); choose fp32 or bf16")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv.fp32_precision == "tf32"  # reading allow_tf32 raises if both APIs were used
    cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cudnn.allow_tf32 = convolutions


@torch.no_grad()
def teacher_features(teacher: AVadCLIP, batch: Batch, precision: str = "fp32") -> Tensor:
    """Returns the frozen teacher's fused features (B, T, D), each of which depends only on its own sample.

    precision: of its products, as in a `Recipe`; with "bf16" a GPU's features are bfloat16
    A masked teacher's output at padded rows also depends on the batch, so it is set to 0; a student whose padding is
    "official" reads it.
    """
    with torch.autocast(batch.visual.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = teacher.fuse(batch.visual, batch.audio, batch.lengths)
    return features if teacher.padding == "official" else zero_padding(features, batch.lengths)


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
    uninterrupted run on the same device with the same thread count, also if that has more epochs than the run so far.
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
    for one, videos in ((model, data), (teacher, data), (model, held_out)):
        if one is None or videos is None:
            continue
        if "audio" in one.streams() and videos.audio is None:
            raise RecipeError(f"{type(one).__name__} takes sound, and the set has none: load it with audio=True")
        if "visual" in one.streams() and videos.visual.shape[2] != one.width_of("visual"):
            wanted = f"{one.width_of('visual')}, {'with' if one.motion else 'without'} motion"
            raise RecipeError(f"sight has {videos.visual.shape[2]} numbers a row; the model takes {wanted}")
    if teacher is not None and not isinstance(model, AVadCLIPStudent):
        raise RecipeError(f"a teacher distils a student; the model is an {type(model).__name__}")
    if recipe.select == "val" and held_out is None or recipe.select == "test" and test_ap is None:
        raise RecipeError(f"select={recipe.select!r} needs {'held_out' if recipe.select == 'val' else 'test_ap'}")
    reason = refusal(device)
    if graph and reason is not None:
        raise RecipeError(f"steps cannot be recorded in a CUDA graph: {reason}")
    graph = reason is None if graph is None else graph
    model.to(device)
    distributed.share_weights(model)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
        distributed.share_weights(teacher)
    optimizer = adamw(model, recipe, device, graph)
    noise = recipe.noise * feature_std(data).to(device) if recipe.noise else None
    run = _settings(model, teacher, data, held_out, test_videos, recipe)
    info: dict = {"epoch": 0, "step": 0, "sums": {}, "history": [], "best": None, "run": run}
    check_resumable(folder, resume)
    state = folder / STATE
    if state.exists():
        info = load_state(state, model, optimizer)
        _check_continues(folder, info, run)
        if info["epoch"] == recipe.epochs and load_state(folder / BEST, model) != info["best"]:
            raise StateError(  # a kill came between the two files
                f"{folder} has gone beyond {recipe.epochs} epochs: {BEST} is of a later one; resume it with more epochs"
            )
        info["run"] = run
    steps = -(-len(data) // recipe.batch_size)
    first = info["epoch"]
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(contextlib.closing(_Board(folder, first * steps + info["step"]))) if main else None
        stack.enter_context(float32_products(recipe.precision, device))
        stack.enter_context(current(device))
        part = -(-recipe.batch_size // distributed.world())
        lengths = data.valid().cpu()  # on the host, so that a batch's longest video is known without a sync
        source, told = residency.place(data, device, part)
        lines = [told]
        cache = None
        if teacher is not None:
            made_by = {"teacher": run["teacher"], "data": run["training videos"]}
            made_by |= {"precision": "bf16"} if recipe.precision == "bf16" else {}
            cache, told = _teacher_features(teacher, data, source, made_by, folder, device, part, progress, graph)
            lines.append(told)
        if graph:
            several = distributed.world() > 1
            lines.append(f"steps: {'two CUDA graphs, with one all-reduce between' if several else 'one CUDA graph'}")
        if progress:
            tqdm.write("\n".join(lines))
        request = stack.enter_context(listening())  # the work before this is redone, or resumes from its own file
        step_done = stack.enter_context(trace(profile, PROFILED)) if profile is not None and main else None
        saver = stack.enter_context(Saver())
        loop = _Loop(
            model, teacher, cache, source, lengths, recipe, optimizer, noise, state, saver, board, device, progress,
            request, step_done,
        )  # fmt: skip
        if graph:
            loop.record()
        for epoch in range(first, recipe.epochs):
            set_lr(optimizer, recipe.lr_at(epoch))
            loop.epoch(info)
            record = {"epoch": epoch + 1, "lr": recipe.lr_at(epoch), **info["last"]}
            if held_out is not None:
                record["val"] = validation_loss(model, held_out, recipe.batch_size, device)
            if test_ap is not None and recipe.select == "test":
                record["test_ap"] = distributed.agreed(test_ap(model))
            _check_finite({k: v for k, v in record.items() if k in ("val", "test_ap")}, model, epoch, steps - 1)
            for name in ("val", "test_ap"):
                if name in record and board is not None:
                    board.add_scalar(f"epoch/{name}", record[name], (epoch + 1) * steps)
            score = {"last": epoch, "val": -record.get("val", 0), "test": record.get("test_ap", 0)}[recipe.select]
            if info["best"] is None or score > info["best"]["score"]:
                info["best"] = {"epoch": epoch + 1, "score": score}
                if main:
                    saver.save(folder / BEST, model, None, info["best"])  # before the state that refers to it
            info |= {"epoch": epoch + 1, "step": 0, "sums": {}, "history": [*info["history"], record]}
            if main:
                saver.save(state, model, optimizer, info)
            _say(progress, record)
            if epoch + 1 < recipe.epochs and distributed.any_of(request.number is not None):
                saver.wait()
                raise Stopped(request.number or signal.SIGTERM)
    if main:
        load_state(folder / BEST, model)
        model.eval()
        history = {"run": run, "selected_epoch": info["best"]["epoch"], "epochs": info["history"]}
        with writing(folder):
            model.save_pretrained(folder / MODEL)
            if held_out is not None and has_both_kinds(held_out):
                calibrate(model, held_out, recipe.batch_size, device).save(folder / MODEL)
            elif held_out is not None:
                _log.warning("not calibrated: the held-out videos are all normal, or all abnormal")
            with atomic_write(folder / HISTORY) as file:
                file.write(json.dumps(history, indent=1).encode())
    distributed.share_weights(model.eval())  # also a barrier: all ranks wait until the folder is complete
    return info["history"]


def check_resumable(folder: Path, resume: bool) -> None:
    """Raises StateError if `folder` holds a run that is not to be resumed, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise StateError(f"{folder} is a file; name a folder for the run")
    if (folder / STATE).exists() and not resume:
        raise StateError(f"{folder} holds a run already: go on with --resume, or choose another output folder")


def adamw(model: torch.nn.Module, recipe: Recipe, device: torch.device, graph: bool = False) -> torch.optim.Optimizer:
    """AdamW on the trainable parameters, with `recipe.temporal_lr` times the learning rate for the temporal encoder.

    graph: make it capturable in a CUDA graph.
    """
    groups: list[dict] = [{"params": [], "share": share} for share in (1.0, recipe.temporal_lr)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("temporal.")]["params"].append(parameter)
    for group in groups:  # on a GPU the rate is a tensor, so that a replayed graph reads its current value
        group["lr"] = torch.tensor(recipe.lr, device=device) if device.type == "cuda" or graph else recipe.lr
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True, capturable=graph)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group to its share of `lr`, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["share"])
        else:
            group["lr"] = lr * group["share"]


def train_step(
    model: AVadCLIP | AVadCLIPStudent,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    known: Tensor | None,
    recipe: Recipe,
    part: Part = WHOLE,
    ask: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Runs the forward pass, the losses, the backward pass and AdamW without synchronizing with the device.

    known: (B, T, D) teacher features, or None. part: this rank's part of the full batch. ask: this rank asks to stop.
    Returns the losses of the full batch, and how many ranks ask to stop (None if the world size is 1).
    """
    several = distributed.world() > 1
    losses = _backward(model, optimizer, batch, known, recipe, _weights(part, model, recipe) if several else None)
    asked = None
    if several:
        with span("all-reduce"):
            flat = distributed.flattened(model.parameters(), losses.values())
            distributed.add_up(flat, ask)
            *means, asked = distributed.spread(flat, model.parameters())
            losses = dict(zip(losses, means, strict=True))
    with span("optimizer"):
        optimizer.step()
    return losses, asked


def _weights(part: Part, model: Detector, recipe: Recipe) -> tuple[float, float, float]:
    """Returns the weights of a rank's losses in those of the full batch: of distillation, of the others, and of
    distillation relative to the others in the total.

    Distillation is a mean over rows, of which a rank's share differs from its share of the samples.
    """
    rows = part.rows if model.padding == "masked" else part.samples
    return rows, part.samples, recipe.distill_weight * (rows / part.samples if part.samples else 1.0)


def _backward(
    model: AVadCLIP | AVadCLIPStudent, optimizer: torch.optim.Optimizer, batch: Batch, known: Tensor | None,
    recipe: Recipe, weights: Sequence[float | Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Computes gradients. Returns the losses. weights: those of `_weights`, or None for a whole batch."""
    distill, share, relative = weights or (1.0, 1.0, recipe.distill_weight)
    with torch.autocast(batch.visual.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        with span("forward"):
            cast, inputs = lowered_weights(model, batch.visual.device.type), (*model.inputs(batch), batch.lengths)
            out = functional_call(model, cast, inputs) if cast else model(*inputs)
        with span("losses"):
            losses = objective(model, out, batch.labels, batch.lengths, known, relative, recipe.text_weight)
    with span("backward"):
        optimizer.zero_grad(set_to_none=True)
        (losses["total"] if weights is None else share * losses["total"]).backward()
    if weights is None:
        return losses
    return {name: (distill if name == "distill" else share) * loss.detach() for name, loss in losses.items()}


@dataclass
class _Loop:
    """State shared by the epochs of a run."""

    model: AVadCLIP | AVadCLIPStudent
    teacher: AVadCLIP | None
    cache: Tensor | None  # (M, T, D) teacher features
    data: FeatureSet
    lengths: Tensor  # (M,) valid rows, on the host
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    noise: Tensor | None  # (D,)
    state: Path
    saver: Saver
    board: "_Board | None"
    device: torch.device
    progress: bool
    request: Request
    step_done: Callable[[], None] | None  # advances the profiler
    names: tuple[str, ...] = ()  # names of the losses, in the order of a step's result
    graph: StepGraph | None = None  # of a step; in a distributed run, up to the all-reduce
    update: StepGraph | None = None  # in a distributed run, what follows it
    sample: Sequence[int] = ()  # (T, D) of a sample in a recorded step

    def __post_init__(self):
        # On a GPU every step has the same shapes: batches are trimmed to the set's longest video, not to their own.
        self.longest = int(self.lengths.max()) if self.device.type == "cuda" else None
        self.resident = self.data.visual.is_cuda and (self.cache is None or self.cache.is_cuda)

    def record(self) -> None:
        """Records CUDA graphs of a step: one for full batches, and one for an epoch's last batch if it is smaller."""
        self.model.train()
        several = distributed.world() > 1
        self.graph = StepGraph(self._recorded_part if several else self._recorded, lambda: changed_by(self.optimizer))
        count, size = len(self.lengths), self.recipe.batch_size
        for n in sorted({min(size, count), count % size or size}):
            index = torch.arange(n)
            given = next(self._inputs([index]))
            if several:
                self.sample = self._batch(given)[0].visual.shape[1:]
                given = tuple(x.to(self.device) for x in self._part_inputs(given, index))
            self.graph.record(*given)
        if several:
            self.update = StepGraph(self._recorded_update, lambda: changed_by(self.optimizer))
            self.update.record(torch.zeros_like(self.graph(*given)))

    def epoch(self, info: dict) -> None:
        """Runs an epoch from step info["step"] to its end and stores its mean losses in info["last"]."""
        self.model.train()
        recipe, epoch, size = self.recipe, info["epoch"], self.recipe.batch_size
        chunks = epoch_order(len(self.lengths), recipe.seed, epoch).split(size)
        bar = tqdm(
            total=len(self.lengths),
            initial=min(info["step"] * size, len(self.lengths)),
            desc=f"epoch {epoch + 1}/{recipe.epochs}",
            unit="sample",
            disable=not self.progress,
        )
        # Sums stay on the device between checkpoints: reading a loss every step would stall the host.
        sums = torch.tensor(list(info["sums"].values()) or 0.0, dtype=torch.float64, device=self.device)
        inputs = self._inputs(chunks[info["step"] :])
        shown, every = time.monotonic(), recipe.steps_between_checkpoints(self.device.type)
        for step in range(info["step"], len(chunks)):
            index, number = chunks[step], epoch * len(chunks) + step
            with span("data"):
                given = next(inputs)
            losses, asked = self._step(given, index, recipe.seed + 1_000_003 * number)
            sums = sums + losses.double() * len(index)
            bar.update(len(index))
            if self.progress and time.monotonic() - shown > 1:
                shown = time.monotonic()
                bar.set_postfix(loss=f"{losses[self.names.index('total')].item():.4f}")
            last, due = step + 1 == len(chunks), (step + 1) % every == 0
            if self.board is not None and ((step + 1) % 10 == 0 or last):
                self.board.note(self.names, losses.clone(), number + 1)
            if (due or self._stops(asked, due)) and not last:
                info |= {"step": step + 1, "sums": self._named(sums)}
                _check_finite(info["sums"], self.model, epoch, step)
                if self.board is not None:
                    self.board.write()
                    self.saver.save(self.state, self.model, self.optimizer, info)
                if self._stops(asked, due):
                    self.saver.wait()
                    raise Stopped(self.request.number or signal.SIGTERM)
            if self.step_done is not None:
                self.step_done()
        bar.close()
        totals = self._named(sums)
        _check_finite(totals, self.model, epoch, len(chunks) - 1)
        if self.board is not None:
            self.board.write()
        info["last"] = {name: total / len(self.lengths) for name, total in totals.items()}

    def _named(self, losses: Tensor) -> dict[str, float]:
        return dict(zip(self.names, losses.tolist(), strict=True))

    # The inputs of a step are tensors whose shapes depend only on the batch size, so that a graph can be replayed.

    def _inputs(self, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Yields the input of `_batch` for each chunk: sample indices that a graph gathers itself, or a batch."""
        if self.graph is not None and self.resident:
            parts = [index[distributed.part(self.lengths[index]).where] for index in chunks]
            order = torch.cat(parts).to(self.device)
            yield from ((index,) for index in order.split([len(index) for index in parts]))
        else:
            for batch, known in residency.fetched(chunks, self._fetch, self.device):
                yield tuple(x for x in (*batch, known) if x is not None)

    def _batch(self, given: tuple[Tensor, ...]) -> tuple[Batch, Tensor | None]:
        if len(given) == 1:
            batch, known = self._gather(*given, self.longest)
            # Where the model casts its inputs itself, a float32 copy of what is stored would be traffic alone.
            casts = self.recipe.precision == "bf16" and self.device.type in LOWERING
            return batch if casts else batch.float(), known
        rest, known = (given, None) if self.cache is None else (given[:-1], given[-1])
        visual, *audio, lengths, labels = rest
        return Batch(visual, audio[0] if audio else None, lengths, labels), known

    def _fetch(self, index: Tensor) -> tuple[Batch, Tensor | None]:
        """Returns this rank's part of a batch and its teacher features, trimmed to the longest video of all parts."""
        own = index[distributed.part(self.lengths[index]).where]
        return self._gather(own, self.longest or int(self.lengths[index].max()))

    def _gather(self, own: Tensor, longest: int | None) -> tuple[Batch, Tensor | None]:
        models = [self.model, self.teacher] if self.teacher is not None else [self.model]
        batch = trim(self.data.stored(own), *models, longest=longest)
        if self.cache is None:
            return batch, None
        with span("teacher"):
            return batch, self.cache[own.to(self.cache.device), : batch.visual.shape[1]]

    def _step(self, given: tuple[Tensor, ...], index: Tensor, seed: int) -> tuple[Tensor, Tensor | None]:
        """Runs a step. Dropout and noise depend only on `seed` and the step, so that a resumed run draws the same."""
        torch.manual_seed(seed)
        ask = self.request.number is not None
        if self.update is not None:
            return self._replayed(given, index, seed, ask)
        if self.graph is not None:
            with span("graph"):
                return self.graph(*given), None
        batch, known = self._batch(given)
        part = distributed.part(self.lengths[index])
        if self.noise is not None:  # teacher features stay clean
            batch = add_noise(batch, self.noise, self._drawn(len(index), batch.visual.shape[1:])[part.where])
        self._reseed(seed)
        losses, asked = train_step(self.model, self.optimizer, batch, known, self.recipe, part, ask)
        return self._stacked(losses), asked

    def _drawn(self, count: int, sample: Sequence[int]) -> Tensor:
        """Draws noise for a full batch, so that the part of a rank gets what it would get in a single process."""
        return torch.randn(count, *sample, device=self.device)

    def _reseed(self, seed: int) -> None:
        """Lets each rank have a dropout of its own."""
        if distributed.rank():
            torch.manual_seed(seed + 7_000_003 * distributed.rank())

    def _stacked(self, losses: dict[str, Tensor]) -> Tensor:
        self.names = tuple(losses)
        return torch.stack([loss.detach().float() for loss in losses.values()])

    def _recorded(self, *given: Tensor) -> Tensor:
        """The part of `_step` that a graph captures: all the work on the device."""
        batch, known = self._batch(given)
        if self.noise is not None:
            batch = add_noise(batch, self.noise)
        return self._stacked(train_step(self.model, self.optimizer, batch, known, self.recipe)[0])

    # In a distributed run a step is two graphs, before and after its all-reduce. Noise, of which each rank gets a part,
    # and the weights of the parts are inputs of the first.

    def _replayed(self, given: tuple[Tensor, ...], index: Tensor, seed: int, ask: bool) -> tuple[Tensor, Tensor]:
        assert self.graph is not None and self.update is not None
        given = self._part_inputs(given, index)
        self._reseed(seed)
        with span("graph"):
            flat = self.graph(*given)
        with span("all-reduce"):
            distributed.add_up(flat, ask)
        with span("optimizer"):
            losses, asked = self.update(flat).split([len(self.names), 1])
        return losses, asked

    def _part_inputs(self, given: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        part = distributed.part(self.lengths[index])
        noise = () if self.noise is None else (self._drawn(len(index), self.sample)[part.where],)
        return *given, *noise, torch.tensor(_weights(part, self.model, self.recipe))

    def _recorded_part(self, *inputs: Tensor) -> Tensor:
        *given, weights = inputs
        drawn = None if self.noise is None else given.pop()
        batch, known = self._batch(tuple(given))
        if self.noise is not None:
            batch = add_noise(batch, self.noise, drawn)
        losses = _backward(self.model, self.optimizer, batch, known, self.recipe, weights.unbind())
        self.names = tuple(losses)
        return distributed.flattened(self.model.parameters(), losses.values())

    def _recorded_update(self, flat: Tensor) -> Tensor:
        rest = distributed.spread(flat, self.model.parameters())
        self.optimizer.step()
        return rest

    def _stops(self, asked: Tensor | None, due: bool) -> bool:
        """Whether any rank asks to stop. On a GPU the flag is read only at checkpoints, which synchronize anyway."""
        if asked is None:
            return self.request.number is not None
        return (due or self.device.type == "cpu") and asked.item() > 0


class _Board:
    """TensorBoard writer whose losses are read from the device only when the host synchronizes anyway."""

    def __init__(self, folder: Path, done: int):
        """done: steps that are kept of an earlier run, the last of them with the values of its epoch."""
        from torch.utils.tensorboard import SummaryWriter

        with writing(folder):
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)
        self.noted: list[tuple[int, Sequence[str], Tensor]] = []

    def note(self, names: Sequence[str], losses: Tensor, step: int) -> None:
        self.noted.append((step, names, losses))

    def write(self) -> None:
        for step, names, losses in self.noted:
            for name, loss in zip(names, losses.tolist(), strict=True):
                self.writer.add_scalar(f"train/{name}", loss, step)
        self.noted.clear()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            self.writer.close()
        except OSError as error:  # must not hide the error that ended the run
            _log.warning("TensorBoard's losses are not all written: %s", error)


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


def _teacher_features(
    teacher: AVadCLIP, data: FeatureSet, source: FeatureSet, made_by: dict[str, str], folder: Path, device,
    batch_size: int, progress: bool, graph: bool,
) -> tuple[Tensor, str]:  # fmt: skip
    """Returns teacher features (M, T, D), on the GPU, in host memory, or in a file, and a line that says where.

    Each sample is computed once, in the precision of the run. source: the data as placed for reading. made_by:
    fingerprints stored in the file to recognize it. Ranks share the work of each block; rank 0 writes.
    """
    rows, width = data.visual.shape[1], teacher.width
    field, lengths = Field("float32", (rows, width)), data.valid().cpu()
    precision = made_by.get("precision", "fp32")
    # bfloat16 is kept as such but in the file, whose fields are NumPy's.
    dtype = torch.bfloat16 if precision == "bf16" and device.type in LOWERING else torch.float32
    size = len(data) * rows * width * dtype.itemsize
    chosen = residency.decide(size, size > CACHE_LIMIT, (rows, width), device, batch_size)
    kept = len(data) * field.row_bytes if chosen.where == "file" else size
    told = f"teacher features: {residency.told(kept, chosen)}"

    # On a GPU every block has the same shapes, recorded or not, so that the numbers are the same.
    longest, alike = int(lengths.max()), graph or device.type == "cuda"

    def features_of(index: Tensor, longest: int) -> Tensor:
        batch = trim(source.batch(index), teacher, longest=longest)
        return teacher_features(teacher, batch.to(device), precision).to(dtype)

    recorded = None
    if graph and distributed.world() == 1 and source.visual.device.type == device.type:
        recorded = StepGraph(partial(features_of, longest=longest))

    def compute(index: Tensor) -> Tensor:
        part = distributed.part(lengths[index])
        known = torch.zeros(len(index), rows, width, dtype=dtype, device=device)
        if part.samples:
            own = index[part.where]
            with span("teacher"):
                if recorded is not None and len(own) == CACHE_BLOCK and len(data) >= RECORDED * CACHE_BLOCK:
                    own = own.to(device)
                    recorded.record(own)
                    features = recorded(own)
                else:
                    features = features_of(own, longest if alike else int(lengths[index].max()))
            known[part.where, : features.shape[1]] = features
        return distributed.total(known)  # each rank fills its part; the rest is zero

    def shown(blocks):
        return tqdm(blocks, desc="teacher features", unit="batch", disable=not progress)

    everywhere = not distributed.any_of(chosen.where != "gpu")  # all ranks take the same branch
    if everywhere or size <= CACHE_LIMIT:
        cache = torch.zeros(len(data), rows, width, dtype=dtype, device=device if chosen.where == "gpu" else None)
        for index in shown(torch.arange(len(data)).split(CACHE_BLOCK)):
            cache[index[0] : index[-1] + 1] = compute(index)
        return cache, told
    path = folder / TEACHER_FEATURES
    there = distributed.agreed(path.exists())
    if there and open_packed(path)[1] != made_by:
        raise StateError(
            f"{path} holds the features of another teacher, precision or data; remove it, and they are made anew"
        )
    if not there and distributed.is_main():
        _log.warning("teacher features of %d samples are kept in %s", len(data), path)

        def block(start: int, stop: int) -> dict[str, np.ndarray]:
            distributed.agreed(stop)  # tells the others which block: writing resumes in the middle of a partial file
            return {"features": compute(torch.arange(start, stop)).float().cpu().numpy()}

        write_packed(path, {"features": field}, len(data), block, made_by, block=CACHE_BLOCK, progress=shown)
        distributed.agreed(0)
    elif not there:
        while stop := int(distributed.agreed(0)):
            compute(torch.arange((stop - 1) // CACHE_BLOCK * CACHE_BLOCK, stop))
    features = open_packed(path)[0]["features"]
    if chosen.where == "gpu":
        features = features.to(device, dtype)
    elif chosen.where == "memory":
        features = features.to(dtype, copy=True)  # what it was decided for: float32 would take twice the memory
    return features, told


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


def _check_finite(losses: dict[str, float], model: torch.nn.Module, epoch: int, step: int) -> None:
    """Raises FloatingPointError on losses or weights that are not finite.

    Called before a state is saved. The weights are checked too, since a finite loss belongs to the weights before the
    step, which may itself diverge.
    """
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if not torch.stack([p.isfinite().all() for p in trained(model).values()]).all():
        bad.append("weights")
    if bad:
        raise FloatingPointError(
            f"the loss is no longer finite ({', '.join(bad)}) at epoch {epoch + 1}, step {step + 1}; "
            "lower --lr, and look at the features with `avadclip-fast check`"
        )


def _say(progress: bool, record: dict) -> None:
    if progress:
        parts = (f"{k} {v:.4g}" for k, v in record.items() if k not in ("epoch", "lr"))
        tqdm.write(f"epoch {record['epoch']}: " + "  ".join(parts))
