"""Commands for kernel developers."""

from enum import StrEnum
from importlib.util import find_spec
from typing import Annotated

import torch
import typer
from typer import Option

from ..ops import BackendError
from .commands import app


class Number(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@app.command()
def tune(
    dtype: Annotated[Number, Option(help="The numbers to tune for.")] = Number.bfloat16,
    only: Annotated[str, Option(help="Calls with this in their name alone, such as mlp.")] = "",
) -> None:
    """Find the fastest tiles of the matrix kernels on this GPU, and save them in the installed table.

    A GPU without a table uses safe defaults until this command has been run once.
    """
    if not torch.cuda.is_available() or find_spec("triton") is None:
        raise BackendError("tune: needs a GPU and Triton, and one of them is not here")
    from ..engine.tune import tune  # imports Triton

    tune(getattr(torch, dtype.value), only, typer.echo)
