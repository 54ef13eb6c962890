"""Distributed training with torchrun: ranks, the part of a batch that each rank processes, and collectives.

In a single process the rank is 0, the world size is 1, and nothing here communicates.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch

# Its functions take the group of all processes as a default. If an optimizer imported it after `joined`, they would
# hold the group and its threads until the interpreter ends, which can abort the process.
import torch.distributed.nn  # noqa: F401
from torch import Tensor, nn
from torch import distributed as dist

# Detects a rank that hangs or a machine that loses power. A rank that dies closes its connections, which gloo reports
# to the others at once, and torchrun ends the rest. Longer than any work that only rank 0 does, such as calibration.
TIMEOUT = timedelta(minutes=10)


class PeerLost(ConnectionError):
    """Another process of the run has ended or no longer responds."""


def rank() -> int:
    """Returns the rank of this process; 0 in a single-process run."""
    return dist.get_rank() if _several() else 0


def world() -> int:
    """Returns the world size: the number of processes of the run."""
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this is rank 0, the only rank that writes files and prints progress."""
    return rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started into one run inside the block: NCCL on GPUs, gloo otherwise.

    Does nothing if the world size is 1. Raises PeerLost if another process does not join, or cannot be found.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or _several():
        yield
        return
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    try:
        with _answered():
            dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    except ValueError as error:
        raise PeerLost(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and torchrun's other variables do not go with it ({error}); "
            "start the run with torchrun, or unset WORLD_SIZE"
        ) from error
    yield
    # Skipped after an error: other ranks may be waiting for this one, and only its exit unblocks them.
    dist.destroy_process_group()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the other ranks, which can then reuse its files, such as a download."""
    if not is_main():
        agreed(0)
    yield
    if is_main():
        agreed(0)


class Part(NamedTuple):
    """The part of a batch that one rank processes; by default all of it."""

    where: slice = slice(None)  # the samples
    samples: float = 1.0  # their share of the batch's samples; weights means over samples; sums to 1 over the ranks
    rows: float = 1.0  # their share of the batch's valid rows; weights means over rows


WHOLE = Part()


def part(lengths: Tensor) -> Part:
    """Returns this rank's part of a batch of n samples. lengths: (n,) valid rows of each sample, on the host.

    If a batch has fewer samples than there are ranks, a rank without samples takes the first sample with weight 0, so
    that it contributes (zero) gradients of the same parameters to the all-reduce.
    """
    if world() == 1:
        return WHOLE
    n = len(lengths)
    start, stop = (n * r // world() for r in (rank(), rank() + 1))
    if start == stop:
        return Part(slice(0, 1), 0.0, 0.0)
    return Part(slice(start, stop), (stop - start) / n, int(lengths[start:stop].sum()) / int(lengths.sum()))


def flattened(parameters: Iterable[nn.Parameter], losses: Iterable[Tensor]) -> Tensor:
    """Returns the gradients that exist, the losses, and a cleared stop flag as one vector for `add_up`."""
    grads = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
    return torch.cat([*grads, torch.stack([loss.detach().float() for loss in losses]), grads[0].new_zeros(1)])


def add_up(flat: Tensor, ask: bool) -> None:
    """Sums a vector of `flattened` over the ranks, in place. ask: this rank asks to stop; the sum is how many do.

    This is one all-reduce of one flat buffer instead of DistributedDataParallel. The losses already carry the weights
    of uneven parts, so gradients are summed, not averaged. A student that is not distilled has parameters without
    gradients, which DDP would have to find in every graph. The losses and the stop flag share the buffer. The
    all-reduce runs between the two CUDA graphs of a step, which then hold no communication. DDP would gain
    little by overlapping it with the backward pass: a step sends only 17 million numbers.
    """
    if ask:
        flat[-1] = 1.0
    with _answered():
        dist.all_reduce(flat)


def spread(flat: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Makes the gradients in `flat` those of the parameters. Returns what follows them: losses and stop flag."""
    at = 0
    for p in parameters:
        if p.grad is not None:
            p.grad = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
    return flat[at:]


def total(x: Tensor) -> Tensor:
    """Returns the sum of a tensor over the ranks, on the device of `x`."""
    if world() == 1:
        return x
    sent = x.to(_wire(), copy=True)
    with _answered():
        dist.all_reduce(sent)
    return sent.to(x.device)


def agreed(value: float) -> float:
    """Broadcasts rank 0's value to all ranks and returns it."""
    return total(torch.tensor(value if is_main() else 0.0, dtype=torch.float64)).item()


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank."""
    return total(torch.tensor(float(flag))).item() > 0


def share_weights(model: nn.Module) -> None:
    """Broadcasts the parameters and buffers of rank 0 to all ranks."""
    if world() > 1:
        with _answered():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


def _wire() -> torch.device:
    """Returns the device from which the backend sends tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no error type of its own
        reason = str(error).splitlines()[0].rpartition(".cc:")[2].partition("] ")[2] or str(error).splitlines()[0]
        raise PeerLost(
            f"rank {os.environ.get('RANK', '?')} lost another process of the run, whose own message has the cause; "
            f"the last saved state is kept, and --resume continues from it ({reason.partition('. ')[0]})"
        ) from error
