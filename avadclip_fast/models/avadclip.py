"""AVadCLIP: the audio-visual teacher and the single-stream student (arXiv 2504.04495)."""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree

from ..data.errors import DataError
from ..modules import (
    MLP,
    AVFusion,
    AVPrompt,
    MILAlignLoss,
    MILLoss,
    TemporalConvNet,
    UncertaintyDistillationLoss,
    UncertaintyHead,
)
from ..modules.linear_act import binary_head
from ..ops._autocast import activations, autocasts
from ..ops._check import check_counts, check_lengths, check_padded
from ..ops._linear_act_cpu import spares
from ..ops._padding import at_least_float32, zero_padding
from ..streams import FIRST, aside
from . import groups
from .checkpoints import Checkpointed
from .encoder import Standardize, TemporalEncoder, moments
from .text import TextEncoder, tokenize


class Output(NamedTuple):
    """Model outputs for a batch of B videos of T snippets and C classes, the first of which is normal.

    With padding="masked", rows t >= lengths[b] mean nothing, and differ between backends: leave them out of any loss.
    """

    features: Tensor  # (B, T, D): fused (teacher), or the mean mu (student)
    text_features: Tensor  # (C, D)
    anomaly_logits: Tensor  # (B, T), before the sigmoid
    class_logits: Tensor  # (B, T, C), before the softmax
    log_variance: Tensor | None = None  # (B, T, D), the student's θ


_pytree._register_namedtuple(Output, serialized_type_name="avadclip_fast.models.Output")  # for torch.export.save


def check_normal_first(classes: Sequence[str]) -> None:
    """Raises DataError if "normal" is one of the classes but not the first: normal videos would raise alarms."""
    if "normal" in [name.strip().lower() for name in classes[1:]]:
        raise DataError(f"normal must be the first of the classes; got {', '.join(classes)}")


class Detector(Checkpointed):
    """Base of teacher and student: temporal encoder, binary classifier, prompt and text encoder."""

    distill_loss: UncertaintyDistillationLoss  # student only

    def __init__(
        self,
        classes: Sequence[str],
        window: int,
        layers: int,
        length: int,
        width: int,
        heads: int,
        padding: str,
        prompt: str,
        standardize: Collection[str],
        motion: bool,
        text_width: int,
        text_layers: int,
        text_weights: str | None,
        class_tokens: list[list[int]] | None,
    ):
        super().__init__()
        classes = [classes] if isinstance(classes, str) else list(classes)
        named = all(isinstance(name, str) for name in classes)
        if not named or len(classes) < 2 or len(set(classes)) != len(classes):
            raise ValueError(f"classes must be at least two different names, normal first; got {classes}")
        check_normal_first(classes)
        tokens = tokenize(classes) if class_tokens is None else class_tokens
        if len(tokens) != len(classes):
            raise ValueError(f"class_tokens must be one list a class, {len(classes)}, got {len(tokens)}")
        check_counts(type(self).__name__, length=length, width=width, text_width=text_width, text_layers=text_layers)
        if not isinstance(layers, int | np.integer) or layers < 0:  # without any, the graphs are left
            raise ValueError(f"{type(self).__name__}: layers must be a whole number, 0 or more, got {layers!r}")
        self.classes, self.padding = classes, padding
        if not set(standardize) <= set(self.streams()):
            raise ValueError(f"standardize takes streams of the model, a list of {self.streams()}; got {standardize!r}")
        if motion and "visual" not in standardize:
            raise ValueError(
                f"motion and sight are standardised and added up: add 'visual' to standardize={standardize!r}"
            )
        self.motion, self.length, self.width = motion, length, width
        self.standardize = nn.ModuleDict({stream: Standardize(self.width_of(stream)) for stream in standardize})
        self.temporal = TemporalEncoder(width, length, window, layers, heads, padding)
        self.mlp2 = MLP(width)
        self.classifier = nn.Linear(width, 1)
        self.prompt = AVPrompt(width, prompt)
        self.text = TextEncoder(tokens, width, text_width, text_layers)
        self.mil_loss = MILLoss()
        self.align_loss = MILAlignLoss(len(classes))
        if text_weights is not None:
            self.text.load(text_weights)
        # A saved model then needs no tokenizer, and its names keep their order, whatever they were given as.
        self.remember(classes=list(classes), class_tokens=self.text.tokens)

    def encode_text(self) -> Tensor:
        """Class features, (C, D). For evaluation, compute them once and pass them to `forward`."""
        return self.text()

    def streams(self) -> tuple[str, ...]:
        """Names of the model's input streams, in the order of `forward`'s arguments."""
        raise NotImplementedError

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """The streams that `forward` takes, from a batch or any object with `visual` and `audio`."""
        return tuple(getattr(batch, stream) for stream in self.streams())

    def width_of(self, stream: str) -> int:
        """Last dimension of a stream passed to `forward`; doubled for visual features with motion."""
        return 2 * self.width if stream == "visual" and self.motion else self.width

    def fit_inputs(self, batches: Iterable) -> None:
        """Fits the statistics of `standardize` to a training set in one pass; reads nothing if no stream is listed.

        batches: as for `moments`, such as `FeatureSet.batches()`
        Raises ValueError if there are no batches, or they lack a stream.
        """
        if not self.standardize:
            return
        for stream, (mean, std) in moments(batches, self.standardize).items():
            cast(Standardize, self.standardize[stream]).fit(mean, std)

    def _input(self, stream: str, x: Tensor, lengths: Tensor | None) -> Tensor:
        moves = stream == "visual" and self.motion
        if stream in self.standardize:
            x = self.standardize[stream](x, lengths)
        else:  # what is not finite there would reach the gradients of weights, as 0 * NaN
            x = zero_padding(activations(x), self.valid(lengths))
        dtype, double = self.classifier.weight.dtype, x.dtype == torch.float64
        if x.dtype != dtype and (double or not autocasts(x.device.type)):  # autocast leaves float64 alone
            remedy = "cast one" if double else "cast one, or use torch.autocast"
            raise ValueError(f"{type(self).__name__}: {stream} is {x.dtype}, but the model is {dtype}; {remedy}")
        return activations(x[..., : self.width] + x[..., self.width :] if moves else x)

    def infer(
        self, *streams: Tensor | None, lengths: Tensor | None = None, text_features: Tensor | None = None
    ) -> Output:
        """Runs `forward` on `streams()`, in that order, without the outputs needed only for training."""
        return self(*streams, lengths, text_features)

    def valid(self, lengths: Tensor | None) -> Tensor | None:
        """The lengths (B,) for all parts but the temporal encoder, or None if padded rows take part ("official")."""
        return lengths if self.padding == "masked" else None

    def _text(self, text_features: Tensor | None) -> Callable[[], Tensor]:
        """Starts the text encoder; call it before the stream encoders so that both can overlap."""
        return aside("text", self.encode_text, FIRST) if text_features is None else lambda: text_features

    def _each(
        self, function: Callable[..., tuple[Tensor, ...]], streams: Sequence[Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, ...]:
        """function(*streams, lengths), which treats videos independently; groups them by length if that saves time."""
        x = self._checked(streams, lengths)
        if self.padding == "masked" and lengths is not None and groups.pays(x) and not spares(x):
            return groups.by_length(function, streams, lengths)
        return function(*streams, lengths)

    def _checked(self, streams: Sequence[Tensor | None], lengths: Tensor | None) -> Tensor:
        """Raises ValueError on streams or lengths that the model does not take, or returns the first stream."""
        given: list[Tensor] = []
        for name, stream in zip(self.streams(), streams, strict=True):
            if stream is None and given:  # the sound of a teacher
                continue
            if not isinstance(stream, Tensor):
                raise ValueError(f"{name} must be a tensor; got {type(stream).__name__}")
            check_padded(type(self).__name__, name, stream)
            width = self.width_of(name)
            if stream.ndim != 3 or stream.shape[2] != width:
                motion = ", sight and its motion as data.with_motion gives them" if width > self.width else ""
                raise ValueError(f"{name} must have shape [B, T, {width}]{motion}; got {list(stream.shape)}")
            given.append(stream)
            if stream.device != given[0].device:
                raise ValueError(f"{name} is on {stream.device}, but visual is on {given[0].device}")
            if stream.shape[:2] != given[0].shape[:2]:
                expected = f"B={len(given[0])} videos of T={given[0].shape[1]}"
                raise ValueError(f"{name} must have {expected}; got {list(stream.shape)}")
        x = given[0]
        if x.shape[1] == 0:  # sound, which takes any other T, would come first to the least clear error
            raise ValueError(f"T=0 does not lie in 1..{self.length}")
        if lengths is not None:
            check_lengths(type(self).__name__, lengths, x.shape[0], x.shape[1], x.device)
        return x

    def _heads(
        self, features: Tensor, lengths: Tensor | None, text: Tensor, log_variance: Tensor | None = None
    ) -> Output:
        expected = [len(self.classes), features.shape[-1]]
        if not isinstance(text, Tensor) or list(text.shape) != expected:
            given = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"text_features must have shape {expected}, as encode_text gives; got {given}")
        valid = self.valid(lengths)
        anomaly_logits = binary_head(features, self.mlp2, self.classifier, valid)  # [B, T]
        class_logits = self.prompt(features, text, anomaly_logits, valid)
        return Output(features, text, anomaly_logits, class_logits, log_variance)


class AVadCLIP(Detector):
    """The AVadCLIP teacher: anomaly and class logits from visual and audio snippets (arXiv 2504.04495).

        model = AVadCLIP(["normal", "fighting", "explosion"])
        out = model(visual, audio, lengths)          # visual, audio: (B, T, 512), lengths: (B,)
        losses = objective(model, out, labels, lengths)

    classes: names, normal first
    window, layers, heads: of the temporal attention; length: the largest T; width: D
    padding: "masked" (padding and batch-mates never change a video's result) or "official" (as in the official code)
    prompt: "official" or "paper", see `AVPrompt`; fusion: see `AVFusion`; dropout: in the audio encoder
    standardize: streams to normalise to mean 0 and variance 1 with the statistics of `fit_inputs`
    motion: visual is (B, T, 2 D), features and motion from `data.with_motion`; the model sees their sum
    text_weights: "openai", "random", a path, or None to leave the text encoder uninitialised
    text_width, text_layers: size of the text encoder; class_tokens: CLIP token ids, if open_clip is not installed
    visual, audio: (B, T, D), in the parameters' dtype, float32 by default; lengths: (B,) int32 or int64
    Returns an `Output` of tensors in that dtype.
    Raises ValueError on invalid settings, shapes, dtypes, devices or lengths, TextWeightsError if the text weights are
    unavailable, DataError if a class name is too long for CLIP, or "normal" is not the first.
    Precision and backends: see the ops; `use_backend` forces a backend.
    """

    def __init__(
        self,
        classes: list[str],
        window: int = 4,
        layers: int = 2,
        length: int = 256,
        width: int = 512,
        heads: int = 1,
        padding: str = "masked",
        prompt: str = "official",
        standardize: Collection[str] = (),
        motion: bool = False,
        fusion: str = "gated",
        dropout: float = 0.1,
        text_width: int = 512,
        text_layers: int = 12,
        text_weights: str | None = "openai",
        class_tokens: list[list[int]] | None = None,
    ):
        super().__init__(
            classes, window, layers, length, width, heads, padding, prompt, standardize, motion,
            text_width, text_layers, text_weights, class_tokens,
        )  # fmt: skip
        self.audio = TemporalConvNet(width, dropout=dropout)
        self.fusion = AVFusion(width, fusion)

    def streams(self) -> tuple[str, ...]:
        return "visual", "audio"

    def fuse(self, visual: Tensor, audio: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        """Fused features (B, T, D), the distillation target of a student. Arguments as for `forward`."""

        def fused(visual: Tensor, audio: Tensor | None, lengths: Tensor | None) -> tuple[Tensor]:
            valid = self.valid(lengths)
            heard = None
            if audio is not None:
                heard = aside("sound", lambda: self.audio(self._input("audio", audio, lengths), valid))
            seen = self.temporal(self._input("visual", visual, lengths), lengths)
            return (self.fusion(seen, self.audio(torch.zeros_like(seen), valid) if heard is None else heard(), valid),)

        return self._each(fused, (visual, audio), lengths)[0]

    def forward(
        self, visual: Tensor, audio: Tensor | None, lengths: Tensor | None = None, text_features: Tensor | None = None
    ) -> Output:
        """Scores a batch of videos.

        visual, audio: (B, T, D) floating point; audio may be None for silence
        lengths: (B,) int, number of valid snippets, or None if all are valid
        text_features: (C, D) from `encode_text`, or None to compute them
        """
        text = self._text(text_features)
        features = self.fuse(visual, audio, lengths)
        return self._heads(features, lengths, text())


class AVadCLIPStudent(Detector):
    """The AVadCLIP student: one stream, visual by default, distilled from the teacher (arXiv 2504.04495).

        student = AVadCLIPStudent(["normal", "fighting", "explosion"])
        out = student(visual, lengths)               # out.log_variance: its uncertainty, (B, T, 512)
        losses = objective(student, out, labels, lengths, teacher_features=teacher_out.features)

    modality: the input stream, "visual" or "audio" (the paper's Table VIII).
    Other arguments, dtypes, results and errors as for `AVadCLIP`.
    """

    def __init__(
        self,
        classes: list[str],
        window: int = 64,
        layers: int = 1,
        length: int = 256,
        width: int = 512,
        heads: int = 1,
        padding: str = "masked",
        prompt: str = "official",
        standardize: Collection[str] = (),
        motion: bool = False,
        modality: str = "visual",
        text_width: int = 512,
        text_layers: int = 12,
        text_weights: str | None = "openai",
        class_tokens: list[list[int]] | None = None,
    ):
        if modality not in ("visual", "audio"):
            raise ValueError(f"modality must be 'visual' or 'audio', got {modality!r}")
        self.modality = modality
        super().__init__(
            classes, window, layers, length, width, heads, padding, prompt, standardize, motion,
            text_width, text_layers, text_weights, class_tokens,
        )  # fmt: skip
        self.uncertainty = UncertaintyHead(width)
        self.distill_loss = UncertaintyDistillationLoss()

    def streams(self) -> tuple[str, ...]:
        return (self.modality,)

    @classmethod
    def beside(cls, teacher: AVadCLIP, **settings: Any) -> "AVadCLIPStudent":
        """A new student with a teacher's classes, sizes and frozen text weights; settings as for the class.

        A visual student of a teacher with motion also uses motion, since both train on the same features. Train
        on samples no longer than the shorter `length` of the two.
        Raises ValueError if classes, width, motion or the text side differ from the teacher's.
        """
        text = teacher.text
        shared: dict[str, Any] = {
            "classes": teacher.classes,
            "width": teacher.width,
            "text_width": text.positional_embedding.shape[1],
            "text_layers": len(text.transformer.resblocks),
            "text_weights": None,
            "class_tokens": text.tokens,
        }
        if settings.get("modality", "visual") == "visual":
            shared["motion"] = teacher.motion
            if teacher.motion:
                settings["standardize"] = sorted({*settings.get("standardize", ()), "visual"})
        if "classes" in settings:  # of any kind, as for the class
            settings["classes"] = list(settings["classes"])
        for name, own in shared.items():
            if (given := settings.get(name, own)) != own:
                raise ValueError(f"{name}={given!r}: a student has its teacher's {name}; leave it out")
        student = cls(**{"length": teacher.length, **settings, **shared})
        frozen = {name: p for name, p in text.state_dict().items() if not name.startswith("prompt.")}
        student.text.load_state_dict(frozen, strict=False)
        return student

    def forward(
        self,
        stream: Tensor,
        lengths: Tensor | None = None,
        text_features: Tensor | None = None,
        uncertain: bool = True,
    ) -> Output:
        """Scores a batch of videos.

        stream: (B, T, D) floating point, of the student's modality
        lengths: (B,) int, number of valid snippets, or None if all are valid
        text_features: (C, D) from `encode_text`, or None to compute them
        uncertain: False skips log_variance, which only distillation needs
        """

        def described(stream: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
            features = self.temporal(self._input(self.modality, stream, lengths), lengths)
            mean, log_variance = self.uncertainty(features, self.valid(lengths), uncertain)
            return (mean,) if log_variance is None else (mean, log_variance)

        text = self._text(text_features)
        mean, *log_variance = self._each(described, (stream,), lengths)
        return self._heads(mean, lengths, text(), *log_variance)

    def infer(
        self, *streams: Tensor | None, lengths: Tensor | None = None, text_features: Tensor | None = None
    ) -> Output:
        return self(*streams, lengths, text_features, uncertain=False)


def text_loss(text_features: Tensor) -> Tensor:
    """Pushes the anomalous classes away from normal: mean over c >= 1 of |cos(X_0, X_c)|, float32 (float64) scalar."""
    x = F.normalize(at_least_float32(text_features), dim=-1)
    return (x[1:] * x[0]).sum(1).abs().mean()  # not a matrix product, which autocast would run in low precision


def objective(
    model: Detector,
    out: Output,
    labels: Tensor,
    lengths: Tensor | None = None,
    teacher_features: Tensor | None = None,
    distill_weight: float | Tensor = 1e-8,
    text_weight: float = 1e-4,
) -> dict[str, Tensor]:
    """The training loss of arXiv 2504.04495, with the weights of the official code.

        total = L_mil + L_align + text_weight · L_text  [+ distill_weight · L_ukd]

    model: the teacher or student; for `out` of a wrapper, the model in it (`ddp.module`)
    labels: (B, C) multi-hot, class 0 is normal, and every video has a class
    lengths: (B,) int, or None if all snippets are valid
    teacher_features: (B, T, D) from the frozen teacher, to distil a student, or None
    Returns float32 scalars (float64 for float64 outputs): total, mil, align, text, and distill if teacher features
    are given.
    Raises ValueError on invalid shapes, dtypes, devices or lengths, teacher features for an output without
    log_variance, or a wrapped model.
    """
    if not hasattr(model, "mil_loss"):
        raise ValueError(f"model must be the teacher or student itself, such as ddp.module; got {type(model).__name__}")
    if lengths is None:
        videos, rows = out.anomaly_logits.shape
        lengths = out.anomaly_logits.new_full((videos,), rows, dtype=torch.int64)
    # A block a video or less, and thus three that a GPU can run beside each other; the last is forty tiny kernels.
    mil = aside("mil", partial(model.mil_loss, out.anomaly_logits, labels, lengths), FIRST)
    text = aside("text loss", partial(text_loss, out.text_features), FIRST)
    align = model.align_loss(out.class_logits, labels, lengths)
    losses = {"mil": mil(), "align": align, "text": text()}
    losses["total"] = losses["mil"] + losses["align"] + text_weight * losses["text"]
    if teacher_features is not None:
        if out.log_variance is None:
            raise ValueError(
                "teacher_features distil a student by its uncertainty, and `out` has none: it is a teacher's, or was "
                "made by infer or with uncertain=False"
            )
        valid = model.valid(lengths)
        losses["distill"] = model.distill_loss(teacher_features, out.features, out.log_variance, valid)
        losses["total"] = losses["total"] + distill_weight * losses["distill"]
    return losses
