"""Commands for kernel developers."""

from importlib.util import find_spec
from typing import Annotated, Literal

import torch
import typer
from typer import Option

from ..data.errors import DataError
from ..ops import BackendError
from ..ops._triton import triton_reason
from .commands import app


@app.command()
def tune(
    precision: Annotated[Literal["bf16", "fp16", "tf32", "fp32"], Option(help="Precision of products.")] = "bf16",
    only: Annotated[str, Option(help="Only calls with this in their name, such as mlp.")] = "",
) -> None:
    """Find the fastest tiles of the matrix kernels on this GPU, and save them in the installed table.

    A GPU without a table uses safe defaults until this command has been run once.
    """
    if not torch.cuda.is_available() or find_spec("triton") is None:
        raise BackendError("tune: needs a GPU and Triton, and one of them is not here")
    if reason := triton_reason(torch.empty(0, device="cuda")):
        raise BackendError(f"tune: Triton cannot serve this GPU: {reason}")
    from ..engine.step import float32_products
    from ..engine.tune import gemms, tune  # imports Triton

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    known = [name for name, _ in gemms(dtype, "meta")]
    if not any(only in name for name in known):
        raise DataError(f"--only: no call has {only!r} in its name; there are {', '.join(known)}")
    with float32_products(precision, torch.device("cuda")):
        tune(dtype, only, typer.echo)
