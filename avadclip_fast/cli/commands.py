"""Commands train, distill, eval, demo, check, pack, convert and env."""

import math
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from typer import Argument, Option
from typer.core import TyperGroup

from .. import __version__, data
from ..data import DataError, Row
from ..data.atomic import make_folder, write_json
from ..data.errors import printable
from ..data.labels import FILLER
from ..data.lists import names_of
from ..data.packed import PACKED
from ..device import device_of, keep_memory
from ..engine import distributed, report
from ..engine.calibrate import Calibration
from ..engine.evaluate import WIDEST, at_threshold, check_spans, check_truth, evaluate, load_model, score_rows
from ..engine.missing import check_kinds, missing_sound
from ..engine.recipe import ROBUST, ROBUST_HEARER, Recipe
from ..engine.run import train_on_list
from ..engine.stop import Stopped
from ..models import AVadCLIP, AVadCLIPStudent, CheckpointError
from ..models.avadclip import Detector
from ..models.checkpoints import MODEL, model_folder


class Commands(TyperGroup):
    """Shows the whole first sentence of each command, which plain help would cut off at the end of the line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(1000)) for name, command in self.commands.items()])


app = typer.Typer(
    cls=Commands,
    help="AVadCLIP: audio-visual video anomaly detection. Train, distil, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # whose tables cut long options off in a terminal of 80 columns
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"avadclip_fast {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


RecipeName = Literal["official", "robust"]


class Modality(StrEnum):  # typer takes lists of enums, not of literals
    visual = "visual"
    audio = "audio"


def at_most(most: int) -> Callable[[int | None], int | None]:
    """A callback that refuses more: with `max`, help would show its thirteen digits after each option."""

    def checked(value: int | None) -> int | None:
        if value is not None and value > most:
            raise typer.BadParameter(f"{value} is more than {most}")
        return value

    return checked


sized = at_most(2**40)  # the bytes of any tensor that the option sizes still have a number in 64 bits

List_ = Annotated[
    Path,
    Argument(
        metavar="LIST",
        help=f"CSV: path,audio_path,label. train, distill and check also take a {PACKED} of `pack`.",
        show_default=False,
    ),
]
Root = Annotated[
    Path | None,
    Option(
        help="Base folder of the list's paths, which must stay in it; default: the list's folder.", show_default=False
    ),
]
PresetName = Annotated[str, Option("--preset", help=f"Class codes and settings: {', '.join(data.PRESETS)}.")]
Classes = Annotated[str | None, Option(help='Other classes, normal first: "A=normal,B1=fighting".', show_default=False)]
FramesPer = Annotated[
    int | None, Option(min=1, callback=sized, help="Video frames per snippet; default: the preset's.")
]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, ...")]
Output = Annotated[
    Path,
    Option(
        "--output",
        "-o",
        help="Folder of the run: model/, history.json, the state for --resume, TensorBoard logs.",
        show_default=False,
    ),
]
RecipeOf = Annotated[
    RecipeName,
    Option(
        "--recipe",
        help="Defaults of the training options: official (the paper's), or robust (for sets of hundreds of videos).",
    ),
]
Epochs = Annotated[
    int | None, Option(min=1, callback=sized, help=f"Default: 10; robust {ROBUST['epochs']}.", show_default=False)
]
Milestones = Annotated[
    str | None,
    Option(
        help="Epochs after which the rate drops tenfold; default: 3,6; "
        f"robust {','.join(map(str, ROBUST['milestones']))}.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    Option(
        min=1, callback=sized, help=f"Samples per step; default: 96; robust {ROBUST['batch_size']}.", show_default=False
    ),
]
Rate = Annotated[
    float | None,
    Option(
        "--lr", min=0.0, help=f"Learning rate of AdamW; default: 1e-5; robust {ROBUST['lr']:g}.", show_default=False
    ),
]
TemporalRate = Annotated[
    float | None,
    Option(
        "--temporal-lr",
        min=0.0,
        help="Learning rate of the temporal encoder, as a fraction of --lr; default: 1; "
        f"robust {ROBUST['temporal_lr']:g}, audio students 1.",
        show_default=False,
    ),
]
Noise = Annotated[
    float | None,
    Option(
        min=0.0,
        help=f"Noise on visual features, in standard deviations; default: 0; robust {ROBUST['noise']:g}.",
        show_default=False,
    ),
]
SEEDS: Any = {"min": 0, "callback": at_most(2**63 - 1)}  # steps add to it, and torch takes 64 bits
Seed = Annotated[int, Option(**SEEDS, help="Random seed of weights, sample order, dropout and noise.")]
Length = Annotated[int, Option(min=1, callback=sized, help="Snippets per training sample and test chunk.")]
Window = Annotated[
    int | None, Option(min=1, max=WIDEST, help="Attention window in snippets; default: teacher 4, student 64.")
]
OfficialWindow = Annotated[
    int | None,
    Option("--window", min=1, max=WIDEST, help="Window of an official .pth; default: teacher 4, student 64."),
]
PaddingMode = Annotated[
    Literal["masked", "official"], Option(help="masked: padding has no effect; official: as in the official code.")
]
PromptMode = Annotated[Literal["official", "paper"], Option(help="Form of the audio-visual prompt.")]
Motion = Annotated[
    bool | None,
    Option(
        "--motion/--no-motion",
        help="Add motion to visual features, which helps in scenes unseen in training; default: off; robust on.",
        show_default=False,
    ),
]
Standard = Annotated[
    list[Modality] | None,
    Option(
        help="Streams to standardize to mean 0 and variance 1, for features with a large mean. "
        "Default: none; robust audio. Motion always adds visual.",
    ),
]
TextWeights = Annotated[
    str, Option(help="openai (downloaded), random (tests, demos), or the path of a CLIP checkpoint.")
]
TextLayers = Annotated[int, Option(min=1, callback=sized, help="Depth of the text transformer; CLIP's is 12.")]
SelectBy = Annotated[
    Literal["val", "last", "test"],
    Option(help="Epoch to keep: lowest held-out loss, the last, or best on the test list."),
]
HeldOut = Annotated[
    float | None,
    Option(
        min=0.0,
        max=0.9,
        help="Share of the training videos held out for --select val; default: 0.1.",
        show_default=False,
    ),
]
HeldOutList = Annotated[
    Path | None,
    Option(
        help="List of held-out videos, instead of a share. Use other sources than in LIST: shared clips only measure "
        "memorization.",
        show_default=False,
    ),
]
TestList = Annotated[Path | None, Option(help="For --select test.", show_default=False)]
TestTruth = Annotated[Path | None, Option(help="Frame ground truth of the test list.", show_default=False)]
CheckpointEvery = Annotated[
    int | None,
    Option(
        min=1,
        callback=sized,
        help="Steps between checkpoints, by default 100, on a GPU 500; one is also saved after each epoch.",
    ),
]
PrecisionOf = Annotated[
    Literal["fp32", "tf32", "bf16"],
    Option(help="Precision of matrix products; tf32 needs a GPU or AMX. Weights and losses stay float32."),
]
Exact = Annotated[bool, Option("--deterministic", help="Use only deterministic operations, for bitwise equal runs.")]
Resume = Annotated[bool, Option("--resume", help="Resume exactly from the run's saved state; --epochs may grow.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress bars, which in a log are a line a minute.")]
Profile = Annotated[
    Path | None,
    Option(help="Write trace.json of ten steps into this folder, with a range for each phase.", show_default=False),
]
Graph = Annotated[
    bool | None,
    Option(
        "--graph/--no-graph",
        help="Run each step as one CUDA graph (several GPUs: two), with identical results; default: on a GPU.",
        show_default=False,
    ),
]


@app.command()
def train(
    list_: List_,
    output: Output,
    student: Annotated[bool, Option("--student", help="Train a student without a teacher (the baseline).")] = False,
    modality: Annotated[Modality, Option(help="The student's stream.")] = Modality.visual,
    fusion: Annotated[
        Literal["gated", "add", "concat", "cross_attention"], Option(help="How the teacher joins sound and sight.")
    ] = "gated",
    preset: PresetName = "xd-violence",
    classes: Classes = None,
    root: Root = None,
    recipe: RecipeOf = "official",
    epochs: Epochs = None,
    milestones: Milestones = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    temporal_lr: TemporalRate = None,
    noise: Noise = None,
    seed: Seed = 234,
    length: Length = 256,
    window: Window = None,
    padding: PaddingMode = "masked",
    prompt: PromptMode = "official",
    standardize: Standard = None,
    motion: Motion = None,
    text_weights: TextWeights = "openai",
    text_layers: TextLayers = 12,
    select: SelectBy = "val",
    held_out: HeldOut = None,
    held_out_list: HeldOutList = None,
    test_list: TestList = None,
    gt: TestTruth = None,
    frames_per_snippet: FramesPer = None,
    checkpoint_every: CheckpointEvery = None,
    precision: PrecisionOf = "fp32",
    deterministic: Exact = False,
    device: Device = "auto",
    profile: Profile = None,
    graph: Graph = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train the teacher or, with --student, a student without a teacher.

    On several GPUs: torchrun --nproc-per-node 4 -m avadclip_fast train ..., where --batch-size is the total.
    """
    codes, frames, _ = _preset(preset, classes, frames_per_snippet)
    _check_frames(frames_per_snippet, gt)
    if student and fusion != "gated":
        raise DataError(f"--fusion {fusion} is of a teacher; a --student takes one stream alone")
    if not student and modality != Modality.visual:
        raise DataError(f"--modality {modality} is of a --student; a teacher takes both streams")
    _seed(seed, deterministic)
    streams = [modality] if student else list(Modality)
    seen = Modality.visual in streams
    motion = recipe == "robust" and seen if motion is None else motion
    shape: dict[str, Any] = {
        "length": length, "padding": padding, "prompt": prompt, "motion": motion,
        "standardize": _scaled(standardize, recipe, streams, motion),
        "text_weights": text_weights, "text_layers": text_layers,
    }  # fmt: skip
    if window is not None:
        shape["window"] = window
    settings = _recipe(
        recipe, seen, epochs=epochs, milestones=milestones, batch_size=batch_size, lr=lr, temporal_lr=temporal_lr,
        noise=noise, seed=seed, select=select, checkpoint_every=checkpoint_every, precision=precision,
    )  # fmt: skip
    held, where = _held_out(held_out, held_out_list, select), _device(device)
    model: AVadCLIP | AVadCLIPStudent
    with distributed.joined(where):
        with distributed.main_first():  # rank 0 downloads the text weights
            if student:
                model = AVadCLIPStudent(list(codes.values()), modality=modality, **shape)
            else:
                model = AVadCLIP(list(codes.values()), fusion=fusion, **shape)
        train_on_list(
            model, settings, list_, output, codes, root=root, **held, test_list=test_list, gt=gt,
            frames_per_snippet=frames, device=where, progress=not quiet, profile=profile, graph=graph, resume=resume,
        )  # fmt: skip
        if distributed.is_main():
            typer.echo(report.finished(output))


@app.command()
def distill(
    list_: List_,
    teacher: Annotated[Path, Option(help="The teacher: a run, a model folder, or an official .pth.")],
    output: Output,
    distill_weight: Annotated[
        float | None,
        Option(
            min=0.0,
            help=f"Weight of the distillation loss; default: the preset's; robust {ROBUST['distill_weight']:g}.",
            show_default=False,
        ),
    ] = None,
    modality: Annotated[Modality, Option(help="The student's stream.")] = Modality.visual,
    preset: PresetName = "xd-violence",
    classes: Classes = None,
    root: Root = None,
    recipe: RecipeOf = "official",
    epochs: Epochs = None,
    milestones: Milestones = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    temporal_lr: TemporalRate = None,
    noise: Noise = None,
    seed: Seed = 234,
    window: Window = None,
    padding: PaddingMode = "masked",
    prompt: PromptMode = "official",
    standardize: Standard = None,
    select: SelectBy = "val",
    held_out: HeldOut = None,
    held_out_list: HeldOutList = None,
    test_list: TestList = None,
    gt: TestTruth = None,
    frames_per_snippet: FramesPer = None,
    checkpoint_every: CheckpointEvery = None,
    precision: PrecisionOf = "fp32",
    deterministic: Exact = False,
    device: Device = "auto",
    profile: Profile = None,
    graph: Graph = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Distil a student, which needs only one stream, from a teacher. The student uses the teacher's text weights.

    On several GPUs: torchrun --nproc-per-node 4 -m avadclip_fast distill ..., where --batch-size is the total.
    """
    codes, frames, weight = _preset(preset, classes, frames_per_snippet)
    _check_frames(frames_per_snippet, gt)
    known = load_model(teacher, list(codes.values()))
    if not isinstance(known, AVadCLIP):
        raise CheckpointError(f"{teacher} holds a student; --teacher wants an AVadCLIP teacher")
    _same_classes(known, codes, teacher)
    _seed(seed, deterministic)
    scaled = _scaled(standardize, recipe, [modality])
    shape: dict[str, Any] = {"padding": padding, "prompt": prompt, "standardize": scaled}
    if window is not None:
        shape["window"] = window
    model = AVadCLIPStudent.beside(known, modality=modality, **shape)
    if distill_weight is None and recipe == "official":
        distill_weight = weight
    settings = _recipe(
        recipe, modality == Modality.visual, epochs=epochs, milestones=milestones, batch_size=batch_size, lr=lr,
        temporal_lr=temporal_lr, noise=noise, seed=seed, select=select, checkpoint_every=checkpoint_every,
        precision=precision, distill_weight=distill_weight,
    )  # fmt: skip
    held, where = _held_out(held_out, held_out_list, select), _device(device)
    with distributed.joined(where):
        train_on_list(
            model, settings, list_, output, codes, teacher=known, root=root, **held, test_list=test_list, gt=gt,
            frames_per_snippet=frames, device=where, progress=not quiet, profile=profile, graph=graph, resume=resume,
        )  # fmt: skip
        if distributed.is_main():
            typer.echo(report.finished(output))


@app.command("eval")
def evaluate_(
    list_: List_,
    model: Annotated[Path, Option("--model", "-m", help="A run, a model folder, or an official .pth.")],
    gt: Annotated[Path, Option(help="Frame ground truth: .npy, or .npz.")],
    segments: Annotated[Path | None, Option(help="Spans, for detection mAP: .json, or the official .npy.")] = None,
    segment_labels: Annotated[Path | None, Option(help="Labels of --segments, if .npy.")] = None,
    silent: Annotated[bool, Option("--silent", help="Withhold the sound from a teacher.")] = False,
    uncalibrated: Annotated[
        bool, Option("--uncalibrated", help="Ignore the model's calibration.json, as for the paper's numbers.")
    ] = False,
    student: Annotated[Path | None, Option(help="For --missing-sound: a student beside the teacher.")] = None,
    missing: Annotated[
        str | None,
        Option(
            "--missing-sound", help="Percentages of videos without sound, such as 0,25,50,100; prints the AP of each."
        ),
    ] = None,
    seed: Annotated[int, Option(**SEEDS, help="Random seed of --missing-sound.")] = 0,
    preset: PresetName = "xd-violence",
    classes: Classes = None,
    root: Root = None,
    frames_per_snippet: FramesPer = None,
    window: OfficialWindow = None,
    json_: Annotated[Path | None, Option("--json", help="Write the numbers here.")] = None,
    plots: Annotated[Path | None, Option(help="Draw score curves into this folder.")] = None,
    plot: Annotated[list[str] | None, Option(help="Videos to draw, by name; default: five, abnormal first.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Score the videos of a list, and print AP, AUC and, with --segments, detection mAP against the ground truth.

    Scores use the temperatures that training fitted on held-out videos, if any (see --uncalibrated).
    With --missing-sound: also print the frame AP of the teacher (--model), of --student, and of the student replacing
    the teacher for videos without sound.
    """
    codes, frames, _ = _preset(preset, classes, frames_per_snippet)
    detector = _load(model, codes, window, beside=student)
    if silent and detector.streams() != ("visual", "audio"):
        raise DataError(f"--silent withholds the sound from a teacher; {model} takes {detector.streams()[0]} only")
    if student is not None and missing is None:
        raise DataError("--student is for --missing-sound; score it alone as --model")
    if plot and plots is None:
        raise DataError("--plot names videos to draw into the folder --plots")
    if segment_labels is not None and segments is None:
        raise DataError("--segment-labels are of --segments: give both")
    if json_ is not None and json_.is_dir():
        raise DataError(f"--json {json_} is a folder; give the name of a file")
    if json_ is not None and json_.resolve() in [p.resolve() for p in (list_, gt, segments, segment_labels) if p]:
        raise DataError(f"--json {json_} is read, and would be replaced by the numbers; give the name of another file")
    truth = data.read_frame_gt(gt)
    spans = None if segments is None else data.read_spans(segments, segment_labels)
    hears = "audio" in detector.streams() and not silent
    rows = data.read_list(list_, root, audio=hears)
    check_truth(gt, truth, list_, rows, detector.width, frames, codes)  # before scoring, to fail early
    if segments is not None and spans is not None:
        check_spans(segments, spans, len(rows), detector.classes, codes)
    known = names_of(rows)
    if unknown := set(plot or ()) - set(known):
        raise DataError(f"--plot: no video is named {min(unknown)}; the first is {known[0]}")
    if missing is not None:
        if not hears or student is None:
            raise DataError("--missing-sound compares a teacher that hears, --model, with a --student: give both")
        check_kinds(truth)
        other, percents = _load(student, codes, window, beside=model), _percents(missing)
        if "audio" in other.streams():
            raise DataError(f"--student {student} hears; where sound is missing, one that sees alone takes over")

    for folder in (None if json_ is None else json_.parent, plots):
        if folder is not None:
            make_folder(folder)

    where = _device(device)

    def fitted(path: Path) -> Calibration:
        return Calibration() if uncalibrated else Calibration.load(path)

    def scored(of, path: Path, silent: bool = silent):
        return score_rows(of, rows, where, audio=hears, silent=silent, calibration=fitted(path), progress=not quiet)

    with distributed.joined(where):
        scores = scored(detector, model)
        if missing is not None and student is not None:
            deaf, others = scored(detector, model, silent=True), scored(other, student)
        if not distributed.is_main():
            return
    calibration = fitted(model)
    result = evaluate(scores, truth, detector.classes, frames, spans, codes)
    result["threshold"] = at_threshold(scores, truth, frames, calibration)
    if missing is not None:
        result["missing_sound"] = missing_sound(scores, deaf, others, truth, detector.classes, frames, percents, seed)
    tables = report.tables(result, calibration)
    try:  # either may fail: a disk is full, or `head` has closed standard output
        if json_ is not None:
            write_json(json_, result)
    finally:
        typer.echo(tables)
    if plots is not None:
        drawn = report.draw(scores, truth, frames, plots, plot)
        for path in drawn:
            typer.echo(f"wrote {printable(str(path))}")
        typer.echo(f"wrote {report.draw_reliability(result['threshold'], plots, drawn)}")


@app.command()
def demo(
    output: Annotated[Path, Option("--output", "-o", help="Folder of the report.")] = Path("runs/demo"),
    device: Device = "auto",
) -> None:
    """Train and evaluate a teacher and students on a small generated set, and write a report with plots."""
    from ..engine.demo import run

    try:
        typer.echo(run(output, _device(device)))
    except Stopped as stop:
        raise Stopped(stop.number, f"remove {output} to run the demo again") from stop


@app.command()
def check(
    list_: List_,
    preset: PresetName = "xd-violence",
    classes: Classes = None,
    root: Root = None,
    audio: Annotated[bool, Option(help="Whether every row must have sound.")] = True,
    gt: Annotated[Path | None, Option(help="Frame ground truth to check against the list.")] = None,
    frames_per_snippet: FramesPer = None,
    width: Annotated[int, Option(min=1, callback=sized, help="Feature width.")] = 512,
    quiet: Quiet = False,
) -> None:
    """Read a list and all its feature files, or a packed file, and report every problem with its file and row."""
    codes, frames, _ = _preset(preset, classes, frames_per_snippet)
    if list_.suffix == PACKED:
        if gt is not None or root is not None:
            raise DataError("--gt and --root are for lists; a packed file is checked against its own checksum")
        try:
            rows, _ = data.packed_rows(list_, codes)
            data.check_packed(list_, audio)
        except DataError as error:
            typer.echo(error)
            raise typer.Exit(1) from error
        _no_problems(list_, rows, codes)
        return
    _check_frames(frames_per_snippet, gt)
    problems = data.check_list(
        list_,
        codes,
        root=root,
        audio=audio,
        width=width,
        frame_gt=gt,
        frames_per_snippet=frames,
        progress=None if quiet else report.bar("checking", "row"),
    )
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    _no_problems(list_, data.read_list(list_, root, audio=audio), codes)


@app.command()
def pack(
    list_: List_,
    output: Annotated[Path, Option("--output", "-o", help=f"The file to write, NAME{PACKED}.", show_default=False)],
    length: Length = 256,
    root: Root = None,
    audio: Annotated[bool, Option(help="Whether to pack the sound too.")] = True,
    motion: Annotated[bool, Option("--motion", help="Pack sight with its motion, for models that take it.")] = False,
    width: Annotated[int, Option(min=1, callback=sized, help="Feature width.")] = 512,
    full: Annotated[bool, Option("--float32", help="Keep float32, in twice the space of float16.")] = False,
    quiet: Quiet = False,
) -> None:
    """Pool the features of a list into one file that train and distill read instead of the list.

    Run the same command again to resume an interrupted one. `check` verifies the checksum of the file.
    """
    if output.suffix != PACKED:
        raise DataError(f"--output {output}: a packed file's name ends in {PACKED}")
    rows = data.read_list(list_, root, audio=audio)
    progress = None if quiet else report.bar("packing", "block")
    dtype = "float32" if full else "float16"
    data.pack(output, rows, length, width, audio, motion, dtype, progress=progress)
    typer.echo(f"wrote {output}: {len(rows)} rows")


@app.command()
def convert(
    source: Annotated[Path, Argument(help="An official .pth, or a folder of this library.")],
    target: Annotated[Path, Argument(help="The other of the two, to write.")],
    preset: PresetName = "xd-violence",
    classes: Classes = None,
    window: OfficialWindow = None,
    image_tower: Annotated[
        Path | None,
        Option(help="CLIP checkpoint whose image tower is added to a .pth, for strict loading by the official code."),
    ] = None,
) -> None:
    """Convert an official checkpoint to a model folder (safetensors + config.json), or back."""
    model_folder(source)  # a file of one leads to the folder, before its target is found wrong
    named = target.suffix in (".pth", ".pt")
    if source.is_dir() and (target.is_dir() or not named):
        raise CheckpointError(f"{target}: a folder is turned into an official checkpoint: a file that ends in .pth")
    if source.is_file() and (target.is_file() or named):
        raise CheckpointError(f"{target}: a .pth is turned into a folder; name a folder, new or to be written to")
    if source.is_file() and model_folder(target) == target / MODEL:
        raise CheckpointError(f"{target} is a run, for whose model this one would be taken; name another folder")
    if image_tower is not None and not source.is_dir():
        raise CheckpointError("--image-tower is added to a .pth; a folder takes none: leave it out")
    model = _load_alone(source, preset, classes, window)
    if source.is_dir():
        model.to_official(target, image_tower)
        typer.echo(f"wrote {target}: weights only; window, padding and calibration are not part of this format")
    else:
        model.save_pretrained(target)
        typer.echo(f"wrote {target}")


@app.command()
def env() -> None:
    """Show versions, devices, and the backend selected for each op, with the reason."""
    typer.echo(report.environment())


def _device(name: str) -> torch.device:
    """Returns the device of that name, for a command that asks for the same memory again and again."""
    device = device_of(name)
    if device.type == "cpu":
        keep_memory()
    return device


def _preset(name: str, classes: str | None, frames: int | None) -> tuple[dict[str, str], int, float]:
    """Returns codes (label code -> class name), frames per snippet, and distillation weight."""
    if name not in data.PRESETS:
        raise DataError(f"no preset {name!r}; there are {', '.join(data.PRESETS)}")
    preset = data.PRESETS[name]
    codes = preset.codes
    if classes is not None:
        pairs = [part.partition("=") for part in classes.split(",")]
        if not all(code.strip() and sign and label.strip() for code, sign, label in pairs):
            wanted = 'CODE=name pairs such as "A=normal,B1=fighting", and no comma in a name'
            raise DataError(f"--classes wants {wanted}; got {classes!r}")
        codes = {code.strip(): label.strip() for code, _, label in pairs}
        if len(pairs) < 2 or not len(codes) == len(set(codes.values())) == len(pairs):
            raise DataError(f"--classes wants two classes or more, normal first, each once; got {classes!r}")
        if unfit := [code for code in codes if code == FILLER or "-" in code]:
            raise DataError(f"--classes: {unfit[0]} cannot be a code, since a label joins codes by -, and 0 is filler")
    return codes, frames or preset.frames_per_snippet, preset.distill_weight


def _check_frames(frames: int | None, gt: Path | None) -> None:
    """Raises DataError on --frames-per-snippet where nothing would use it."""
    if frames is not None and gt is None:
        raise DataError(f"--frames-per-snippet {frames} is of the ground truth --gt, which is not given: leave it out")


def _no_problems(list_: Path, rows: list[Row], codes: dict[str, str]) -> None:
    """Says that a list is valid, after a warning if its videos are all of one kind, which a test list's may be."""
    if warning := data.one_kind((row.label for row in rows), codes):
        typer.echo(f"{list_}: warning: {warning}")
    typer.echo(f"{list_}: no {'other ' if warning else ''}problems")


def _load(path: Path, codes: dict[str, str], window: int | None, beside: Path | None) -> Detector:
    """Loads a model of the classes `codes`. window: of this model, unless only the one `beside` it is a .pth."""
    if path.is_dir() and beside is not None and beside.is_file():
        window = None
    model = load_model(path, list(codes.values()), window)
    _same_classes(model, codes, path)
    return model


def _load_alone(path: Path, preset: str, classes: str | None, window: int | None) -> Detector:
    """Loads a model that no list goes with. preset, classes, window: of an official .pth."""
    names = list(_preset(preset, classes, None)[0].values())
    model = load_model(path, names, window)
    if classes is not None and model.classes != names:
        raise CheckpointError(
            f"{path}: --classes is of an official .pth; this model knows {', '.join(model.classes)}: leave it out"
        )
    return model


def _same_classes(model, codes: dict[str, str], path: Path) -> None:
    if model.classes != list(codes.values()):
        raise CheckpointError(
            f"{path} knows the classes {', '.join(model.classes)}; the list is read with {', '.join(codes.values())}. "
            "Give the --preset or --classes that it was trained with"
        )


def _recipe(name: RecipeName, sees: bool, milestones: str | None, **options) -> Recipe:
    """Returns a recipe by name, overridden by the options that the user gave."""
    defaults = {} if name == "official" else ROBUST if sees else ROBUST_HEARER
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("noise") and not sees:
        raise DataError("--noise is on sight, which a student of the sound does not take")
    if milestones is not None:
        given["milestones"] = _epochs(milestones)
    return Recipe(**{**defaults, **given})


def _scaled(
    standardize: list[Modality] | None, recipe: RecipeName, streams: list[Modality], motion: bool = False
) -> list[str]:
    """Returns the streams that a model standardizes. Raises DataError on a stream that it does not take."""
    if standardize is None:
        standardize = [Modality.audio] if recipe == "robust" and Modality.audio in streams else []
    if motion and Modality.visual not in streams:
        raise DataError("--motion is of sight, which a student of the sound does not take")
    if foreign := [stream for stream in standardize if stream not in streams]:
        raise DataError(f"--standardize {foreign[0]}: the student takes {streams[0]} alone")
    return [*standardize, *([Modality.visual] if motion and Modality.visual not in standardize else [])]


def _held_out(share: float | None, list_: Path | None, select: str) -> dict[str, Any]:
    """Returns what of `train_on_list` names held-out videos. Raises DataError on a share that would be left aside."""
    if share and (list_ is not None or select != "val"):
        instead = f"--select {select} holds no share out" if list_ is None else "--held-out-list holds others out"
        raise DataError(f"--held-out {share:g} is for --select val, and {instead}: leave one of the two out")
    return {"held_out_list": list_} if share is None else {"held_out": share, "held_out_list": list_}


def _epochs(milestones: str) -> tuple[int, ...]:
    try:
        return tuple(int(m) for m in milestones.split(",") if m.strip())
    except ValueError:
        raise DataError(f"--milestones wants epochs such as 3,6; got {milestones!r}") from None


def _percents(text: str) -> list[float]:
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        percents = [math.nan]
    if not all(0 <= percent <= 100 for percent in percents):
        raise DataError(f"--missing-sound wants percents from 0 to 100 such as 0,25,50,100; got {text!r}")
    return percents


def _seed(seed: int, deterministic: bool) -> None:
    """Seeds the random initialization. deterministic: also makes the whole run bitwise reproducible."""
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
