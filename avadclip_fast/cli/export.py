"""Command export, which writes a model for other runtimes."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from ..engine.calibrate import Calibration
from .commands import Classes, OfficialWindow, PresetName, _load_alone, app, sized


@app.command()
def export(
    model: Annotated[Path, Argument(help="A run, a model folder, or an official .pth.", show_default=False)],
    output: Annotated[Path, Option("--output", "-o", help="NAME.onnx or NAME.pt2.", show_default=False)],
    format_: Annotated[
        Literal["onnx", "torch", "aoti"] | None,
        Option(
            "--format",
            help="onnx; torch, a torch.export archive; aoti, an AOTInductor package, compiled for CPUs such as this "
            "one. Default: by suffix, torch for .pt2.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        int | None,
        Option(min=1, callback=sized, help="Frames per snippet, stored in the file's metadata.", show_default=False),
    ] = None,
    preset: PresetName = "xd-violence",
    classes: Classes = None,
    window: OfficialWindow = None,
) -> None:
    """Export a model, from features to scores, to one file that runs without this library.

    Inputs: visual and audio (teacher) or the student's stream, each [B, T, D], and lengths [B]; outputs: anomaly [B, T]
    and probabilities [B, T, C], calibrated; padding gets 0, but 1 for normal. The file is written only if running it
    reproduces the model's scores.
    """
    from ..engine.export import TOLERANCE, export_model

    loaded = _load_alone(model, preset, classes, window)
    difference = export_model(loaded, output, format_, Calibration.load(model), every)
    typer.echo(
        f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB: on random features its scores are the model's to "
        f"{difference:.1e} ({TOLERANCE:g} is allowed)"
    )
