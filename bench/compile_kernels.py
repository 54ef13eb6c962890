"""Compiles the Triton kernels of training steps in parallel, into Triton's cache.

    python -m bench.compile_kernels

A step that runs first compiles its kernels one by one, which takes minutes; a benchmark has less. Needs a GPU.
"""

import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor

import torch

DTYPES = (torch.bfloat16, torch.float32)
PROCESSES = 12  # at most; each takes a few hundred MB of the GPU


def compile_call(dtype: torch.dtype, name: str, device: str = "cuda") -> str | None:
    """Runs one of bench.triton_calls, forward and backward. Returns the traceback of an error, or None."""
    from .triton_calls import calls

    try:
        for other, run in calls(dtype, device):
            if other == name:
                run()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return f"{name}, {dtype}: {traceback.format_exc()}"
    return None


def main() -> None:
    from .triton_calls import calls

    work = [(dtype, name) for dtype in DTYPES for name, _ in calls(dtype, "meta")]
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        failed = [told for told in pool.map(compile_call, *zip(*work, strict=True)) if told]
    print(f"{len(work) - len(failed)} of {len(work)} calls were compiled", *failed, sep="\n", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
