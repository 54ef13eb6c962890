"""Teacher and student with the robust recipe on a real, weakly labelled audio-visual set: frame AP over three seeds.

    python -m bench.fightsurv FOLDER --ablate     ablations on held-out sources of the training videos
    python -m bench.fightsurv FOLDER --told       students trained on the ground truth of every snippet, on these folds
    python -m bench.fightsurv FOLDER              train with the recipe on all training videos, score the test videos
    python -m bench.fightsurv FOLDER --plots docs plots of the results, from their JSON

FOLDER has train.csv, test.csv, gt.npy and gt_segments.json. All choices are made on sources held out from the training
videos (bench/fightsurv_folds.py), with one fold per seed. Text weights are random, since the features are not CLIP's.
--ablate can run in several processes at once, each with its own --folds, and finally once without --folds.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from avadclip_fast import data
from avadclip_fast.data.atomic import write_json
from avadclip_fast.data.features import pool
from avadclip_fast.engine.calibrate import (
    HEADS,
    Calibration,
    Head,
    fit_calibration,
    held_out_logits,
    reliability,
    snippet_scores,
    video_scores,
)
from avadclip_fast.engine.evaluate import at_threshold, evaluate, score_videos
from avadclip_fast.engine.metrics import frame_ap
from avadclip_fast.engine.missing import COLUMNS, missing_sound
from avadclip_fast.engine.plots import reliability_plot
from avadclip_fast.engine.recipe import ROBUST, ROBUST_HEARER, ROBUST_STREAMS, Recipe
from avadclip_fast.engine.step import adamw, add_noise, feature_std, set_lr, trim
from avadclip_fast.engine.train import HISTORY, fit
from avadclip_fast.models import AVadCLIP, AVadCLIPStudent, objective

from . import fightsurv_folds as folds
from .harness import RESULTS, read
from .plots import bar_groups

PRESET = data.PRESETS["cctv-fights"]
CLASSES = list(PRESET.codes.values())
LENGTH = 32  # an eighth of the default, and of its time; videos have 38 to 361 snippets of 4 frames
STUDENT_WINDOW = 8  # a quarter of the length, like the default 64 of 256
SEEDS = (0, 1, 2)
PERCENTS = (0, 25, 50, 100)
BRANCHES = {
    "temporal encoder": ("temporal.",),
    "audio TCN": ("audio.",),
    "fusion": ("fusion.",),
    "heads": ("mlp2.", "classifier.", "prompt.", "text.prompt.", "align_loss."),
}


class Row(NamedTuple):
    """The changes of one ablation row to the robust recipe."""

    recipe: dict = {}
    model: dict = {}
    change: Callable[[AVadCLIP], None] = lambda model: None  # applied to the initial weights
    student: bool = False
    guide: str = "robust"  # row of a student's teacher


def _louder(model: AVadCLIP) -> None:
    """Triples the initial gains of weight norm, so that each convolution roughly preserves the scale of its input."""
    with torch.no_grad():
        for name, parameter in model.audio.named_parameters():
            if name.endswith("weight_g"):
                parameter *= 3


def _open_ended(model: AVadCLIP) -> None:
    """Removes the ReLU at the end of each level; that of the first level drops all values below the mean."""

    def forward(level, x):
        h = F.dropout(level.conv1(x, "relu"), level.dropout, level.training)
        return x + F.dropout(level.conv2(h, "relu"), level.dropout, level.training)

    for level in model.audio.network:
        level.forward = functools.partial(forward, level)


PLAIN = {"temporal_lr": 1.0, "noise": 0.0, "lr": 1e-4}
SIGHT = {"standardize": ["audio"], "motion": False}
AS_IT_IS = {"standardize": [], "motion": False}
TEACHERS = {
    "robust": Row(),
    "without motion": Row(model=SIGHT),
    "without motion, noise 1": Row({"noise": 1.0}, SIGHT),
    "without noise": Row({"noise": 0.0}),
    "noise 1": Row({"noise": 1.0}),
    "temporal encoder at the full rate": Row({"temporal_lr": 1.0}),
    "sound not standardised": Row(model={**ROBUST_STREAMS, "standardize": ["visual"]}),
}
WHY = {
    "official, lr 1e-4": Row(PLAIN, AS_IT_IS),
    "+ sound standardised": Row(PLAIN, SIGHT),
    "+ and weight norm louder": Row(PLAIN, SIGHT, _louder),
    "+ and no ReLU at the TCN's levels' ends": Row(PLAIN, SIGHT, _open_ended),
    "+ and temporal encoder frozen": Row({**PLAIN, "temporal_lr": 0.0}, SIGHT),
}
ALONE, LIGHT, FAST = {"distill_weight": 0.0}, {"distill_weight": 1.0}, {"temporal_lr": 1.0}
STUDENTS = {
    "alone": Row(ALONE, student=True),
    "distilled, weight 1": Row(LIGHT, student=True),
    "distilled, weight 10": Row(student=True),
    "alone, temporal encoder at the full rate": Row({**ALONE, **FAST}, student=True),
    "distilled, weight 1, temporal encoder at the full rate": Row({**LIGHT, **FAST}, student=True),
    "distilled, weight 10, temporal encoder at the full rate": Row(FAST, student=True),
    "alone, without motion": Row(ALONE, student=True, guide="without motion"),
    "distilled, weight 1, without motion": Row(LIGHT, student=True, guide="without motion"),
    "hears instead, alone": Row(
        {**ROBUST_HEARER, **ALONE}, {"modality": "audio", "standardize": ["audio"]}, student=True
    ),
}
UNTOLD, TOLD = "alone: told every video's label", "told every snippet's truth"  # a perfect teacher
WAYS = {"videos": folds.by_videos, "clips": folds.by_clips, "sources": folds.by_sources}
STREAMS = {"sight": ("sight",), "motion": ("motion",), "sound": ("sound",), "motion and sound": ("motion", "sound")}
GROUPS = {"teacher": TEACHERS, "student": STUDENTS, "why": WHY}
CHOSEN_STUDENT = "distilled, weight 10"
NAMES = ("teacher", "student, distilled", "student alone", "teacher, sound withheld")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument(
        "--folds", type=int, nargs="+", default=SEEDS, metavar="K", help="of --ablate: train these alone"
    )
    parser.add_argument("--told", action="store_true")
    parser.add_argument("--plots", type=Path, metavar="DIR")
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/fightsurv"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.plots:
        plot(options.plots)
    elif options.ablate:
        ablate(options.folder, options.output / "ablation", options.device, options.folds)
    elif options.told:
        told(options.folder, options.output / "told", options.device)
    else:
        final(options.folder, options.output / "final", options.device)


# --- ablations on sources held out from the training videos ---


def ablate(folder: Path, output: Path, device: str, chosen: Sequence[int] = SEEDS) -> None:
    """Trains every row on the chosen folds; given all, writes fightsurv_ablation.json. Resumes an interrupted call."""
    videos = folds.load(folder)
    clips = folds.find_clips(videos)
    parts = {seed: folds.by_sources(videos, clips, seed) for seed in chosen}
    report = {"command": "python -m bench.fightsurv FOLDER --ablate", **_setting()}
    report["repeats"] = _repeats(videos, clips)
    report["rows"] = []
    for group, rows in GROUPS.items():
        for name, row in rows.items():
            runs = [_row(name, row, group, seed, *parts[seed], output, device) for seed in chosen]
            report["rows"].append({"group": group, "name": name, "seeds": runs})
            _say(f"{group}, {name}", runs)
    if tuple(chosen) != SEEDS:
        return
    report["linear"] = _cached(output / "linear.json", lambda: _linear(videos, clips))
    report["calibration"] = {kind: _pooled_calibration(kind, parts, output, device) for kind in ("teacher", "student")}
    _write("fightsurv_ablation", report)


def _row(name: str, row: Row, group: str, seed: int, kept, held, output: Path, device: str) -> dict:
    """Trains and scores one row on one fold."""
    folder = _folder(output, group, name, seed)

    def run() -> dict:
        guide = None
        if row.student:
            guide = AVadCLIP.from_pretrained(_folder(output, "teacher", row.guide, seed) / "model")
        motion = {**ROBUST_STREAMS, **row.model}["motion"] if guide is None else guide.motion
        features = folds.feature_set(kept, LENGTH, motion)
        model = _made(row, seed, features, guide)
        before = {} if row.student else _measures(model, features)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        recipe = _recipe(seed, row)
        history = _fit(model, features, recipe, folder, guide, folds.feature_set(held, LENGTH, motion), device)
        result = {"epochs": [{key: round(e[key], 4) for key in ("mil", "align", "val")} for e in history]}
        result["ap"] = _score(model, held, device)
        if not row.student:
            result["ap_without_sound"] = _score(model, held, device, silent=True)
            result["before"], result["after"] = before, _measures(model, features)
            result["moved"] = {
                branch: _norm([p.detach() - start[n] for n, p in own]) / _norm([start[n] for n, _ in own])
                for branch, own in _branches(model).items()
            }
        return result

    return _cached(folder / "result.json", run)


def _made(row: Row, seed: int, features, guide: AVadCLIP | None):
    torch.manual_seed(seed)
    if row.student:
        model = AVadCLIPStudent.beside(guide, **{"window": STUDENT_WINDOW, **row.model})
    else:
        model = AVadCLIP(CLASSES, length=LENGTH, text_weights="random", **{**ROBUST_STREAMS, **row.model})
        row.change(model)
    model.fit_inputs(features.batches())
    return model


def _folder(output: Path, group: str, name: str, seed: int) -> Path:
    return output / f"{group}-{name.replace(' ', '_').replace(chr(39), '')}-{seed}"


def _recipe(seed: int, row: Row) -> Recipe:
    return Recipe(**{**ROBUST, "seed": seed, "select": "last", **row.recipe})


def _fit(model, features, recipe: Recipe, folder: Path, guide, held, device) -> list[dict]:
    """Fits a model, without a teacher if the distillation weight is 0. Resumes an interrupted run."""
    guide = guide if recipe.distill_weight else None
    fit(model, features, recipe, folder, teacher=guide, held_out=held, device=device, resume=True, progress=False)
    return json.loads((folder / HISTORY).read_text())["epochs"]


def _score(model, held, device: str, silent: bool = False) -> dict:
    """Returns the frame AP of both outputs against the fights inferred from the labels."""
    videos = folds.test_videos(held, LENGTH, model.motion)
    scores = score_videos(model, videos, device, silent=silent, progress=False)
    truth = np.concatenate([v.fights for v in held])
    align = np.concatenate([1 - s.probabilities[:, 0] for s in scores])
    return {"align": frame_ap(align, truth), "binary": frame_ap(np.concatenate([s.anomaly for s in scores]), truth)}


def _measures(model: AVadCLIP, features) -> dict:
    """Measures the spread of the streams and the gradient norms relative to the weights, on 48 training videos."""
    batch = features.batch(torch.arange(0, len(features), len(features) // 48)[:48])
    model.eval()
    with torch.no_grad():
        seen = model.temporal(model._input("visual", batch.visual, batch.lengths), batch.lengths)
        heard = model.audio(model._input("audio", batch.audio, batch.lengths))
        fused = model.fusion(seen, heard, batch.lengths)
        deaf = model.fuse(batch.visual, None, batch.lengths)
        gate = model.fusion.gate_proj(torch.cat([seen, heard], -1))
    model.zero_grad()
    losses = objective(model, model(batch.visual, batch.audio, batch.lengths), batch.labels, batch.lengths)
    losses["total"].backward()
    spread = {
        "temporal encoder": seen,
        "audio TCN": heard,
        "added by fusion": fused - seen,
        "due to sound": fused - deaf,
    }
    result = {
        "spread": {name: (x - x.mean((0, 1))).square().mean().sqrt().item() for name, x in spread.items()},
        "gate": gate.mean().item(),
        "gradient": {
            branch: _norm([p.grad for _, p in own if p.grad is not None]) / _norm([p for _, p in own])
            for branch, own in _branches(model).items()
        },
    }
    model.zero_grad()
    return result


def _branches(model) -> dict:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {branch: [(n, p) for n, p in trained if n.startswith(prefixes)] for branch, prefixes in BRANCHES.items()}


def _norm(tensors) -> float:
    return torch.stack([x.detach().norm() for x in tensors]).norm().item()


def _repeats(videos, clips: folds.Clips) -> dict:
    """Counts all rows, distinct rows, and the share of rows that also occur in another video."""
    counts = {"videos": len(videos), "clips": len(clips.fight), "fight_clips": int(clips.fight.sum())}
    for stream in ("visual", "audio"):
        rows = [getattr(v, stream) for v in videos]
        where: dict[bytes, set] = {}
        for i, video in enumerate(rows):
            for row in video:
                where.setdefault(row.tobytes(), set()).add(i)
        total = sum(map(len, rows))
        shared = sum(len(where[row.tobytes()]) > 1 for video in rows for row in video)
        counts[stream] = {"rows": total, "different": len(where), "in_another_video": shared / total}
    return counts


def _linear(videos, clips: folds.Clips) -> list[dict]:
    """Returns the frame AP of logistic regression of the video label on standardized snippets, by type of fold."""
    records = []
    for way, split in WAYS.items():
        for name, streams in STREAMS.items():
            found = []
            for seed in SEEDS:
                kept, held = split(videos, clips, seed)
                x = _side_by_side(kept, streams)
                mean, std = x.mean(0), x.std(0) + 1e-6
                labels = np.concatenate([np.full(len(v.visual), v.abnormal) for v in kept])
                model = LogisticRegression(C=1e-4, max_iter=60).fit((x - mean) / std, labels)
                score = model.decision_function((_side_by_side(held, streams) - mean) / std)
                found.append(frame_ap(score, np.concatenate([v.fights for v in held])))
            records.append({"held_out": way, "streams": name, "ap": found})
    return records


def _side_by_side(videos, streams: tuple[str, ...]) -> np.ndarray:
    def rows(video: folds.Video) -> np.ndarray:
        width = video.visual.shape[1]
        parts = {"sight": video.visual, "sound": video.audio}
        if "motion" in streams:
            parts["motion"] = data.with_motion(video.visual)[:, width:]
        return np.concatenate([parts[stream] for stream in streams], 1)

    return np.concatenate([rows(v) for v in videos])


def _pooled_calibration(kind: str, parts: dict, output: Path, device: str) -> dict:
    """Calibrates the robust teachers, or the chosen students, on their held-out folds, and measures reliability.

    The error after the fit is measured on the same videos, since a fold is too small to split in half.
    """
    logits: dict = {head: [] for head in HEADS}
    abnormal = []
    for seed, (_, held) in parts.items():
        name = "robust" if kind == "teacher" else CHOSEN_STUDENT
        of = AVadCLIP if kind == "teacher" else AVadCLIPStudent
        model = of.from_pretrained(_folder(output, kind, name, seed) / "model").to(device)
        found = held_out_logits(model, folds.feature_set(held, LENGTH, model.motion), 32, device)
        for head in HEADS:
            logits[head] += found[head]
        abnormal += [v.abnormal for v in held]
    abnormal = np.array(abnormal)
    fitted = fit_calibration(logits, abnormal)
    result = {"calibration": dataclasses.asdict(fitted)}
    for head in HEADS:
        for when, t in (("before", 1.0), ("after", getattr(fitted, head).temperature)):
            scores = video_scores([snippet_scores(head, x, t) for x in logits[head]])
            result.setdefault(head, {})[when] = reliability(scores, abnormal)
    return result


# --- upper bound on the benefit of a teacher ---


def told(folder: Path, output: Path, device: str) -> None:
    """Trains students on snippet ground truth, and others on video labels; writes fightsurv_told.json.

    Three students per fold, since students differ as much as folds do. Resumes an interrupted call.
    """
    videos = folds.load(folder)
    clips = folds.find_clips(videos)
    report = {"command": "python -m bench.fightsurv FOLDER --told", **_setting(), "rows": []}
    for name in (UNTOLD, TOLD):
        row: dict = {"name": name, "folds": []}
        for fold in SEEDS:
            kept, held = folds.by_sources(videos, clips, fold)
            runs = []
            for seed in SEEDS:
                path = output / f"{'told' if name == TOLD else 'alone'}-{fold}-{seed}"
                train = functools.partial(_told, name == TOLD, seed, kept, held, path, device)
                runs.append(_cached(path.with_suffix(".json"), train))
            row["folds"].append(runs)
            _say(f"{name}, fold {fold}", runs)
        report["rows"].append(row)
    _write("fightsurv_told", report)


def _told(
    truth: bool, seed: int, kept: Sequence[folds.Video], held: Sequence[folds.Video], folder: Path, device: str
) -> dict:
    """Returns a student's frame AP on a fold; with `truth`, both outputs are trained by cross-entropy per snippet."""
    features = folds.feature_set(kept, LENGTH, ROBUST_STREAMS["motion"])
    torch.manual_seed(seed)
    sizes = AVadCLIP(CLASSES, length=LENGTH, text_weights="random", **ROBUST_STREAMS)  # for settings and text weights
    row = Row(ALONE, student=True)
    model, recipe = _made(row, seed, features, sizes).to(device), _recipe(seed, row)
    if not truth:
        _fit(model, features, recipe, folder, None, None, device)
        return {"ap": _score(model, held, device)}
    fights = torch.from_numpy(np.stack([pool(v.fights[:, None].astype(np.float32), LENGTH)[0][:, 0] for v in kept]))
    optimizer, scale = adamw(model, recipe, torch.device(device)), feature_std(features).to(device)
    for epoch in range(recipe.epochs):
        model.train()
        set_lr(optimizer, recipe.lr_at(epoch))
        for index in data.epoch_order(len(features), seed, epoch).split(recipe.batch_size):
            batch = add_noise(trim(features.batch(index), model).to(device), recipe.noise * scale)
            out = model(batch.visual, batch.lengths)
            rows = batch.visual.shape[1]
            valid = torch.arange(rows, device=device) < batch.lengths[:, None]
            target = fights[index, :rows].to(device)[valid]
            binary = F.binary_cross_entropy_with_logits(out.anomaly_logits[valid], target)
            align = F.cross_entropy(out.class_logits[valid], torch.stack([1 - target, target], 1))
            optimizer.zero_grad()
            (binary + align).backward()
            optimizer.step()
    return {"ap": _score(model, held, device)}


# --- the recipe on all training videos, scored once on the test videos ---


def final(folder: Path, output: Path, device: str) -> None:
    """Trains on all training videos, scores the test videos, and writes fightsurv.json."""
    ablation = read("fightsurv_ablation")
    features = folds.feature_set(folds.load(folder), LENGTH, ROBUST_STREAMS["motion"])
    test = data.read_list(folder / "test.csv")
    truth = data.read_frame_gt(folder / "gt.npy")
    spans = data.read_spans(folder / "gt_segments.json")
    calibrations = {kind: _calibration(ablation["calibration"][kind]) for kind in ("teacher", "student")}
    robust = next(row["seeds"] for row in ablation["rows"] if (row["group"], row["name"]) == ("teacher", "robust"))
    head = max(HEADS, key=lambda head: statistics.mean(run["ap"][head] for run in robust))
    results, missing, thresholds = {name: [] for name in NAMES}, [], {"teacher": [], "student": []}
    for seed in SEEDS:
        teacher = _made(Row(), seed, features, None)
        _fit(teacher, features, _recipe(seed, Row()), output / f"teacher-{seed}", None, None, device)
        students = {}
        for name in (CHOSEN_STUDENT, "alone"):
            row = STUDENTS[name]
            students[name] = _made(row, seed, features, teacher)
            recipe = _recipe(seed, row)
            _fit(students[name], features, recipe, output / f"student-{name}-{seed}", teacher, None, device)
        models = (teacher, students[CHOSEN_STUDENT], students["alone"], teacher)
        scored = {}
        for name, model in zip(NAMES, models, strict=True):
            kind = "teacher" if model is teacher else "student"
            scored[name] = score_videos(
                model, data.test_videos(test, LENGTH, motion=model.motion), device, silent=name.endswith("withheld"),
                calibration=calibrations[kind], progress=False,
            )  # fmt: skip
            result = evaluate(scored[name], truth, CLASSES, PRESET.frames_per_snippet, spans, PRESET.codes)
            results[name].append({head: result[head] for head in HEADS} | {"detection": result["detection"]["average"]})
        hearing, student, _, deaf = (scored[name] for name in NAMES)
        settings = truth, CLASSES, PRESET.frames_per_snippet, PERCENTS, seed
        missing.append(missing_sound(hearing, deaf, student, *settings))
        for kind, name in (("teacher", NAMES[0]), ("student", NAMES[1])):
            thresholds[kind].append(at_threshold(scored[name], truth, PRESET.frames_per_snippet, calibrations[kind]))
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * results[name][-1][head]['ap']:.1f}" for name in NAMES))
    report = {"command": "python -m bench.fightsurv FOLDER", **_setting(), "student": CHOSEN_STUDENT, "head": head}
    report |= {"positive_rate": float(truth.mean()), "results": results, "missing": missing, "threshold": thresholds}
    _write("fightsurv", report)
    print(table(report))
    print(missing_table(report))


def _calibration(stored: dict) -> Calibration:
    fitted = stored["calibration"]
    return Calibration(*(Head(**fitted[head]) for head in HEADS), videos=fitted["videos"])


def _setting() -> dict:
    settings = {
        "length": LENGTH,
        "student_window": STUDENT_WINDOW,
        "recipe": ROBUST,
        "model": ROBUST_STREAMS,
        "seeds": SEEDS,
    }
    return {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "settings": settings,
    }


# --- files, tables, plots ---


def _write(name: str, report: dict) -> None:
    write_json(RESULTS / f"{name}.json", report)


def _cached(path: Path, make: Callable):
    """Returns the result of `make`, cached in a file, so that an interrupted call can resume."""
    if not path.exists():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return json.loads(path.read_text())


def _say(name: str, runs: list[dict]) -> None:
    """Prints the frame AP of each run from the align output."""
    found = {"AP": "ap"} | ({"without sound": "ap_without_sound"} if "ap_without_sound" in runs[0] else {})
    for label, key in found.items():
        print(f"{name}, {label}:", *(f"{100 * run[key]['align']:.1f}" for run in runs), flush=True)


def table(report: dict) -> str:
    """Returns the table of test results: mean and standard deviation over the seeds, in percent."""
    lines = ["| | frame AP | frame AUC | AP on abnormal videos |", "|---|---|---|---|"]
    for name, runs in report["results"].items():
        cells = (_spread([100 * run[report["head"]][key] for run in runs]) for key in ("ap", "auc", "abnormal_ap"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| chance (positive rate) | {100 * report['positive_rate']:.1f} | 50.0 | |")
    return "\n".join(lines)


def heads_table(report: dict) -> str:
    """Returns the frame AP of both outputs on the test videos, and detection mAP."""
    lines = ["| | align | binary | detection mAP |", "|---|---|---|---|"]
    for name, runs in report["results"].items():
        cells = [_spread([100 * run[head]["ap"] for run in runs]) for head in HEADS]
        lines.append(f"| {name} | {' | '.join(cells)} | {_spread([run['detection'] for run in runs])} |")
    return "\n".join(lines)


def missing_table(report: dict) -> str:
    """Returns the frame AP on the test videos by the share of videos without sound."""
    lines = [f"| without sound | {' | '.join(COLUMNS)} |", "|---|---|---|---|---|"]
    for i, percent in enumerate(PERCENTS):
        cells = (_spread([100 * run[i][name][report["head"]] for run in report["missing"]]) for name in COLUMNS)
        lines.append(f"| {percent} % of the videos | {' | '.join(cells)} |")
    return "\n".join(lines)


def repeats_table(report: dict) -> str:
    """Returns the number of rows of the training videos: all, distinct, and shared with another video."""
    repeats = report["repeats"]
    lines = ["| rows of the training videos | all | different | found in another video too |", "|---|---|---|---|"]
    for stream in ("visual", "audio"):
        row = repeats[stream]
        lines.append(f"| {stream} | {row['rows']:,} | {row['different']:,} | {100 * row['in_another_video']:.1f} % |")
    return "\n".join(lines)


def linear_table(report: dict) -> str:
    lines = [f"| held out | {' | '.join(STREAMS)} |", "|---" * (1 + len(STREAMS)) + "|"]
    for way in WAYS:
        found = {row["streams"]: row["ap"] for row in report["linear"] if row["held_out"] == way}
        lines.append(f"| {way} | {' | '.join(_spread([100 * ap for ap in found[name]]) for name in STREAMS)} |")
    return "\n".join(lines)


def ablation_table(report: dict, group: str) -> str:
    """Returns the frame AP on held-out sources: mean and standard deviation over the folds, in percent."""
    lines = ["| | align | binary | sound withheld: align | binary | training loss |", "|---|---|---|---|---|---|"]
    for row in (row for row in report["rows"] if row["group"] == group):
        runs = row["seeds"]
        cells = [_spread([100 * run["ap"][head] for run in runs]) for head in HEADS]
        deaf = [run["ap_without_sound"] for run in runs if "ap_without_sound" in run]
        cells += [_spread([100 * ap[head] for ap in deaf]) if deaf else "" for head in HEADS]
        loss = statistics.mean(run["epochs"][-1]["mil"] + run["epochs"][-1]["align"] for run in runs)
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {loss:.2f} |")
    return "\n".join(lines)


def told_table(report: dict) -> str:
    """Compares students trained on labels and on ground truth: mean and standard deviation over students of a fold."""
    lines = ["| frame AP: align, binary | " + " | ".join(f"fold {fold}" for fold in SEEDS) + " | all |"]
    lines.append("|---" * (2 + len(SEEDS)) + "|")
    found = {
        row["name"]: np.array([[[100 * run["ap"][head] for head in HEADS] for run in runs] for runs in row["folds"]])
        for row in report["rows"]
    }  # [folds, students, heads]
    for name, ap in (found | {"difference, pair by pair": found[TOLD] - found[UNTOLD]}).items():
        cells = [", ".join(_spread(list(part[:, k])) for k in range(len(HEADS))) for part in ap]
        cells.append(", ".join(_spread(list(ap[..., k].ravel())) for k in range(len(HEADS))))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measures_table(report: dict) -> str:
    """Returns the measures of the teacher with initial and trained weights, and how far training moves the weights."""
    names = ("official, lr 1e-4", "+ sound standardised", "robust")
    lines = ["| | " + " | ".join(f"{name}: drawn | trained" for name in names) + " |", "|---" * 7 + "|"]
    runs = {row["name"]: row["seeds"] for row in report["rows"] if row["name"] in names and row["group"] != "student"}

    def line(title: str, values: Callable) -> str:
        return f"| {title} | " + " | ".join(v for name in names for v in values(runs[name])) + " |"

    def both(*path: str):
        def values(own):
            for when in ("before", "after"):
                found = []
                for run in own:
                    value = run[when]
                    for key in path:
                        value = value[key]
                    found.append(value)
                yield f"{statistics.mean(found):.2g}"

        return values

    for part in ("temporal encoder", "audio TCN", "added by fusion", "due to sound"):
        lines.append(line(f"spread: {part}", both("spread", part)))
    lines.append(line("mean gate", both("gate")))
    for branch in BRANCHES:
        lines.append(line(f"gradient / weight: {branch}", both("gradient", branch)))
    for branch in BRANCHES:
        moved = {n: statistics.mean(run["moved"][branch] for run in own) for n, own in runs.items()}
        lines.append(f"| moved by training: {branch} | " + " | ".join(f" | {moved[n]:.2g}" for n in names) + " |")
    return "\n".join(lines)


def calibration_table(ablation: dict, report: dict) -> str:
    """Returns temperatures and thresholds of the reported output, and the expected calibration errors."""
    scored = report["head"]
    lines = [
        "| | temperature | threshold | error on held-out videos, before and after | "
        "test frames at the threshold: precision | recall | F1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, found in ablation["calibration"].items():
        head, errors = found["calibration"][scored], found[scored]
        runs = [run[scored] for run in report["threshold"][kind]]
        cells = [f"{head['temperature']:.2f}", f"{head['threshold']:.2f}"]
        cells += [f"{100 * errors['before']['ece']:.1f}, {100 * errors['after']['ece']:.1f}"]
        cells += [_spread([100 * run[key] for run in runs]) for key in ("precision", "recall", "f1")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(folder: Path) -> None:
    """Draws the plots of docs/training-that-hears.md from the committed JSON."""
    ablation, report = read("fightsurv_ablation"), read("fightsurv")
    head = report["head"]
    folder.mkdir(parents=True, exist_ok=True)

    def bars(group: str) -> dict:
        shown = {}
        for row in (row for row in ablation["rows"] if row["group"] == group):
            of_sight = group == "student" and STUDENTS[row["name"]].model.get("modality") != "audio"
            keys = {"ap": "sight alone" if of_sight else "with sound", "ap_without_sound": "sound withheld"}
            shown[row["name"]] = {
                label: _mean_spread([100 * run[key][head] for run in row["seeds"]])
                for key, label in keys.items()
                if key in row["seeds"][0]
            }
        return shown

    linear = {
        f"held-out {way}": {
            row["streams"]: _mean_spread([100 * ap for ap in row["ap"]])
            for row in ablation["linear"]
            if row["held_out"] == way
        }
        for way in WAYS
    }
    missing = {
        f"{percent} % of videos without sound": {
            name: _mean_spread([100 * run[i][name][head] for run in report["missing"]]) for name in COLUMNS
        }
        for i, percent in enumerate(PERCENTS)
    }
    axis = "frame AP, %: mean and standard deviation"
    title = f"Frame AP on held-out sources, {head} output"
    causes, parts = {"": bars("why")}, {kind: bars(kind) for kind in ("teacher", "student")}
    bar_groups(folder / "fightsurv-linear.png", {"": linear}, "Frame AP of a linear model", axis)
    bar_groups(folder / "fightsurv-why.png", causes, title, axis)
    bar_groups(folder / "fightsurv-ablation.png", parts, title, axis)
    bar_groups(folder / "fightsurv-missing.png", {"": missing}, f"Frame AP on the test videos, {head} output", axis)
    for kind in ("teacher", "student"):
        bins = {f"{when} calibration": found["bins"] for when, found in ablation["calibration"][kind][head].items()}
        about = f"Reliability on held-out videos: {kind}, {head} output"
        reliability_plot(folder / f"fightsurv-reliability-{kind}.png", bins, "videos", about)


def _mean_spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values)


def _spread(values: list[float]) -> str:
    return "{:.1f} ± {:.1f}".format(*_mean_spread(values))


if __name__ == "__main__":
    main()
