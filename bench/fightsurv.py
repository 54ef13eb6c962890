"""Teacher and student on a real, weakly labelled audio-visual set: frame AP over several seeds.

    python -m bench.fightsurv FOLDER            FOLDER: train.csv, test.csv, gt.npy, gt_segments.json

The learning rate and the distillation weight are chosen by the mean loss of all seeds on a fifth of the training
videos, held out; the test set is scored once, by the models that all training videos then give. Text weights are
random: the features are not CLIP's.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from avadclip_fast import data
from avadclip_fast.data import atomic_write
from avadclip_fast.engine.evaluate import evaluate, score_videos
from avadclip_fast.engine.train import HISTORY, Recipe, fit
from avadclip_fast.models import AVadCLIP, AVadCLIPStudent

PRESET = data.PRESETS["cctv-fights"]
CLASSES = list(PRESET.codes.values())
LENGTH = 32  # the videos have 38 to 361 snippets of 4 frames: an eighth of the default, and of its time
STUDENT_WINDOW = 8  # a quarter of the length, as 64 is of the default 256
RATES = (1e-4, 2e-4)
WEIGHTS = (PRESET.distill_weight, 1e-1, 1.0)
EPOCHS, MILESTONES, BATCH = 5, (4,), 16
SPLIT_SEED, SEEDS = 234, (0, 1, 2)
NAMES = ("teacher", "student, distilled", "student alone", "teacher, sound withheld")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/fightsurv"))
    parser.add_argument("--json", type=Path, default=Path("bench/results/fightsurv.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    rows = data.read_list(options.folder / "train.csv")
    kept, held_out = (_load(part) for part in data.split(rows, 0.2, SPLIT_SEED))
    run = _Runs(options.output, options.device)
    guides, rates, weights = {}, {}, {}
    for lr in RATES:
        losses = []
        for seed in SEEDS:
            guides[lr, seed] = run.train(("rate", lr, seed), _teacher, seed, kept, None, held_out, lr=lr, select="val")
            losses.append(run.held_out_loss("rate", lr, seed))
        rates[lr] = statistics.mean(losses)
    lr = min(rates, key=rates.get)
    for weight in WEIGHTS:
        losses = []
        for seed in SEEDS:
            guide = guides[lr, seed]
            settings = {"lr": lr, "distill_weight": weight, "select": "val"}
            run.train(("weight", weight, seed), _student(guide), seed, kept, guide, held_out, **settings)
            losses.append(run.held_out_loss("weight", weight, seed))
        weights[weight] = statistics.mean(losses)
    weight = min(weights, key=weights.get)
    print(f"held-out loss by lr: {rates}; by distillation weight: {weights}")

    everything = _load(rows)
    results = {name: [] for name in NAMES}
    for seed in SEEDS:
        settings = {"lr": lr, "select": "last"}
        teacher = run.train(("teacher", seed), _teacher, seed, everything, **settings)
        alone = run.train(("alone", seed), _student(teacher), seed, everything, **settings)
        taught = run.train(
            ("distilled", seed), _student(teacher), seed, everything, teacher, distill_weight=weight, **settings
        )
        for name, model in zip(NAMES, (teacher, taught, alone, teacher), strict=True):
            results[name].append(_test(model, options.folder, options.device, silent=name.endswith("withheld")))
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * results[name][-1]['ap']:.1f}" for name in NAMES))

    truth = data.read_frame_gt(options.folder / "gt.npy")
    report = {
        "command": "python -m bench.fightsurv FOLDER",
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "settings": {"length": LENGTH, "epochs": EPOCHS, "milestones": MILESTONES, "batch": BATCH, "seeds": SEEDS},
        "held_out_loss": {"lr": rates, "distill_weight": weights},
        "chosen": {"lr": lr, "distill_weight": weight},
        "positive_rate": float(truth.mean()),
        "results": results,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.json, "w") as file:
        json.dump(report, file, indent=1)
    print(table(report))


def table(report: dict) -> str:
    """The report's table: mean and standard deviation over the seeds, in percent."""
    lines = ["| | frame AP | frame AUC | AP on abnormal videos |", "|---|---|---|---|"]
    for name, runs in report["results"].items():
        cells = (_spread([100 * run[key] for run in runs]) for key in ("ap", "auc", "abnormal_ap"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| chance (positive rate) | {100 * report['positive_rate']:.1f} | 50.0 | |")
    return "\n".join(lines)


class _Runs:
    """Trains into one folder a run; a call that was cut short goes on where it was."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device

    def train(self, name, make, seed, features, teacher=None, held_out=None, **settings):
        folder = self.folder / "-".join(map(str, name))
        torch.manual_seed(seed)
        model = make()
        model.fit_inputs(features.batches())
        recipe = Recipe(epochs=EPOCHS, milestones=MILESTONES, batch_size=BATCH, seed=seed, **settings)
        fit(
            model,
            features,
            recipe,
            folder,
            teacher=teacher,
            held_out=held_out,
            device=self.device,
            resume=True,
            progress=False,
        )
        return model

    def held_out_loss(self, *name) -> float:
        """The lowest one of a run."""
        history = json.loads((self.folder / "-".join(map(str, name)) / HISTORY).read_text())
        return min(epoch["val"] for epoch in history["epochs"])


def _teacher() -> AVadCLIP:
    return AVadCLIP(CLASSES, length=LENGTH, text_weights="random", standardize=["audio"])


def _student(teacher: AVadCLIP):
    return lambda: AVadCLIPStudent.beside(teacher, window=STUDENT_WINDOW)


def _load(rows) -> data.FeatureSet:
    return data.FeatureSet.load(rows, PRESET.codes, LENGTH)


def _test(model, folder: Path, device: str, silent: bool) -> dict:
    videos = data.test_videos(data.read_list(folder / "test.csv"), LENGTH)
    scores = score_videos(model, videos, device, silent=silent, progress=False)
    spans = data.read_spans(folder / "gt_segments.json")
    truth = data.read_frame_gt(folder / "gt.npy")
    result = evaluate(scores, truth, CLASSES, PRESET.frames_per_snippet, spans, PRESET.codes)
    return result["align"] | {"detection": result["detection"]["average"]}


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
