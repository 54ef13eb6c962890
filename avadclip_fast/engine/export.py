"""Exports a model, from features to scores, to a file that runs without this library, and verifies the file."""

import copy
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from .. import __version__
from ..data import TestVideo
from ..data.atomic import atomic_write, make_folder
from ..models.avadclip import Detector
from ..models.checkpoints import CheckpointError
from ..ops import use_backend
from .calibrate import Calibration
from .evaluate import VideoScores, stream_scores

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
OUTPUTS = ("anomaly", "probabilities")
METADATA = "metadata.json"  # the extra file of a torch.export archive
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Largest allowed difference of scores in 0..1. Float32 sums in another order over about thirty layers give 1e-6 with
# random weights (all formats, D = 512, T = 256); trained weights have larger logits and may give ten times that. A 1 %
# error in a single weight matrix gives 5e-3.
TOLERANCE = 1e-4
DRAWS = 8  # random videos to choose from, see `_draw`

Run = Callable[..., Sequence[Any]]  # features and lengths as tensors -> anomaly, probabilities as arrays


class ExportError(CheckpointError):
    """A model cannot be exported here, or the exported file does not compute the same scores."""


class Scores(nn.Module):
    """Maps features to scores, as in evaluation, with plain PyTorch operators.

        anomaly = sigmoid(anomaly_logits / temperature),   probabilities = softmax(class_logits / temperature)

    The temperatures come from the calibration, and the text features are a constant. The model is copied, not changed.

    forward: the model's streams (visual, audio, or both in this order), each (B, T, D) float32 with T <= length, and
    lengths (B,) int64 in 1..T -> anomaly (B, T) and probabilities (B, T, C), float32. For t >= lengths[b], anomaly is 0
    and the first class has probability 1: normal. Stream values there are ignored. Inputs are zero-padded to the
    model's full length, so that scores match evaluation even if padding is "official", where they depend on T.
    """

    text: Tensor
    normal: Tensor

    def __init__(self, model: Detector, calibration: Calibration | None = None):
        super().__init__()
        calibration = calibration or Calibration()
        self.length = model.length
        self.temperatures = calibration.binary.temperature, calibration.align.temperature
        with torch.no_grad():
            self.register_buffer("text", model.encode_text())
            self.register_buffer("normal", F.one_hot(torch.tensor(0), len(model.classes)).to(self.text))
        self.model = copy.deepcopy(model)
        del self.model.text  # replaced by a constant; four fifths of the weights
        self.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *streams, lengths = inputs
        rows = torch.arange(streams[0].shape[1], device=lengths.device)
        valid = torch.arange(self.length, device=lengths.device) < lengths[:, None]  # [B, length]
        # The number of rows is fixed inside, since windows over a symbolic T cannot be traced.
        padded = [F.pad(x, (0, 0, 0, self.length))[:, : self.length] for x in streams]
        out = self.model(*(torch.where(valid[..., None], x, 0) for x in padded), lengths, text_features=self.text)
        binary, align = self.temperatures
        anomaly = torch.where(valid, (out.anomaly_logits / binary).sigmoid(), 0)  # [B, length]
        probabilities = (out.class_logits / align).softmax(-1)  # [B, length, C]
        probabilities = torch.where(valid[..., None], probabilities, self.normal)
        return anomaly[:, rows], probabilities[:, rows]


def export_model(
    model: Detector,
    path: str | Path,
    format: str | None = None,
    calibration: Calibration | None = None,
    every: int | None = None,
) -> float:
    """Exports a teacher or a student, from features to scores (`Scores`), and verifies the file by running it.

    path: NAME.onnx or NAME.pt2; its folder is created if needed.
    format: "onnx"; "torch", a torch.export archive; or "aoti", an AOTInductor package compiled for CPUs like this one.
    Default: by suffix, with "torch" for .pt2.
    calibration: its temperatures are baked into the scores, and its thresholds are stored as metadata. By default
    scores are not rescaled.
    every: frames per snippet, stored as metadata. The file contains all metadata, see `metadata`.

    Batch size and T are dynamic in all formats, with T up to the model's length. With a longer T, onnx and torch raise
    an error; aoti aborts the process, or raises if AOTI_RUNTIME_CHECK_INPUTS=1 is set in the environment.
    The file is written only if its scores agree with `stream_scores` on random features. The model is moved to the
    CPU and put in eval mode.
    Returns the largest absolute difference of a score. Raises ExportError; DataError if the folder cannot be
    written to.
    """
    path = Path(path)
    if format is None:
        format = {".onnx": "onnx", ".pt2": "torch"}.get(path.suffix, "")
    if FORMATS.get(format) != path.suffix:
        raise ExportError(f"{path}: export writes NAME.onnx, or NAME.pt2 as torch or aoti")
    write, load = {
        "onnx": (_write_onnx, _load_onnx), "torch": (_write_torch, _load_torch), "aoti": (_write_aoti, _load_aoti),
    }[format]  # fmt: skip
    if every is not None and not (isinstance(every, int) and every >= 1):
        raise ExportError(f"every must be a snippet's number of frames, an integer of at least 1; got {every!r}")
    _require(format)
    make_folder(path.parent)
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file")
    calibration = calibration or Calibration()
    model.cpu().eval()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        program = trace(model, calibration)
        try:
            write(program, made, metadata(model, calibration, every))
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = str(made)  # which Python does not add where the disk is full
            raise
        difference = largest_difference(load(made), model, calibration)
        if not difference <= TOLERANCE:  # NaN too
            raise ExportError(
                f"{path} was not written: as {format}, its scores differ from the model's by up to {difference:.1e}, "
                f"where {TOLERANCE:g} is allowed"
            )
        with open(made, "rb") as source, atomic_write(path) as target:
            shutil.copyfileobj(source, target)
    return difference


def metadata(model: Detector, calibration: Calibration, every: int | None = None) -> dict[str, str]:
    """Returns the metadata of an exported file, name -> JSON value.

    model, avadclip_fast (its version), inputs, outputs, padding; classes, normal first; length (the largest T) and
    width (D); motion: whether visual is [x | m] of width 2 D, visual features and their motion as `data.with_motion`
    computes them; every: frames per snippet, or null; temperature: already applied to the scores; threshold: align's
    applies to 1 - probabilities[..., 0], binary's to anomaly.
    The file stores it in metadata_props (onnx), the extra file metadata.json (torch), or get_metadata() (aoti).
    """
    heads = {"align": calibration.align, "binary": calibration.binary}
    facts = {
        "model": type(model).__name__,
        "avadclip_fast": __version__,
        "inputs": [*model.streams(), "lengths"],
        "outputs": OUTPUTS,
        "classes": model.classes,
        "length": model.length,
        "width": model.width,
        "motion": model.motion,
        "every": every,
        "padding": model.padding,
        "temperature": {name: head.temperature for name, head in heads.items()},
        "threshold": {name: head.threshold for name, head in heads.items()},
    }
    return {name: json.dumps(value) for name, value in facts.items()}


def trace(model: Detector, calibration: Calibration | None = None) -> ExportedProgram:
    """Exports the `Scores` of a model in eval mode to a graph of ATen operators, with dynamic batch size and T.

    Raises ExportError with torch.export's reason.
    """
    scores = Scores(model, calibration).eval()
    lengths = torch.full((2,), scores.length)
    inputs = (*(torch.zeros(2, scores.length, model.width_of(stream)) for stream in model.streams()), lengths)
    try:
        with torch.no_grad(), use_backend("reference"):  # custom operators exist only with this library
            return torch.export.export(scores, inputs, dynamic_shapes=_free(model))
    except Exception as error:  # torch.export raises what it likes, also classes of private modules
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
        raise ExportError(
            f"torch.export of torch {torch.__version__} cannot trace this {type(model).__name__}: {reason[:300]}"
        ) from error


def _free(model: Detector) -> tuple:
    batch = Dim("batch", min=1)
    snippets = Dim("snippets", min=1, max=model.length) if model.length > 1 else 1
    return (tuple({0: batch, 1: snippets} for _ in model.streams()) + ({0: batch},),)


def _require(format: str) -> None:
    """Raises ExportError if a package or compiler that a format needs is missing."""
    if format == "onnx" and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'avadclip_fast[onnx]'")
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ExportError(
                "aoti needs a C++ compiler, and there is none: install g++, or name another by CXX"
            ) from error


def _write_onnx(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    free = tuple({0: "batch", 1: "snippets"} for _ in json.loads(facts["inputs"])[:-1]) + ({0: "batch"},)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name: ")  # inputs share axes on purpose
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=json.loads(facts["inputs"]),
            output_names=OUTPUTS,
            dynamic_shapes=(free,),
        )
    assert onnx is not None
    onnx.model.metadata_props.update(facts)
    onnx.save(path)


def _load_onnx(path: Path) -> Run:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read as it is imported; this is a check alone
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return lambda *inputs: session.run(OUTPUTS, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def _write_torch(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    whole = {name: json.loads(value) for name, value in facts.items()}
    held = io.BytesIO()  # a full disk ends the process where torch itself writes to it
    torch.export.save(program, held, extra_files={METADATA: json.dumps(whole)})
    path.write_bytes(held.getbuffer())


def _load_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_aoti(program: ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package, config
    from torch._inductor.exc import CppCompileError, InductorError

    settings = {"aot_inductor.metadata": facts, "cpp.dynamic_threads": True}  # do not fix the current thread count
    if hasattr(config.aot_inductor, "check_lowerbound"):
        # Otherwise AOTI_RUNTIME_CHECK_INPUTS=1 rejects a batch size or T of 1, which work correctly.
        settings["aot_inductor.check_lowerbound"] = False
    try:
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except (CppCompileError, InductorError) as error:
        cause = getattr(error, "inner_exception", error)  # a failure in the first file is wrapped
        if isinstance(cause, OSError):  # such as a full disk
            raise cause from error
        if not isinstance(cause, CppCompileError):
            raise
        lines = cause.output.strip().splitlines()
        line = next((line for line in lines if "error:" in line), lines[0] if lines else "no word of why")
        raise ExportError(f"aoti: the C++ compiler failed: {line.strip()}") from error


def _load_aoti(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


def largest_difference(run: Run, model: Detector, calibration: Calibration) -> float:
    """Returns the largest absolute difference between an exported file's scores and `stream_scores`; NaN if any is NaN.

    The inputs are random videos of one snippet, an odd number of snippets and the full length, alone and in batches of
    three, padded with NaN.
    """
    length = model.length
    odd = (length + 1) // 2 | 1
    generator = np.random.default_rng(0)
    worst = []
    for lengths, rows in [([length], length), ([odd], odd), ([1], 1), ([odd, length, 1], length), ([1, odd, 1], odd)]:
        drawn = [_draw(model, calibration, n, generator) for n in lengths]
        streams = [torch.full((len(lengths), rows, model.width_of(name)), torch.nan) for name in model.streams()]
        anomaly, probabilities = np.zeros((len(drawn), rows)), np.zeros((len(drawn), rows, len(model.classes)))
        probabilities[..., 0] = 1  # past lengths
        for b, (n, (video, scores)) in enumerate(zip(lengths, drawn, strict=True)):
            for x, name in zip(streams, model.streams(), strict=True):
                x[b, :n] = torch.from_numpy(getattr(video, name)[0, :n])
            anomaly[b, :n], probabilities[b, :n] = scores.anomaly, scores.probabilities
        with torch.no_grad():
            found = run(*streams, torch.tensor(lengths))
        for x, expected in zip(found, (anomaly, probabilities), strict=True):
            if x.shape != expected.shape:
                raise ExportError(f"the exported file gives scores of shape {list(x.shape)}, not {expected.shape}")
            worst.append(np.abs(np.asarray(x) - expected).max())
    return float(np.max(worst))


def _draw(model: Detector, calibration: Calibration, n: int, generator) -> tuple[TestVideo, VideoScores]:
    """Returns a random video of n snippets in four scenes, and its scores.

    The similarity graph drops cosines up to 0.7, so rounding decides about a cosine near 0.7. Of DRAWS videos, returns
    the one whose cosines stay farthest from it.
    """
    length = model.length
    graph: Any = getattr(getattr(model.temporal, "aggregator", None), "simAdj", None)  # None in an own encoder
    margin = np.inf

    def look(_, inputs: tuple) -> None:
        nonlocal margin
        x = F.normalize(inputs[0][0, :n].double(), dim=-1)
        margin = float((x @ x.T - graph.threshold).abs().min())

    drawn = []
    hook = None if graph is None else graph.register_forward_pre_hook(look)
    try:
        for _ in range(DRAWS):
            unlike = generator.uniform(0.2, 1, (n, 1))  # cosines on both sides of 0.7
            streams = [np.zeros((1, length, model.width_of(stream)), np.float32) for stream in ("visual", "audio")]
            for x in streams:
                scenes = generator.standard_normal((4, x.shape[2]))[np.arange(n) * 4 // n]  # [n, D]
                x[0, :n] = scenes + unlike * generator.standard_normal((n, x.shape[2]))
            video = TestVideo("", streams[0], streams[1], np.array([n]), n)
            (scores,) = stream_scores(model, [video], calibration=calibration)
            drawn.append((margin, video, scores))
    finally:
        if hook is not None:
            hook.remove()
    _, video, scores = max(drawn, key=lambda one: one[0])
    return video, scores
