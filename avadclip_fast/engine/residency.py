"""Places a training set in GPU memory, in host memory, or in its file, by what fits, and fetches its batches."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import Batch, FeatureSet

# Room left for a step, in float32 tensors of shape (B, T, D): the teacher saves 108 for its backward pass, the student
# 66, and temporaries and allocator fragmentation take as much again.
STEP_TENSORS = 220
HOST_SHARE = 0.5  # of free host memory for a set; the rest is for page cache, teacher features, and other processes


class Place(NamedTuple):
    """Where to place a set ("gpu", "memory" or "file"), and why."""

    where: str
    why: str


def choose(size: int, mapped: bool, gpu_free: int | None, host_free: int, step: int) -> Place:
    """Chooses where `size` bytes of features go: as close to the model as they fit.

    mapped: they are now in a memory-mapped file, not in host memory. gpu_free: free bytes, None without a GPU.
    host_free: free bytes of host memory for this process. step: bytes of GPU memory that a step needs.
    """
    if gpu_free is None:
        return Place("file", "mapped, and read as needed") if mapped else Place("memory", "no GPU is used")
    if size + step <= gpu_free:
        return Place("gpu", f"{_gb(gpu_free)} are free there, and a step takes {_gb(step)} at most")
    crowded = f"GPU memory has {_gb(gpu_free)} free, of which a step takes up to {_gb(step)}"
    if not mapped or size <= HOST_SHARE * host_free:
        return Place("memory", f"{crowded}; batches are sent ahead")
    return Place("file", f"{crowded}, host memory {_gb(host_free)}; batches are sent ahead")


def place(data: FeatureSet, device: torch.device, batch_size: int) -> tuple[FeatureSet, str]:
    """Moves a set to where it fits best. Returns it and a line that says where it is and why."""
    chosen = decide(data.stream_bytes, data.mapped, data.visual.shape[1:], device, batch_size)
    if chosen.where == "gpu":
        data = data.to(device)
    elif chosen.where == "memory" and data.mapped:
        audio = None if data.audio is None else data.audio.clone()
        data = replace(data, visual=data.visual.clone(), audio=audio, mapped=False)
    return data, f"features: {told(data.stream_bytes, chosen)}"


def decide(size: int, mapped: bool, sample: Sequence[int], device: torch.device, batch_size: int) -> Place:
    """Chooses where to place `size` bytes of samples (T, D), for steps of `batch_size` samples on `device`."""
    rows, width = sample
    gpu_free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this host, set by torchrun
    return choose(size, mapped, gpu_free, free_memory() // processes, STEP_TENSORS * batch_size * rows * width * 4)


def told(size: int, chosen: Place) -> str:
    """Describes a placement: size, place and reason."""
    named = {"gpu": "GPU memory", "memory": "host memory", "file": "their file"}[chosen.where]
    return f"{_gb(size)} in {named} ({chosen.why})"


def free_memory() -> int:
    """Returns the bytes of host memory that a process can allocate without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all of the memory, since macOS does not tell how much of it is free
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/sys/fs/cgroup")  # a container's limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]))  # pages of files, given up where memory is short
    except (OSError, ValueError, KeyError):  # no limit
        return free


def fetched(
    items: Iterable[Tensor],
    fetch: Callable[[Tensor], tuple[Batch, Tensor | None]],
    device: torch.device,
    ahead: bool | None = None,
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yields `fetch(item)` for each item, in order, on the device: a float32 batch, and teacher features or None.

    ahead: whether a thread prefetches the next batch while the current one is used; default: on a GPU, where batches
    are copied asynchronously from pinned memory.
    """
    gpu = device.type == "cuda"

    def pinned(item: Tensor) -> tuple[Batch, Tensor | None]:
        batch, known = fetch(item)
        if gpu and not batch.visual.is_cuda:
            batch = batch.pin_memory()
        if gpu and known is not None and not known.is_cuda:
            known = known.contiguous().pin_memory()
        return batch, known

    def sent(batch: Batch, known: Tensor | None) -> tuple[Batch, Tensor | None]:
        return batch.to(device).float(), None if known is None else known.to(device, non_blocking=True)

    if not (gpu if ahead is None else ahead):
        for item in items:
            yield sent(*pinned(item))
        return
    start = (lambda: torch.cuda.set_device(device)) if device.index is not None else None  # selects this process's GPU
    with ThreadPoolExecutor(1, initializer=start) as thread:
        waiting = None
        for item in items:
            following = thread.submit(pinned, item)
            if waiting is not None:
                yield sent(*waiting.result())
            waiting = following
        if waiting is not None:
            yield sent(*waiting.result())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
