"""Gives the operators of an emulated GPU (runtime.cpp) their values: each runs on the CPU, in the same memory.

Python imports this at its start wherever PYTHONPATH leads here, so in the processes that a test starts, too. Triton is
hidden, since its kernels would do nothing. A graph replays by running again what ran in its capture.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import partial

sys.modules["triton"] = None  # type: ignore[assignment]  # not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

HOST, DEVICE = torch.device("cpu"), "cuda"
# What makes or describes tensors, or reads one number, works as it is.
AS_THEY_ARE = ("empty", "resize", "set_", "is_", "_local_scalar_dense", "record_stream", "_pin_memory")
NEITHER = ("cudnn", "_cudnn", "miopen", "_sparse", "_cslt", "_nested", "_thnn_fused", "_use_cudnn")
WAIT = ("nonzero", "masked_select", "_unique", "unique_", "equal", "repeat_interleave")  # results of unknown size
libraries = []  # they unregister when they are gone

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_flash_sdp(False)
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)


class Recording:
    """A capture: what is to be run again, and what memory held before, since a capture runs nothing."""

    now: "Recording | None" = None

    def __init__(self) -> None:
        self.again: list[Callable[[], None]] = []
        self.before: dict[int, bytes] = {}

    def keep(self, x: Tensor) -> None:
        start, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        if len(self.before.get(start, b"")) < size:
            self.before[start] = ctypes.string_at(start, size)

    def restore(self) -> None:
        for start, content in self.before.items():
            ctypes.memmove(start, content, len(content))


def recording() -> Recording | None:
    return Recording.now if torch.cuda.is_current_stream_capturing() else None


def on_host(x: object) -> object:
    """A value as the CPU takes it: a tensor in the same memory, torch's own generator."""
    if isinstance(x, list | tuple):
        return type(x)(map(on_host, x))
    if isinstance(x, torch.device):
        return HOST
    if isinstance(x, torch.Generator):
        return None
    if not isinstance(x, Tensor) or not x.is_cuda:
        return x
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    same = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(same, x.storage_offset(), x.size(), x.stride())


def tensors(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for one in x:
            yield from tensors(one)


def on_device(x: object) -> object:
    if isinstance(x, list | tuple):
        return type(x)(map(on_device, x))
    if not isinstance(x, Tensor):
        return x
    made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=DEVICE)
    on_host(made).copy_(x)
    return made


def check_waits(name: str, args: tuple, named: dict) -> None:
    """Raises RuntimeError where the host would wait for the GPU, and must not: in captures, and if torch is told so."""
    waits = name.startswith(WAIT)
    if name == "copy_" and args[0].device != args[1].device:
        later = named.get("non_blocking", args[2] if len(args) > 2 else False)
        host = args[1] if args[0].is_cuda else args[0]
        waits = not later or (recording() is not None and not host.is_pinned())
    if waits and (recording() is not None or torch.cuda.get_sync_debug_mode() == 2):
        raise RuntimeError(f"emulated GPU: {name} makes the host wait")


def emulated(op: torch._ops.OpOverload, first: Callable | None = None) -> Callable:
    """A kernel of a GPU's operator, which computes on the CPU. first: called before, with the arguments."""
    arguments = op._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    takes = [i for i, a in enumerate(arguments) if str(a.type) == "Tensor"]

    def run(*args, **named) -> object:
        # Numbers in the place of tensors are of another overload.
        other = any(i < len(args) and isinstance(args[i], int | float) for i in takes)
        return (op.overloadpacket if other else op)(*args, **named)

    def kernel(*args, **named) -> object:
        check_waits(op.overloadpacket.__name__, args, named)
        if first is not None:
            first(*args, **named)
        given = {**{a.name: x for a, x in zip(arguments, args, strict=False)}, **named}
        outputs = [given.get(arguments[i].name) for i in written]
        current = recording()
        for x in tensors(outputs) if current is not None else ():
            current.keep(x)
        theirs = on_host(args), {name: on_host(x) for name, x in named.items()}
        result = run(*theirs[0], **theirs[1])
        if not written:
            made = on_device(result)
            if current is not None:
                memory = [on_host(x) for x in tensors(made)]  # now: later, a result may become another view of it
                current.again.append(lambda: copy(run(*theirs[0], **theirs[1]), memory))
            return made
        for i, x in zip(written, outputs, strict=True):  # an output without a size has got one
            found = theirs[1].get(arguments[i].name) if i >= len(args) else theirs[0][i]
            if isinstance(x, Tensor) and found.size() != x.size():
                x.resize_(found.size())
                on_host(x).copy_(found)
                theirs = on_host(args), {name: on_host(y) for name, y in named.items()}
        if current is not None:
            current.again.append(lambda: run(*theirs[0], **theirs[1]))
        returned = [x for x in outputs if x is not None][: len(op._schema.returns)]
        return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)

    return kernel


def copy(values: object, memory: list[Tensor]) -> None:
    for x, into in zip(tensors(values), memory, strict=True):
        into.copy_(x)


def emulate(namespace: str, checked: bool) -> None:
    """Replaces the GPU's kernels of a namespace. checked: they are launched before, to see whether a GPU takes them."""
    library = torch.library.Library(namespace, "IMPL")
    libraries.append(library)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in torch._C._dispatch_get_all_op_names():
        own, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if own != namespace or base.startswith((*AS_THEY_ARE, *NEITHER)):
            continue
        there = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") or rest == "copy_"
        if not there or not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU"):
            continue
        try:
            op = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
        except AttributeError:  # not for Python
            continue
        if any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
            continue  # a view
        first = partial(torch.library.get_kernel(name, "CUDA").call_boxed, keys) if checked else None
        library.impl(rest, emulated(op, first), "CUDA", allow_override=True)


class Graph(torch.cuda.CUDAGraph):
    def capture_begin(self, *args, **named) -> None:
        super().capture_begin(*args, **named)
        Recording.now = self.recorded = Recording()

    def capture_end(self) -> None:
        Recording.now = None
        super().capture_end()
        self.recorded.restore()

    @torch.no_grad()
    def replay(self) -> None:
        super().replay()
        for call in self.recorded.again:
            call()


torch.cuda.CUDAGraph = torch.cuda.graphs.CUDAGraph = Graph
emulate("aten", checked=False)
# This library's operators, which are there when the first tensor comes to the GPU.
torch.cuda._lazy_call(lambda: emulate("avadclip_fast", checked=True))
