"""The compiled parts: `_C` (operators for the CPU), `_C_cuda` (for CUDA), and how they were built.

An extension that is absent is no error: the dispatch then says why its backend cannot serve. One that is there and
does not load raises, here and at once.
"""

import importlib.util
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(name: str, needs: str) -> str | None:
    """Loads one shared object; returns the reason if it is absent."""
    path = _HERE / f"{name}.so"
    if not path.exists():
        return f"{name} is not built: it needs {needs} at installation, where `pip install -v` says what was found"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"avadclip_fast/{path.name} is there but does not load: {error.__cause__ or error}. "
            "Install avadclip_fast again, for this torch"
        ) from error
    return None


def facts() -> dict[str, str]:
    """compiler, flags, torch (of the headers), nvcc, cuda_archs; empty where nothing was built."""
    if importlib.util.find_spec("avadclip_fast._build_facts") is None:
        return {} if CPP_MISSING else {"built": "without a record of how: there was no Python.h"}
    built = importlib.import_module("avadclip_fast._build_facts")
    return {name: getattr(built, name) for name in ("compiler", "flags", "torch", "nvcc", "cuda_archs")}


CPP_MISSING = _load("_C", "a C++ compiler")
# A torch without CUDA has none of the symbols that _C_cuda needs. Loading asks no GPU anything.
CUDA_MISSING = _load("_C_cuda", "nvcc of torch's CUDA") if torch.version.cuda else "this torch is built without CUDA"


def cpp_reason(*tensors: torch.Tensor) -> str | None:
    """Why the C++ operators cannot take these tensors, or None."""
    if CPP_MISSING:
        return CPP_MISSING
    return _wrong("cpu", (torch.float32, torch.float64, torch.bfloat16), tensors)


def cuda_reason(*tensors: torch.Tensor) -> str | None:
    """Why the CUDA operators cannot take these tensors, or None."""
    if CUDA_MISSING:
        return CUDA_MISSING
    return _wrong("cuda", (torch.float32, torch.bfloat16, torch.float16), tensors)


def _wrong(device: str, dtypes: tuple[torch.dtype, ...], tensors: tuple[torch.Tensor, ...]) -> str | None:
    for x in tensors:
        if x.device.type != device:
            return f"it runs on {device}, and a tensor is on {x.device}"
        if x.dtype not in dtypes:
            return f"it takes {', '.join(str(d) for d in dtypes)}, not {x.dtype}"
        if x.dtype != tensors[0].dtype:
            return f"it takes one dtype, not {tensors[0].dtype} and {x.dtype}"
    return None
