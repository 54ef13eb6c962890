"""The demo: trains, distils and evaluates models on a generated set in a few minutes."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import data
from ..data.atomic import atomic_write, write_json
from ..models import AVadCLIP, AVadCLIPStudent
from .evaluate import evaluate, score_rows
from .plots import score_grid
from .recipe import ROBUST, ROBUST_STREAMS, Recipe
from .state import StateError, writing
from .train import fit

CODES = {code: data.XD_VIOLENCE[code] for code in ("A", "B1", "B2", "G")}
FRAMES = 16
SEED = 0
# The text weights are random and videos have at most 48 snippets, so two text layers and 48 rows are enough.
LENGTH, TEXT_LAYERS = 48, 2
# Every video has its own scene, so overfitting is weaker and less noise is needed.
SETTINGS: dict[str, Any] = {"epochs": 6, "milestones": (5,), "noise": 1.0, "seed": SEED}
RECIPE = Recipe(**{**ROBUST, **SETTINGS})
# Sounds leave only a trace in the visual features, which a barely trained temporal encoder would not find.
STUDENT_RECIPE = Recipe(**{**ROBUST, **SETTINGS, "temporal_lr": 1.0})

INTRODUCTION = """# AVadCLIP on a made-up set

Training videos carry one label each. Some planted anomalies can be seen, some only heard, and harmless sounds and
sights are mixed in. The teacher was trained on sound and sight; one student on sight alone, one on sight with the
teacher's help. Scores are of the test videos; AP and AUC are per frame, from `1 - p(normal)`.

"""


def run(folder: Path, device: torch.device) -> str:
    """Trains and evaluates a teacher and two students in `folder`; returns the report. Raises StateError."""
    started = time.monotonic()
    folder = Path(folder)
    if any((folder / name).exists() for name in ("teacher", "student", "baseline")):
        raise StateError(f"{folder} holds a demo already, whole or begun: remove it, or choose another --output")
    with writing(folder / "data"):
        data.make_synthetic(folder / "data", seed=SEED)
    rows = data.read_list(folder / "data" / "train.csv")
    features = data.FeatureSet.load(rows, CODES, LENGTH, motion=True)
    torch.manual_seed(SEED)
    classes = list(CODES.values())
    teacher = AVadCLIP(classes, length=LENGTH, text_weights="random", text_layers=TEXT_LAYERS, **ROBUST_STREAMS)
    teacher.fit_inputs(features.batches())
    tqdm.write("training the teacher (1 of 3)")
    fit(teacher, features, RECIPE, folder / "teacher", device=device)
    students = {}
    for name, guide, told in (
        ("baseline", None, "training a student that is not distilled (2 of 3)"),
        ("student", teacher, "distilling a student (3 of 3)"),
    ):
        tqdm.write(told)
        torch.manual_seed(SEED)
        students[name] = AVadCLIPStudent.beside(teacher)
        students[name].fit_inputs(features.batches())
        fit(students[name], features, STUDENT_RECIPE, folder / name, teacher=guide, device=device)

    test = data.read_list(folder / "data" / "test.csv")
    truth = data.read_frame_gt(folder / "data" / "gt.npy")
    spans = data.read_segments_json(folder / "data" / "gt_segments.json")
    cases = {
        "teacher, with sound": (teacher, False),
        "teacher, without sound": (teacher, True),
        "student, without sound": (students["student"], False),
        "student, not distilled": (students["baseline"], False),
    }
    results, curves = {}, {}
    for name, (model, silent) in cases.items():
        curves[name] = score_rows(model, test, device, silent=silent)
        result = evaluate(curves[name], truth, classes, FRAMES, spans, CODES)
        results[name] = result["align"] | {"detection": result["detection"]["average"]}
        write_json(folder / f"{name.replace(', ', '-').replace(' ', '-')}.json", result)
    _plot(folder / "curves.png", curves, spans)
    lines = ["| | AP | AUC | detection mAP |", "|---|---|---|---|"]
    lines += [
        f"| {k} | {100 * r['ap']:.1f} | {100 * r['auc']:.1f} | {r['detection']:.1f} |" for k, r in results.items()
    ]
    text, seconds = "\n".join(lines), round(time.monotonic() - started)
    setting = {"torch": torch.__version__, "device": device.type, "threads": torch.get_num_threads()}
    write_json(folder / "results.json", {**setting, "seconds": seconds, "results": results})
    with atomic_write(folder / "report.md") as file:
        file.write(f"{INTRODUCTION}{text}\n\n![score curves](curves.png)\n".encode())
    return f"{text}\n\n{seconds} s; report: {folder / 'report.md'}, plots: {folder / 'curves.png'}"


def _plot(path: Path, curves: dict, spans: list) -> None:
    """Plots the six anomalous test videos with the largest gap between the teacher with sound and the others."""
    first, *others = curves.values()
    anomalous = [i for i, video in enumerate(spans) if any(code != "A" for _, _, code in video)]
    gap = {i: max(np.abs(first[i].probabilities - o[i].probabilities)[:, 0].max() for o in others) for i in anomalous}
    chosen = sorted(sorted(gap, key=lambda i: gap[i])[-6:])
    items = [
        (
            first[i].name,
            {name: 1 - scores[i].probabilities[:, 0] for name, scores in curves.items()},
            [(start, end) for start, end, code in spans[i] if code != "A"],
        )
        for i in chosen
    ]
    score_grid(path, items, FRAMES)
