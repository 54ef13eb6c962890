"""Reading safetensors files."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns all tensors of a file, memory-mapped, and its metadata. Raises as `safe_open` does.

    Reads in a separate thread, which Ctrl-C does not reach: in `get_tensor` it would look like a damaged file.
    """

    def read() -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, file.metadata() or {}

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(read).result()
