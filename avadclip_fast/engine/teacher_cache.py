"""A frozen teacher's features, computed once per sample and kept for every epoch of a distillation."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, FeatureSet
from ..data.dataset import Progress
from ..data.packed import Field, open_packed, write_packed
from ..models import AVadCLIP
from ..ops._autocast import LOWERING
from ..ops._padding import zero_padding
from ..profiling import span
from . import distributed, residency
from .graph import StepGraph
from .progress import bar
from .state import StateError
from .step import trim

TEACHER_FEATURES = "teacher_features.safetensors"  # in the folder of a run
CACHE_LIMIT = 4 << 30  # bytes; a larger cache goes to a file
CACHE_BLOCK = 96  # samples per teacher forward pass: the paper's batch, so that steps use the same kernels
RECORDED = 8  # such passes, from which on recording one saves time

_log = logging.getLogger("avadclip_fast")


@torch.no_grad()
def teacher_features(teacher: AVadCLIP, batch: Batch, precision: str = "fp32") -> Tensor:
    """Returns the frozen teacher's fused features (B, T, D), each of which depends only on its own sample.

    precision: of products, as in a `Recipe`; with "bf16" a GPU's features are bfloat16
    A masked teacher's output at padded rows also depends on the batch, so it is set to 0; a student whose padding is
    "official" reads it.
    """
    with torch.autocast(batch.visual.device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = teacher.fuse(batch.visual, batch.audio, batch.lengths)
    return features if teacher.padding == "official" else zero_padding(features, batch.lengths)


def kept_features(
    teacher: AVadCLIP, data: FeatureSet, source: FeatureSet, made_by: dict[str, str], folder: Path, device,
    batch_size: int, progress: bool, graph: bool,
) -> tuple[Tensor, str]:  # fmt: skip
    """Returns teacher features (M, T, D), on the GPU, in host memory, or in a file, and a line that says where.

    Each sample is computed once, in the precision of the run. source: the data as placed for reading. made_by:
    fingerprints stored in the file to recognize it. Ranks share the work of each block; rank 0 writes.
    """
    rows, width = data.visual.shape[1], teacher.width
    field, lengths = Field("float32", (rows, width)), data.valid().cpu()
    precision = made_by.get("precision", "fp32")
    # bfloat16 is kept as such but in the file, whose fields are NumPy's.
    dtype = torch.bfloat16 if precision == "bf16" and device.type in LOWERING else torch.float32
    size = len(data) * rows * width * dtype.itemsize
    chosen = residency.decide(size, size > CACHE_LIMIT, (rows, width), device, batch_size)
    kept = len(data) * field.row_bytes if chosen.where == "file" else size
    told = f"teacher features: {residency.told(kept, chosen)}"

    # On a GPU every block has the same shapes, recorded or not, so that the numbers are the same.
    longest, alike = int(lengths.max()), graph or device.type == "cuda"

    def features_of(index: Tensor, longest: int) -> Tensor:
        batch = trim(source.batch(index), teacher, longest=longest)
        return teacher_features(teacher, batch.to(device), precision).to(dtype)

    recorded, pays = None, len(data) >= RECORDED * CACHE_BLOCK
    if graph and pays and distributed.world() == 1 and source.visual.device.type == device.type:
        recorded = StepGraph(partial(features_of, longest=longest))

    def compute(index: Tensor) -> Tensor:
        part = distributed.part(lengths[index])
        known = torch.zeros(len(index), rows, width, dtype=dtype, device=device)
        if part.samples:
            own = index[part.where]
            with span("teacher"):
                if recorded is not None and len(own) == CACHE_BLOCK:
                    own = own.to(device)
                    recorded.record(own)
                    features = recorded(own)
                else:
                    features = features_of(own, longest if alike else int(lengths[index].max()))
            known[part.where, : features.shape[1]] = features
        return distributed.total(known)  # each rank fills its part; the rest is zero

    def shown(blocks):
        return bar(blocks, desc="teacher features", unit="batch", shown=progress)

    everywhere = not distributed.any_of(chosen.where != "gpu")  # all ranks take the same branch
    if everywhere or size <= CACHE_LIMIT:
        cache = torch.zeros(len(data), rows, width, dtype=dtype, device=device if chosen.where == "gpu" else None)
        for index in shown(torch.arange(len(data)).split(CACHE_BLOCK)):
            cache[index[0] : index[-1] + 1] = compute(index)
        return cache, told
    features = _in_file(folder / TEACHER_FEATURES, compute, len(data), field, made_by, shown)
    if chosen.where == "gpu":
        features = features.to(device, dtype)
    elif chosen.where == "memory":
        features = features.to(dtype, copy=True)  # what it was decided for: float32 would take twice the memory
    return features, told


def _in_file(
    path: Path, compute: Callable[[Tensor], Tensor], count: int, field: Field, made_by: dict[str, str], shown: Progress
) -> Tensor:
    """Returns the memory-mapped features of `count` samples in a file, which is written if it is not there yet.

    Rank 0 writes what all ranks `compute`, block by block. Raises StateError if the file was not `made_by` the same.
    """
    there = distributed.agreed(path.exists())
    if there and open_packed(path)[1] != made_by:
        raise StateError(
            f"{path} holds the features of another teacher, precision or data; remove it, and they are made anew"
        )
    if not there and distributed.is_main():
        _log.warning("teacher features of %d samples are kept in %s", count, path)

        def block(start: int, stop: int) -> dict[str, np.ndarray]:
            distributed.agreed(stop)  # tells the others which block: writing resumes in the middle of a partial file
            return {"features": compute(torch.arange(start, stop)).float().cpu().numpy()}

        write_packed(path, {"features": field}, count, block, made_by, block=CACHE_BLOCK, progress=shown)
        distributed.agreed(0)
    elif not there:
        while stop := int(distributed.agreed(0)):
            compute(torch.arange((stop - 1) // CACHE_BLOCK * CACHE_BLOCK, stop))
    return open_packed(path)[0]["features"]
