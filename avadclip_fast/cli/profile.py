"""Command profile, which runs a case under a profiler."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .commands import Device, PrecisionOf, _device, app, sized


@app.command()
def profile(
    case: Annotated[str, Argument(help="train-teacher, train-student, distil, infer, or an op, such as gated_fusion.")],
    iterations: Annotated[int, Option(min=1, callback=sized, help="Captured iterations.")] = 10,
    warmup: Annotated[int, Option(min=0, callback=sized, help="Warm-up iterations.")] = 3,
    batch: Annotated[
        int | None, Option(min=1, callback=sized, help="Videos of 256 snippets: 96 on a GPU, 4 on a CPU.")
    ] = None,
    precision: PrecisionOf = "fp32",
    trace: Annotated[
        Path | None, Option(help="Write a Chrome trace here, and show what took longest.", show_default=False)
    ] = None,
    device: Device = "auto",
) -> None:
    """Run a training step, inference or an op with profiler ranges, between cudaProfilerStart and cudaProfilerStop.

    Use with `nsys profile --capture-range=cudaProfilerApi` or `ncu --profile-from-start off`. --trace needs neither
    tool, and no GPU.
    """
    from ..engine.profile import run

    typer.echo(run(case, _device(device), precision, batch, warmup, iterations, trace))
    if trace is not None:
        typer.echo(f"wrote {trace}")
