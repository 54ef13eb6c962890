"""The epochs of a run: each step's inputs, its CUDA graphs, and the files written on the way."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import Batch, FeatureSet, epoch_order
from ..models import AVadCLIP, AVadCLIPStudent
from ..ops._autocast import LOWERING
from ..profiling import span
from . import distributed, progress, residency
from .graph import StepGraph, changed_by
from .recipe import Recipe
from .state import LOGS, Saver, trained, writing
from .step import add_noise, gradients, shares, train_step, trim
from .stop import Request, Stopped

_log = logging.getLogger("avadclip_fast")


@dataclass
class Loop:
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
    board: "Board | None"
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
        bar = progress.bar(
            total=len(self.lengths),
            initial=min(info["step"] * size, len(self.lengths)),
            desc=f"epoch {epoch + 1}/{recipe.epochs}",
            unit="sample",
            shown=self.progress,
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
            if progress.due(bar, shown):
                shown = time.monotonic()
                bar.set_postfix(loss=f"{losses[self.names.index('total')].item():.4f}", refresh=False)
            bar.update(len(index))
            last, due = step + 1 == len(chunks), (step + 1) % every == 0
            if self.board is not None and ((step + 1) % 10 == 0 or last):
                self.board.note(self.names, losses.clone(), number + 1)
            if (due or self._stops(asked, due)) and not last:
                info |= {"step": step + 1, "sums": self._named(sums)}
                check_finite(info["sums"], self.model, epoch, step)
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
        check_finite(totals, self.model, epoch, len(chunks) - 1)
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
        return *given, *noise, torch.tensor(shares(part, self.model, self.recipe))

    def _recorded_part(self, *inputs: Tensor) -> Tensor:
        *given, weights = inputs
        drawn = None if self.noise is None else given.pop()
        batch, known = self._batch(tuple(given))
        if self.noise is not None:
            batch = add_noise(batch, self.noise, drawn)
        losses = gradients(self.model, self.optimizer, batch, known, self.recipe, weights.unbind())
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


class Board:
    """TensorBoard writer whose losses are read from the device only when the host synchronizes anyway."""

    def __init__(self, folder: Path, done: int):
        """done: steps kept from an earlier run, the last of them with the values of its epoch."""
        from torch.utils.tensorboard import SummaryWriter

        self.logs = logs = folder / LOGS
        with writing(folder):
            earlier = set(logs.glob("*"))
            self.writer = SummaryWriter(logs, purge_step=done + 1)
            # Files are read in the order of their names: the second, then the process's count, whose 10 sorts before 9.
            if max(logs.iterdir()) in earlier:
                self.writer.close()
                time.sleep(1)
                self.writer = SummaryWriter(logs, purge_step=done + 1)
        self.noted: list[tuple[int, Sequence[str], Tensor]] = []

    def note(self, names: Sequence[str], losses: Tensor, step: int) -> None:
        self.noted.append((step, names, losses))

    def write(self) -> None:
        for step, names, losses in self.noted:
            for name, loss in zip(names, losses.tolist(), strict=True):
                self.add_scalar(f"train/{name}", loss, step)
        self.noted.clear()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with writing(self.logs):
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            self.writer.close()
        except OSError as error:  # must not hide the error that ended the run
            _log.warning("TensorBoard's losses are not all written: %s", error)


def check_finite(losses: dict[str, float], model: torch.nn.Module, epoch: int, step: int) -> None:
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
