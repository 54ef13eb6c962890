"""Checkpoints: the official .pth of teacher and student, and our own folder with safetensors and config.json."""

import json
import logging
import os
import re
from collections.abc import Callable, Set, ValuesView
from inspect import signature
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ..data import XD_VIOLENCE, DataError
from ..data.atomic import atomic_write, make_folder
from ..data.tensors import read_tensors
from .text import TextWeightsError, load_tensors, read_weights, unreadable

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CALIBRATION = "calibration.json"  # beside them, by engine.calibrate
MODEL = "model"  # the folder of these three, in that of a run

# official prefix -> ours; the first match wins
NAMES = {
    "frame_position_embeddings.": "temporal.positions.",
    "temporal.": "temporal.",
    "gc1.": "temporal.aggregator.gc1.",
    "gc2.": "temporal.aggregator.gc2.",
    "gc3.": "temporal.aggregator.gc3.",
    "gc4.": "temporal.aggregator.gc4.",
    "disAdj.": "temporal.aggregator.disAdj.",
    "linear.": "temporal.aggregator.linear.",
    "temporalconvnet.": "audio.",
    "temporalgatedresidual.": "fusion.",
    "fe_net.": "uncertainty.",
    "mlp1.": "prompt.mlp1.",
    "mlp2.": "mlp2.",
    "classifier.": "classifier.",
    "text_prompt_embeddings.": "text.prompt.",
    "clipmodel.": "text.",
    "alpha": "align_loss.alpha",
}
# The official state dict lists each convolution of the audio TCN twice: as conv1 or conv2, and inside `net`.
ALIASES = {"net.0.": "conv1.", "net.4.": "conv2."}
IMAGE_TOWER = "clipmodel.visual."
HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token", "proxies", "resume_download")
# argument -> names of a layer's tensors
BLOCKS = {"layers": r"temporal\.resblocks\.(\d+)\.", "text_layers": r"text\.transformer\.resblocks\.(\d+)\."}
DEEPEST = 128  # blocks of either that an official checkpoint may name; CLIP's deepest text transformer has 32
# What a constructor raises on settings that nobody checked; RuntimeError: on impossible sizes.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# The only values that the official code supports; the heads are those of its window attention.
OFFICIAL = {"modality": "visual", "fusion": "gated", "prompt": "official", "heads": 1}

_log = logging.getLogger("avadclip_fast")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or does not match the model; the message lists every difference."""


def model_folder(path: str | Path) -> Path | None:
    """Returns the model folder: `path`, or the one in it if it is a run; else None.

    Raises CheckpointError, which names the model folder, if `path` is a file in one.
    """
    path = Path(path)
    if path.name in (CONFIG, WEIGHTS) and (path.parent / CONFIG).is_file():
        raise CheckpointError(f"{path} is a file of a model folder: give the folder, {path.parent}")
    return next((folder for folder in (path, path / MODEL) if (folder / CONFIG).is_file()), None)


def read_official(source: str | Path | dict[str, Tensor]) -> dict[str, Tensor]:
    """Reads an official state dict under our names, without CLIP's image tower.

    source: a .pth file, read with weights_only=True so that it cannot run code, or a state dict; training checkpoints
    with `model_state_dict` also work
    Raises CheckpointError if the file cannot be read or contains an unknown name.
    """
    where, held = "the state dict", cast(object, source)
    if not isinstance(source, dict):
        where = str(source)
        try:
            held = load_tensors(source)
        except FileNotFoundError as error:
            raise CheckpointError(f"no checkpoint {where}") from error
        except Exception as error:  # truncated, not a checkpoint, or refused by weights_only
            raise CheckpointError(f"{where} cannot be read as weights: {unreadable(error)}") from error
    if isinstance(held, dict):
        held = held.get("model_state_dict", held)
    if not isinstance(held, dict):
        raise CheckpointError(f"{where} holds a {type(held).__name__}, not a state dict")
    state, foreign = {}, []
    for name, tensor in held.items():
        name = str(name).removeprefix("module.")  # DataParallel
        if name.startswith(IMAGE_TOWER):
            continue
        own = _own_name(name)
        if own is None or not isinstance(tensor, Tensor):
            foreign.append(name)
        elif not isinstance(source, dict) and not _is_whole(tensor):
            raise CheckpointError(f"{where}: {name} does not hold the numbers of its shape {list(tensor.shape)}")
        else:
            state[own] = tensor
    if foreign:
        raise CheckpointError(
            f"{where} is not an official AVadCLIP checkpoint; unknown names:\n  " + "\n  ".join(foreign)
        )
    return state


def _own_name(official: str) -> str | None:
    """Our name of a tensor of an official checkpoint, or None if there is none."""
    prefix = next((p for p in NAMES if official.startswith(p)), None)
    if prefix is None:
        return None
    name = NAMES[prefix] + official[len(prefix) :]
    if prefix == "temporalconvnet.":
        for alias, conv in ALIASES.items():
            name = name.replace(alias, conv)
        # torch.nn.utils.parametrizations.weight_norm names the same two tensors original0 and original1
        name = re.sub(r"parametrizations\.weight\.original([01])", lambda m: "weight_" + "gv"[int(m[1])], name)
    return name


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is stored number by number; one repeated or left out may stand for more than memory holds."""
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.nbytes


def official_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts our state dict to the official names, including the TCN aliases.

    Raises CheckpointError if there is no official name for a tensor, as of a module that the model was given since.
    """
    foreign = [name for name in state if not name.startswith(tuple(NAMES.values()))]
    if foreign:
        raise CheckpointError("the official format has no place for:\n  " + "\n  ".join(foreign))
    official = {}
    for name, tensor in state.items():
        prefix, own = max(((p, o) for p, o in NAMES.items() if name.startswith(o)), key=lambda names: len(names[1]))
        name = prefix + name[len(own) :]
        official[name] = tensor
        if prefix == "temporalconvnet.":
            for alias, conv in ALIASES.items():
                if f".{conv}" in name:
                    official[name.replace(conv, alias)] = tensor
    return official


def load_strict(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads every tensor, or raises CheckpointError listing those missing, unknown, misshapen or not floating point."""
    own = model.state_dict()
    problems = [f"missing: {name} {list(own[name].shape)}" for name in own if name not in state]
    problems += [f"unknown: {name} {list(state[name].shape)}" for name in state if name not in own]
    problems += [
        f"shape: {name} is {list(state[name].shape)}, the model has {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems += [
        f"dtype: {name} is {state[name].dtype}, weights are floating point"
        for name in own
        if name in state and not state[name].is_floating_point()
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    model.load_state_dict(state)


def infer_sizes(state: dict[str, Tensor], where: str) -> dict[str, int]:
    """Infers length, width, layers, text width, text layers and class count from a state dict (our names).

    Raises CheckpointError, which names `where`, if the state is not a model's.
    """

    def shape(name: str, dimensions: int) -> list[int]:
        if name not in state:
            raise CheckpointError(f"{where} is not an AVadCLIP checkpoint: {name} is missing")
        found = list(state[name].shape)
        if len(found) != dimensions:
            raise CheckpointError(f"{where} is not an AVadCLIP checkpoint: {name} is {found}")
        return found

    length, width = shape("temporal.positions.weight", 2)
    _, text_width = shape("text.positional_embedding", 2)
    (classes,) = shape("align_loss.alpha", 1)
    sizes = {"length": length, "width": width, "text_width": text_width, "classes": classes}
    return sizes | {name: len({m[1] for own in state if (m := re.match(layer, own))}) for name, layer in BLOCKS.items()}


def kind_of(state: dict[str, Tensor]) -> str:
    """Returns the model class of a state dict (our names)."""
    return "AVadCLIPStudent" if any(name.startswith("uncertainty.") for name in state) else "AVadCLIP"


CARD = """---
{{ card_data }}
---

A model for audio-visual video anomaly detection ([AVadCLIP, arXiv 2504.04495](https://arxiv.org/abs/2504.04495)).
`config.json` holds its kind, its classes and its settings. Load it with `AVadCLIP.from_pretrained(...)`, or
`AVadCLIPStudent.from_pretrained(...)`, of the Python package avadclip_fast.
"""


def _as_it_is(value: Any) -> Any:
    return value


# How config.json holds arguments that JSON has no form of; the mixin would leave them out in silence.
CODERS: dict[type, tuple[Callable, Callable]] = {
    np.generic: (lambda value: value.item(), _as_it_is),
    np.ndarray: (lambda value: value.tolist(), _as_it_is),
    Set: (sorted, _as_it_is),
    ValuesView: (list, _as_it_is),
}


class Checkpointed(nn.Module, ModelHubMixin, library_name="avadclip_fast", model_card_template=CARD):
    """Adds save_pretrained, from_pretrained, push_to_hub and the official checkpoint format."""

    standardize: nn.ModuleDict
    padding: str
    length: int

    def __init_subclass__(cls, **named: Any) -> None:
        if any(p.kind is p.VAR_POSITIONAL for p in signature(cls.__init__).parameters.values()):
            remedy = "write them out, or pass them on by name, as in (self, classes, **settings)"
            raise TypeError(f"{cls.__name__}.__init__ takes *args, whose names config.json would not have: {remedy}")
        super().__init_subclass__(**{"coders": CODERS, **named})  # which the mixin does not inherit

    def remember(self, **settings: Any) -> None:
        """Adds entries to config.json besides the constructor's arguments."""
        # Text weights are saved with the model, so loading it must not download or draw them again.
        known = cast(dict[str, Any], self._hub_mixin_config or {})
        self._hub_mixin_config = {**known, "text_weights": None, **settings}

    def settings(self) -> dict[str, Any]:
        """The content of config.json: the constructor's arguments and the entries added by `remember`."""
        return dict(cast(dict[str, Any], self._hub_mixin_config))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Saves the model as a folder; arguments as for `ModelHubMixin.save_pretrained`.

        If writing fails or is killed, a model already there is unchanged. The mixin's own method removes its
        config.json first.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(folder)
        card = folder / "README.md"
        if not card.exists():
            self.generate_model_card(**(model_card_kwargs or {})).save(card)
        if not push_to_hub:
            return None
        to_hub = {**push_to_hub_kwargs, "model_card_kwargs": model_card_kwargs}
        return self.push_to_hub(folder.name if repo_id is None else repo_id, config=config, **to_hub)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        config = {**self.settings(), "model": type(self).__name__}
        # Each takes its place once both are written.
        with atomic_write(save_directory / CONFIG) as described, atomic_write(save_directory / WEIGHTS) as weights:
            weights.write(save(state, metadata={"format": "pt"}))  # one alone: several are in no fixed order
            described.write(json.dumps(config, indent=1, sort_keys=True).encode())
            for file in (described, weights):  # on the disk, which may be full, before anything is removed
                file.flush()
                os.fsync(file.fileno())
            (save_directory / CALIBRATION).unlink(missing_ok=True)  # of the model that was there

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Self:
        """Loads a model in eval mode from a folder, or from the Hub ("user/name").

        Its weights are float32, whatever precision they were saved in; cast the model with `.to(dtype)`.

        settings: as for `ModelHubMixin.from_pretrained`, and constructor arguments that override those of config.json
        Raises CheckpointError if there is no model, or its weights do not fit.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            return cls._described(name, settings)
        if Path(name).is_file():
            raise CheckpointError(f"{name} is a file, not a folder; an official .pth is loaded with from_official")
        # Without a network the Hub is asked for half a minute, so not for what can only be a folder.
        if name.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise CheckpointError(f"no folder {name}; a model on the Hub is given as user/name")
        try:
            return cls._described(name, settings)
        except OSError as error:
            raise CheckpointError(f"no folder {name}, and no model of that name from the Hub: {error}") from error

    @classmethod
    def _described(cls, name: str, settings: dict[str, Any]) -> Self:
        """The mixin's `from_pretrained`, which reads config.json. Raises CheckpointError if that is no JSON object."""
        try:
            return super().from_pretrained(name, **settings)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CheckpointError(f"{Path(name) / CONFIG} is not JSON: {error}") from error
        except AttributeError as error:
            raise CheckpointError(f"{Path(name) / CONFIG} holds no settings: {error}") from error

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", config: dict[str, Any] | None = None, **settings: Any
    ) -> Self:
        settings.pop("model", None)  # the kind, which a subclass that takes **settings is given as one of them
        names, stored = settings.get("classes"), config or {}
        hub = {name: settings.pop(name) for name in HUB if name in settings}
        given = [name for name, value in settings.items() if name not in stored or value is not stored[name]]
        described = CONFIG + (f" with the given {', '.join(given)}" if config and given else "")
        folder = Path(model_id)
        path = folder / WEIGHTS if folder.is_dir() else Path(hf_hub_download(model_id, WEIGHTS, **hub))
        try:
            state, _ = read_tensors(path)
        except (OSError, SafetensorError) as error:
            inner = folder / MODEL
            hint = f"; did you mean {inner}, the model of this run?" if (inner / WEIGHTS).is_file() else ""
            raise CheckpointError(f"{path} cannot be read: {error}{hint}") from error
        kind, kinds = kind_of(state), [base.__name__ for base in cls.__mro__]
        # A subclass may have modules of its own in place of those whose tensors tell the sizes.
        sizes = {} if kind in kinds[1:] else infer_sizes(state, str(path))
        if kind not in kinds:
            raise CheckpointError(f"{model_id} holds an {kind}; load it with {kind}.from_pretrained")
        if config is None and names is None:
            raise CheckpointError(f"{model_id} has no {CONFIG}, which tells the model's classes and settings")
        for name, size in sizes.items():  # before anything of another size takes memory
            if name != "classes" and settings.get(name, size) != size:
                raise CheckpointError(f"{path} does not fit {described}: {name} is {size}, not {settings[name]!r}")
        settings["text_weights"] = None  # they are among the weights: no file that config.json names is read for them
        try:
            renamed = names is not None and list(names) != stored.get("classes")
            if renamed and settings.get("class_tokens") == stored.get("class_tokens"):
                settings["class_tokens"] = None  # the stored ones are of other names
            model = cls(**settings)
        except (DataError, TextWeightsError):
            raise
        except MISFITS as error:
            reason = " ".join(str(error).split()) or repr(error)
            where = folder / described
            raise CheckpointError(f"{where} does not describe a model of this library: {reason}") from error
        load_strict(model, state, str(path))
        return model.to(map_location).eval()

    @classmethod
    def from_official(
        cls, source: str | Path | dict[str, Tensor], classes: list[str] | None = None, **settings: Any
    ) -> Self:
        """Loads an official checkpoint as a model in eval mode.

        source: the released .pth file, or its state dict
        classes: names in the checkpoint's order, normal first; XD-Violence's seven by default
        settings: constructor arguments; sizes are inferred, except `window` (teacher 4, student 64), and padding is
        "official" by default
        Raises CheckpointError listing every mismatch.
        """
        state = read_official(source)
        where = "the checkpoint" if isinstance(source, dict) else str(source)
        sizes = infer_sizes(state, where)
        classes = list(XD_VIOLENCE.values() if classes is None else classes)
        for name in BLOCKS:
            if sizes[name] > DEEPEST:  # their names cost nothing, the blocks gigabytes and minutes
                raise CheckpointError(f"{where} names {sizes[name]} {name}; up to {DEEPEST} are read")
        count = sizes.pop("classes")
        if count != len(classes):
            raise CheckpointError(
                f"{where} has {count} classes, {len(classes)} names are given: {', '.join(classes)}; give those it was "
                "trained with, in its order, by --classes or classes=[...]"
            )
        kind = kind_of(state)
        of = "" if kind in [base.__name__ for base in cls.__mro__] else f" of an {kind}"
        model = cls(classes, **{"padding": "official", "text_weights": None, **sizes, **settings})
        load_strict(model, state, where + of)
        return model.eval()

    def to_official(self, path: str | Path, image_tower: str | Path | None = None) -> None:
        """Writes the model as an official .pth state dict; its folder is created if needed.

        image_tower: a file with CLIP's image tower (`clipmodel.visual.*`, as in official checkpoints, or `visual.*`, as
        in CLIP's own weights). The model does not use it, but the official code loads strictly; without it, pass
        strict=False there.
        Raises CheckpointError if the official code does not support the model, or the file has no image tower;
        DataError if the folder cannot be made.
        """
        if self.standardize:
            raise CheckpointError("the model standardises its inputs, which the official format cannot represent")
        settings = self.settings()
        for name, only in OFFICIAL.items():
            if settings.get(name, only) != only:
                raise CheckpointError(
                    f"the model's {name} is {settings[name]!r}; the official code supports only {only!r}, and would "
                    "compute something else with these weights"
                )
        if self.padding != "official":
            _log.warning(
                "%s: the official code lets padding reach the snippets of videos that do not fill its %d rows; their "
                "scores will differ from those of this model, whose padding is %r",
                path, self.length, self.padding,
            )  # fmt: skip
        state = official_state({name: tensor.detach().cpu() for name, tensor in self.state_dict().items()})
        if image_tower is not None:
            if not Path(image_tower).is_file():
                raise CheckpointError(f"{image_tower}: no such file to take the image tower from")
            tower = {k: v.float() for k, v in read_weights(Path(image_tower)).items() if k.startswith("visual.")}
            if not tower:
                raise CheckpointError(f"{image_tower} holds no image tower (no name starts with 'visual.')")
            state.update({f"clipmodel.{name}": tensor for name, tensor in tower.items()})
        make_folder(Path(path).parent)
        with atomic_write(path) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # a full disk, which torch tells as its own failure
                    raise error.__context__ from None
                raise
