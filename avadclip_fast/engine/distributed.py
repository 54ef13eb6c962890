"""The processes of one run, started by torchrun: who each is, what it takes of a batch, what they agree on.

Alone a process is rank 0 of 1, and nothing here communicates.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

# Of a process that hangs, or a machine without power. One that dies closes its connections, which gloo tells the others
# at once, and torchrun ends the rest. Longer than what rank 0 does alone: writing and checking files, calibration.
TIMEOUT = timedelta(minutes=10)


class PeerLost(ConnectionError):
    """Another process of the run has ended, or no longer answers."""


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if _several() else 0


def world() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside the block the processes that torchrun started are one run, by NCCL on GPUs, else by gloo.

    Nothing happens where there is but one. Raises PeerLost where another does not come.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or _several():
        yield
        return
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    with _answered():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    yield
    # Not after an error: others may wait for this process, which its end alone tells them.
    dist.destroy_process_group()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block, then the others: for what one leaves to all, such as a download."""
    if not is_main():
        agreed(0)
    yield
    if is_main():
        agreed(0)


class Part(NamedTuple):
    """What one process takes of a batch; all of it by default."""

    where: slice = slice(None)  # its samples
    samples: float = 1.0  # their share of the batch's samples, for means over samples: sums to 1 over the processes
    rows: float = 1.0  # their share of the batch's valid rows, for means over rows


WHOLE = Part()


def part(lengths: Tensor) -> Part:
    """This process's part of a batch, by the valid rows (n,) of its samples, on the host.

    Where a batch has fewer samples than the run has processes, one that would have none takes the first at weight 0: it
    has the same parameters' gradients to add as the others, all zero.
    """
    if world() == 1:
        return WHOLE
    n = len(lengths)
    start, stop = (n * r // world() for r in (rank(), rank() + 1))
    if start == stop:
        return Part(slice(0, 1), 0.0, 0.0)
    return Part(slice(start, stop), (stop - start) / n, int(lengths[start:stop].sum()) / int(lengths.sum()))


def add_up(parameters: Iterable[nn.Parameter], losses: dict[str, Tensor], ask: bool) -> Tensor:
    """Sums gradients and losses over the processes, in place, and returns how many of them ask to stop, on the device.

    One all-reduce of one flat buffer, not DistributedDataParallel: the weights of uneven parts are in the losses, so
    that a sum is wanted, not its average; a student that is not distilled has parameters without gradients, which DDP
    would have to look for in every graph; losses and the question ride along; and one launch of one size is what a
    CUDA graph captures. What DDP gains, sending while the backward pass goes on, is little: 17 million numbers a step.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    scalars = [loss.detach().float() for loss in losses.values()]
    flat = torch.cat([*(g.reshape(-1) for g in grads), torch.stack(scalars), grads[0].new_full((1,), float(ask))])
    with _answered():
        dist.all_reduce(flat)
    *summed, asked = flat.split([g.numel() for g in grads] + [1] * (len(scalars) + 1))
    own, means = summed[: len(grads)], summed[len(grads) :]
    torch._foreach_copy_(grads, [x.view_as(g) for x, g in zip(own, grads, strict=True)])
    for name, value in zip(losses, means, strict=True):
        losses[name] = value.view(())
    return asked.view(())


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes, on the device that it is on."""
    if world() == 1:
        return x
    sent = x.to(_wire(), copy=True)
    with _answered():
        dist.all_reduce(sent)
    return sent.to(x.device)


def agreed(value: float) -> float:
    """Rank 0's value."""
    return total(torch.tensor(value if is_main() else 0.0, dtype=torch.float64)).item()


def any_of(flag: bool) -> bool:
    """Whether it is so for one process at least."""
    return total(torch.tensor(float(flag))).item() > 0


def share_weights(model: nn.Module) -> None:
    """Gives every process rank 0's parameters and statistics."""
    if world() > 1:
        with _answered():
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)


def _wire() -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo has no error of its own
        reason = str(error).splitlines()[0].rpartition(".cc:")[2].partition("] ")[2] or str(error).splitlines()[0]
        raise PeerLost(
            f"process {os.environ.get('RANK', '?')} lost another one of the run, whose own message says why; "
            f"what was saved stays, and --resume goes on from there ({reason.partition('. ')[0]})"
        ) from error
