"""The state of a training run in one atomically written file: weights, optimizer state, and progress."""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ..data.atomic import atomic_write, lock
from ..data.tensors import read_tensors
from ..models.avadclip import Detector

STATE = "state.safetensors"  # in the folder of a run
LOGS = "tensorboard"  # there too, from before the first step


class StateError(RuntimeError):
    """A run's files cannot be read, written, or resumed from; the message says why and what to do."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a StateError that names `path`, the file or folder being written."""
    try:
        yield
    except OSError as error:  # mostly a full disk, for which Python does not name the file
        raise StateError(
            f"{path}: cannot be written: {error.strerror}; files that were there are as they were. Make room, or "
            "choose another folder; train and distill go on from the last state with --resume"
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes a run's folder and locks it inside the block. Raises StateError if another process holds it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(held)
        except BlockingIOError as error:
            raise StateError(
                f"{folder}: another process is training there; wait for that one, end it, or choose another folder"
            ) from error
        yield
    finally:
        os.close(held)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Returns what a run changes in a model: trainable parameters, and the statistics of its inputs.

    This leaves out CLIP's frozen text weights, four fifths of the bytes.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: x.detach() for name, x in model.state_dict().items() if name not in frozen}


def frozen_digest(model: nn.Module) -> str:
    """Returns a fingerprint of the frozen weights, to check that a run resumes with the same ones."""
    return _digest((name, p) for name, p in model.named_parameters() if not p.requires_grad)[:16]


def model_digest(model: Detector) -> str:
    """Returns a fingerprint of a model: parameters, buffers, and settings, some of which are in no tensor."""
    settings = json.dumps(shape_of(model), sort_keys=True)
    return hashlib.sha256((_digest(model.state_dict().items()) + settings).encode()).hexdigest()


def shape_of(model: Detector) -> dict[str, Any]:
    """Returns the settings of a model without text weights and class tokens, which follow from the classes."""
    return {k: v for k, v in model.settings().items() if k not in ("text_weights", "class_tokens")}


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hashes exact bytes, since a sum would depend on the number of threads."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Saver:
    """Writes states in a separate thread, in the order of the calls, while training goes on.

        with Saver() as saver:
            saver.save(folder / STATE, model, optimizer, info)

    States are copied at once, on a GPU in its own memory. An earlier file is replaced atomically. If a state cannot be
    written, no later one is, as it may refer to the lost one; a later `save`, `wait`, or the end of the block raises
    the StateError.
    """

    def __init__(self) -> None:
        self.pool, self.under_way = ThreadPoolExecutor(1), deque[Future]()
        self.error: StateError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()  # what is under way is completed in any case
        if kind is None:
            self.wait()

    def save(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, info: dict) -> None:
        """Copies trained weights, AdamW's state and `info` (JSON), and begins to write them to `path`."""
        self.wait(leaving=1)  # an epoch ends with two, the best weights and the state
        tensors = {f"model.{name}": tensor for name, tensor in trained(model).items()}
        if optimizer is not None:
            names = {id(p): name for name, p in model.named_parameters()}
            for parameter, moments in optimizer.state.items():
                tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in moments.items()}
        kept = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        self.under_way.append(self.pool.submit(self._write, path, on_host(kept), {"info": json.dumps(info)}))

    def wait(self, leaving: int = 0) -> None:
        """Waits until all but the `leaving` latest states are written. Raises StateError if one could not be."""
        while len(self.under_way) > leaving:
            self.under_way.popleft().result()
        if self.error is not None:
            raise self.error

    def _write(self, path: Path, tensors: Callable[[], dict[str, Tensor]], metadata: dict[str, str]) -> None:
        if self.error is not None:
            return
        try:
            with writing(path), atomic_write(path) as file:
                file.write(save(tensors(), metadata=metadata))
        except StateError as error:
            self.error = error


def on_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Returns a function that fetches new copies from a GPU, in another thread, while later steps run there."""
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: tensors
    made, side = torch.cuda.current_stream(device).record_event(), torch.cuda.Stream(device)

    def fetched() -> dict[str, Tensor]:
        with torch.cuda.stream(side):
            side.wait_event(made)
            return {name: tensor.cpu() for name, tensor in tensors.items()}

    return fetched


def read_info(path: Path) -> dict:
    """Returns the `info` in the file of a `Saver`. Raises StateError."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        tensors, metadata = read_tensors(path)
        return tensors, json.loads(metadata["info"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StateError(f"{path} cannot be read as the state of a run: {error}") from error


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Loads the file of a `Saver` into the model and optimizer in place; returns `info`. Raises StateError."""
    tensors, info = _read(path)
    own = trained(model)
    stored = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in stored.items()}:
        raise StateError(
            f"{path} belongs to a model of other settings; give the same settings, or another output folder"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                # AdamW keeps `step` on the host unless its kernels are fused
                fused = optimizer.defaults.get("fused")
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if key != "step" or fused else value
                    for key, value in moments.items()
                }
    return info
