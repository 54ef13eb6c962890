"""Output of commands: progress bars, score plots, tables, and the environment report."""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import _build
from ..data import DataError
from ..models.checkpoints import MODEL
from ..ops import _dispatch
from . import progress
from .calibrate import Calibration
from .evaluate import VideoScores
from .metrics import format_table
from .missing import format_missing
from .plots import reliability_plot, score_curves
from .train import HISTORY

FEW = 20  # held-out videos: with fewer, one video moves precision and recall by 5 points or more

PACKAGES = (
    "torch",
    "triton",
    "open_clip_torch",
    "numpy",
    "safetensors",
    "huggingface-hub",
    "scikit-learn",
    "matplotlib",
    "av",
    "onnx",
    "onnxruntime",
    "ray",
)


def bar(description: str, unit: str) -> Callable:
    """Returns a progress callback for the data functions that wraps an iterable in a progress bar."""
    return lambda items: progress.bar(items, desc=description, unit=unit)


def draw(
    scores: list[VideoScores], truth: np.ndarray, frames_per_snippet: int, folder: Path, names: list[str] | None = None
) -> list[Path]:
    """Plots score curves over the ground truth, one PNG per video, and returns their paths.

    names: the videos to plot; default: five, those with positive frames first. Raises DataError on an unknown name.
    """
    known = {s.name: i for i, s in enumerate(scores)}
    missing = [name for name in names or () if name not in known]
    if missing:
        raise DataError(f"no video named {', '.join(missing)}; the list has {', '.join(list(known)[:5])}, ...")
    parts = np.split(truth, np.cumsum([len(s.anomaly) * frames_per_snippet for s in scores]))
    paths = []
    for name in names or sorted(known, key=lambda name: not parts[known[name]].any())[:5]:
        video, frames = scores[known[name]], parts[known[name]]
        paths.append(folder / f"{name}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        curves = {"align: 1 - p(normal)": 1 - video.probabilities[:, 0], "binary": video.anomaly}
        score_curves(paths[-1], name, curves, frames, frames_per_snippet)
    return paths


def draw_reliability(thresholds: dict, folder: Path, drawn: Sequence[Path]) -> Path:
    """Plots the reliability in the result of `at_threshold`, beside the files `drawn`, and returns its path."""
    path = folder / "reliability.png"
    while path in drawn:  # of a video of that name
        path = path.with_stem(f"{path.stem}_")
    reliability_plot(path, {name: found["bins"] for name, found in thresholds.items()})
    return path


def tables(result: dict, calibration: Calibration) -> str:
    """Formats all that was evaluated: `evaluate`'s result, with "threshold" and, if asked for, "missing_sound"."""
    shown = [format_table(result)]
    if calibration.videos:
        shown.append(threshold_table(result["threshold"]))
    if "missing_sound" in result:
        shown.append("\n" + format_missing(result["missing_sound"]))
    return "\n".join(shown)


def finished(output: Path) -> str:
    """Says where the model of a finished run is, which epoch was kept, and what its calibration rests on."""
    history = json.loads((output / HISTORY).read_text())
    lines = [f"model: {output / MODEL}, epoch {history['selected_epoch']} of {len(history['epochs'])}"]
    if videos := Calibration.load(output).videos:
        few = ": too few to trust" if videos < FEW else ""
        lines.append(f"calibration: temperature and threshold from {videos} held-out videos{few}")
    return "\n".join(lines)


def threshold_table(found: dict) -> str:
    """Formats the result of `at_threshold` as a table, in percent except for the threshold itself."""
    lines = ["", f"{'at threshold':<16}" + "".join(f"{h:>10}" for h in ("value", "precision", "recall", "F1", "ECE"))]
    for name, row in found.items():
        shares = ("-" if row[key] is None else f"{100 * row[key]:.2f}" for key in ("precision", "recall", "f1", "ece"))
        lines.append(f"{name:<16}{row['threshold']:>10.3f}" + "".join(f"{share:>10}" for share in shares))
    return "\n".join(lines)


def environment() -> str:
    """Returns versions, devices, and for each op the selected backend and why earlier ones were not selected."""
    lines = [f"python {platform.python_version()}, {platform.platform()}"]
    for package in ("avadclip_fast", *PACKAGES):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        lines.append(f"no CUDA device; cpu with {torch.get_num_threads()} threads")
    built = _build.facts()
    lines += [f"extensions: {name} {value}" for name, value in built.items()] or ["extensions: none built"]
    forced = _dispatch.forced()
    lines += [f"forced by AVADCLIP_FAST_BACKEND, for every op that has it: {forced}"] if forced else []
    lines += ["", f"{'op':<18}{'backend':<11}because"]
    for op, arguments in _examples("cuda" if torch.cuda.is_available() else "cpu").items():
        backend, because = _selected(op, arguments, forced)
        lines.append(f"{op:<18}{backend:<11}{because}")
    return "\n".join(lines)


def _selected(op: str, arguments: tuple, forced: str | None) -> tuple[str, str]:
    """Returns the backend that is selected for a call of an op, and why."""
    order = [name for name in _dispatch.ORDER if name in _dispatch.TABLE[op]]
    if forced in order:
        reason = _dispatch.why_not(op, forced, *arguments)
        return forced, "forced" if reason is None else f"forced, and cannot serve: {reason}"
    reasons = {name: _dispatch.why_not_chosen(op, name, *arguments) for name in order}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    before = order[: order.index(chosen)]
    return chosen, "; ".join(f"not {name}: {reasons[name]}" for name in before) or "the first choice"


def _examples(device: str) -> dict[str, tuple]:
    """Returns typical arguments of each op, used to query which backend is selected."""
    x = torch.zeros(4, 256, 512, device=device)
    lengths = torch.tensor([256, 100, 7, 31], device=device)
    square, double, bias = (torch.zeros(*shape, device=device) for shape in ((512, 512), (512, 1024), (512,)))
    labels, alpha = torch.ones(4, 7, device=device), torch.ones(7, device=device)
    return {
        "gated_fusion": (x, x, double, bias, double, bias, square, bias),
        "linear_act": (x, square, bias, "none", None, None, 1, False, None),
        "add_act": (x, x, "relu"),
        "window_attention": (x, x, x, 64, 1, lengths, None),
        "prefix_attention": (x[0, :102].repeat(1, 3), 11, 13, 8),
        "similarity_graph": (x, x, lengths, 0.7, None),
        "distance_graph": (x, torch.e, lengths),
        "attention_pool": (x, x[..., 0], lengths),
        "prompt_similarity": (x, x[:, :7], 0.07),
        "topk_mean": (x[..., :7], lengths, 16),
        "mil_loss": (x[..., 0], labels, lengths, 16),
        "mil_align_loss": (x[..., :7], labels, lengths, alpha, 16),
        "distill_loss": (x, x, x, lengths),
        "uniform_pool": (x, lengths, 64),
        "pack_rows": (x, lengths, 356),
        "unpack_rows": (x[:, :178].flatten(0, 1), lengths, 256),
    }
