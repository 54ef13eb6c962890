"""The compiled extensions, `_C` (CPU operators) and `_C_cuda` (CUDA operators), and their build facts.

A missing extension is not an error: the dispatch reports why its backend is unavailable. An extension that exists but
fails to load raises ImportError on import.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(name: str, needs: str) -> str | None:
    """Loads a shared object; returns None, or the reason if it is missing. Raises ImportError if loading fails."""
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
    """Build facts: compiler, flags, torch (version of the headers), nvcc and cuda_archs; empty if nothing was built."""
    if importlib.util.find_spec("avadclip_fast._build_facts") is None:
        return {} if CPP_MISSING else {"built": "without a record of compiler and flags: Python.h was missing"}
    built = importlib.import_module("avadclip_fast._build_facts")
    return {name: getattr(built, name) for name in ("compiler", "flags", "torch", "nvcc", "cuda_archs")}


CPP_MISSING = _load("_C", "a C++ compiler")
# _C_cuda needs symbols that a torch without CUDA lacks. Loading it does not access any GPU.
CUDA_MISSING = _load("_C_cuda", "nvcc of torch's CUDA") if torch.version.cuda else "this torch is built without CUDA"


def cpp_reason(*tensors: torch.Tensor) -> str | None:
    """Returns why the C++ operators cannot take these tensors, or None."""
    if CPP_MISSING:
        return CPP_MISSING
    return _wrong("cpu", (torch.float32, torch.float64, torch.bfloat16), tensors)


def cuda_reason(*tensors: torch.Tensor) -> str | None:
    """Returns why the CUDA operators cannot take these tensors, or None."""
    if CUDA_MISSING:
        return CUDA_MISSING
    wrong = _wrong("cuda", (torch.float32, torch.bfloat16, torch.float16), tensors)
    return wrong or not_built_for(tensors[0].device)


def once_a_device(function: Callable[[torch.device], str | None]) -> Callable[[torch.device], str | None]:
    """Caches the answers. torch.compile takes them for constants, and does not look inside."""
    cached = functools.cache(function)

    def answer(device: torch.device) -> str | None:
        return cached(device)

    # All that torch.compiler.assume_constant_result does, which also imports torch.compile.
    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


@once_a_device
def not_built_for(device: torch.device) -> str | None:
    """Returns why the CUDA operators cannot run on this GPU, or None."""
    archs, capability = facts().get("cuda_archs"), torch.cuda.get_device_capability(device)
    if archs is None or any(runs_on(arch, capability) for arch in re.split(r"[;\s,]+", archs.strip())):
        return None
    found = ".".join(map(str, capability))
    return f"{device} has compute capability {found}, and the CUDA operators are built for {archs}"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for arch, such as "8.0" or "10.0+PTX", runs on a GPU: on later minor versions, with PTX on all."""
    number = arch.removesuffix("+PTX")
    built = tuple(int(part.rstrip("af")) for part in number.split("."))
    if number.endswith("a"):  # for this very chip
        return built == capability
    return built <= capability and (built[0] == capability[0] or arch.endswith("+PTX"))


def _wrong(device: str, dtypes: tuple[torch.dtype, ...], tensors: tuple[torch.Tensor, ...]) -> str | None:
    for x in tensors:
        if x.device.type != device:
            return f"it runs on {device}, and a tensor is on {x.device}"
        if x.dtype not in dtypes:
            return f"it takes {', '.join(str(d) for d in dtypes)}, not {x.dtype}"
        if x.dtype != tensors[0].dtype:
            return f"it takes one dtype, not {tensors[0].dtype} and {x.dtype}"
    return None
