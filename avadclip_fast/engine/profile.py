"""Profiling cases: whole training and inference steps, and each op forward and backward, at the paper's sizes."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, profiling
from ..data import XD_VIOLENCE, Batch, DataError
from ..data.atomic import make_folder
from ..models import AVadCLIP, AVadCLIPStudent
from ..models.text import PREFIX
from ..ops import _dispatch
from .recipe import Recipe
from .step import float32_products, train_step
from .teacher_cache import teacher_features

T, D = 256, 512
CLASSES = list(XD_VIOLENCE.values())
BATCH = {"cuda": 96, "cpu": 4}  # the paper's batch size; a step takes about 0.1 s on a CPU
NAME = 13  # rows of a class after the prefix: the longest of the names, and the learnable rows
ROWS = 15  # rows of the operator table
Step = Callable[[], object]


class Setting(NamedTuple):
    """Device, precision and batch size of a case."""

    device: torch.device
    precision: str  # fp32, tf32 or bf16
    batch: int


def names() -> list[str]:
    """Returns the names of all cases."""
    return [*STEPS, *_dispatch.TABLE]


def make(case: str, setting: Setting) -> Step:
    """Returns a function that runs one iteration of a case on fixed inputs. Raises DataError on an unknown case."""
    torch.manual_seed(0)
    if case not in names():
        raise DataError(f"no case {case!r}; there are {', '.join(names())}")
    return STEPS[case](setting) if case in STEPS else _op(case, setting)


def run(
    case: str,
    device: torch.device,
    precision: str = "fp32",
    batch: int | None = None,
    warmup: int = 3,
    iterations: int = 10,
    trace: Path | None = None,
) -> str:
    """Runs a case with profiler ranges enabled and returns a text report.

    On a GPU the iterations after the warm-up run between cudaProfilerStart and cudaProfilerStop.
    trace: write a Chrome trace of the iterations to this file instead, on any device, and report the slowest operators.
    Raises DataError on an unknown case or a path that cannot be written to, RecipeError on a precision that the
    device does not support, and OSError.
    """
    setting = Setting(device, precision, batch or BATCH[device.type])
    with float32_products(precision, device):
        step = make(case, setting)
        if trace is not None:  # before the iterations, which may take minutes
            if trace.is_dir():
                raise DataError(f"--trace {trace} is a folder; give the name of a file")
            make_folder(trace.parent)
        for _ in range(warmup):
            step()
        with profiling.profiling():
            if trace is None:
                seconds, table = _captured(step, iterations, device), ""
            else:
                seconds, table = _traced(step, iterations, device, trace)
    head = f"{case}, batch {setting.batch}, {precision} on {device}: {1e3 * seconds:.3f} ms an iteration"
    return f"{head}\n{table}" if table else head


def _repeated(step: Step, iterations: int, device: torch.device) -> float:
    """Returns the mean time of an iteration in seconds."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(iterations):
        with profiling.span("iteration"):
            step()
    _wait(device)
    return (time.perf_counter() - start) / iterations


def _captured(step: Step, iterations: int, device: torch.device) -> float:
    if device.type != "cuda":
        return _repeated(step, iterations, device)
    _wait(device)  # excludes the warm-up from the capture
    with torch.cuda.profiler.profile():
        return _repeated(step, iterations, device)


def _traced(step: Step, iterations: int, device: torch.device, path: Path) -> tuple[float, str]:
    with torch.profiler.profile(activities=profiling.activities(), acc_events=True) as profile:
        seconds = _repeated(step, iterations, device)
    profiling.export(profile, path)
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return seconds, profile.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Whole steps


def _train(setting: Setting, kind: str) -> Step:
    """A training step of `train` or `distill`; for distillation the teacher features are precomputed."""
    device = setting.device
    teacher = AVadCLIP(CLASSES, text_weights="random").to(device)
    model: AVadCLIP | AVadCLIPStudent = teacher if kind == "teacher" else AVadCLIPStudent.beside(teacher).to(device)
    batch = _batch(setting)
    known = teacher_features(teacher.eval(), batch, setting.precision) if kind == "distil" else None
    update = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-5, fused=True)
    recipe = Recipe(precision=setting.precision)
    return lambda: train_step(model, update, batch, known, recipe)


def _infer(setting: Setting) -> Step:
    """Inference of the student with precomputed text features, as in evaluation."""
    model = AVadCLIPStudent(CLASSES, text_weights="random").to(setting.device).eval()
    batch = _batch(setting)
    with torch.no_grad():
        text = model.encode_text()

    @torch.no_grad()
    def step() -> None:
        with (
            torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16"),
            profiling.span("forward"),
        ):
            model.infer(batch.visual, lengths=batch.lengths, text_features=text)

    return step


STEPS: dict[str, Callable[[Setting], Step]] = {
    "train-teacher": partial(_train, kind="teacher"),
    "train-student": partial(_train, kind="student"),
    "distil": partial(_train, kind="distil"),
    "infer": _infer,
}


def _batch(setting: Setting) -> Batch:
    lengths = _lengths(setting)
    valid = (torch.arange(T, device=setting.device) < lengths[:, None])[..., None]
    visual, audio = torch.randn(2, setting.batch, T, D, device=setting.device) * valid
    return Batch(visual, audio, lengths, _labels(setting))


def _lengths(setting: Setting) -> Tensor:
    return torch.randint(T // 4, T + 1, (setting.batch,), device=setting.device)


def _labels(setting: Setting) -> Tensor:
    return F.one_hot(torch.arange(setting.batch, device=setting.device) % len(CLASSES), len(CLASSES)).float()


# Single ops


def _op(name: str, setting: Setting) -> Step:
    """Forward and backward pass of one op, with the backend that is selected for it."""
    arguments = _arguments(name, setting)
    given = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    function = getattr(ops, name)

    def step() -> None:
        out = function(**arguments)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def _arguments(name: str, setting: Setting) -> dict:
    """Returns the arguments of an op as in a training step."""
    device, _, batch = setting
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5).requires_grad_()

    lengths, labels = _lengths(setting), _labels(setting)
    x = partial(draw, batch, T, D)
    cases: dict[str, Callable[[], dict]] = {
        "gated_fusion": lambda: {
            "visual": x(), "audio": x(), "gate_weight": draw(D, 2 * D), "gate_bias": draw(D),
            "hidden_weight": draw(D, 2 * D), "hidden_bias": draw(D), "residual_weight": draw(D, D),
            "residual_bias": draw(D),
        },
        "linear_act": lambda: {
            "x": x(), "weight": draw(4 * D, D), "bias": draw(4 * D), "activation": "quick_gelu",
            "norm": (draw(D), draw(D)),
        },
        "add_act": lambda: {"x": x(), "residual": x(), "activation": "relu"},
        "window_attention": lambda: {
            "q": x(), "k": x(), "v": x(), "window": 64, "heads": 1, "lengths": lengths, "residual": x(),
        },
        "prefix_attention": lambda: {
            "qkv": draw(PREFIX + len(CLASSES) * NAME, 3 * D), "prefix": PREFIX, "rows": NAME, "heads": D // 64,
        },
        "similarity_graph": lambda: {"features": x(), "values": x(), "lengths": lengths},
        "distance_graph": lambda: {"values": x(), "lengths": lengths},
        "attention_pool": lambda: {"features": x(), "logits": draw(batch, T), "lengths": lengths},
        "prompt_similarity": lambda: {"features": x(), "prompts": draw(batch, len(CLASSES), D)},
        "topk_mean": lambda: {"scores": draw(batch, T, len(CLASSES)), "lengths": lengths},
        "mil_loss": lambda: {"logits": draw(batch, T), "labels": labels, "lengths": lengths},
        "mil_align_loss": lambda: {
            "logits": draw(batch, T, len(CLASSES)), "labels": labels, "lengths": lengths,
            "alpha": torch.ones(len(CLASSES), device=device),
        },
        "distill_loss": lambda: {
            "teacher": x().detach(), "student": x(), "log_variance": x(), "lengths": lengths,
        },
        "uniform_pool": lambda: {"features": draw(int(lengths.sum()) * 4, D), "lengths": lengths * 4, "rows": T},
        "pack_rows": lambda: {"padded": x(), "lengths": lengths},
        "unpack_rows": lambda: {"packed": draw(int(lengths.sum()), D), "lengths": lengths, "rows": T},
    }  # fmt: skip
    return cases[name]()
