"""Backend dispatch: a table of op -> backend -> supports(arguments) -> reason or None."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from .. import profiling

ORDER = (
    "cuda",
    "triton",
    "amx",
    "cpp",
    "onednn",
    "reference",
)  # automatic choice: the first that supports the call and does not decline
TABLE: dict[str, dict[str, "Backend"]] = {}

_forced: str | None = os.environ.get("AVADCLIP_FAST_BACKEND") or None
_logged: set[tuple[str, str]] = set()
_log = logging.getLogger("avadclip_fast")


class BackendError(RuntimeError):
    """The requested backend cannot serve the call; the message gives the reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    supports: returns why it cannot serve the given arguments, or None
    declines: returns why the automatic choice should skip it for them, or None
    """

    function: Callable
    supports: Callable[..., str | None]
    declines: Callable[..., str | None]


def _never(*args, **kwargs) -> None:
    return None


def register(
    op: str,
    backend: str,
    function: Callable,
    supports: Callable[..., str | None] = _never,
    declines: Callable[..., str | None] = _never,
):
    """Adds a row to the table. `supports` and `declines` take the op's arguments and must neither launch nor sync.

    If `declines` gives a reason, a call gets this backend only on request, because another one is faster.
    """
    if backend not in ORDER:
        raise ValueError(f"{op}: unknown backend {backend!r}; one of {', '.join(ORDER)}")
    TABLE.setdefault(op, {})[backend] = Backend(function, supports, declines)


def run(op: str, backend: str | None, *args, **kwargs):
    """Calls `op` on the requested backend (argument, `use_backend` or AVADCLIP_FAST_BACKEND), or the first that fits.

    A backend requested by argument must serve the call. One requested by the other two must serve every op that has
    such a backend; the remaining ops choose automatically. Raises BackendError otherwise.
    """
    wanted = backend or _forced
    if backend is None and _forced in ORDER and _forced not in TABLE[op]:
        wanted = None
    if wanted is not None:
        reason = why_not(op, wanted, *args, **kwargs)
        if reason is not None:
            raise BackendError(f"{op}: backend {wanted!r} cannot serve this call: {reason}")
        return ranged(f"{op}:{wanted}", TABLE[op][wanted].function, *args, **kwargs)
    for name in ORDER:
        if name in TABLE[op] and why_not_chosen(op, name, *args, **kwargs) is None:
            if not torch.compiler.is_compiling() and (op, name) not in _logged:
                _logged.add((op, name))
                _log.info("%s is served by %s", op, name)
            return ranged(f"{op}:{name}", TABLE[op][name].function, *args, **kwargs)
    raise BackendError(f"{op}: no backend can serve this call")


def ranged(name: str, function: Callable, *args, **kwargs):
    """Calls a function; if profiling is on, in a range of that name, with another for the backward pass."""
    if not profiling.enabled or torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with profiling.span(name):
        out = function(*args, **kwargs)
    profiling.span_backward(f"{name}:backward", out)
    return out


def transformed() -> bool:
    """Whether torch.func (grad, jvp, vmap ...) or forward-mode AD is active, which our operators do not support."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether torch.export is tracing; torch.compiler.is_exporting says so of torch.compile too, in torch 2.11."""
    return torch.compiler._is_exporting_flag


def why_not(op: str, backend: str, *args, **kwargs) -> str | None:
    """Returns why `backend` cannot serve `op` with these arguments, or None."""
    if backend not in ORDER:
        return f"unknown backend; one of {', '.join(ORDER)}"
    if backend not in TABLE[op]:
        return f"not implemented for this op, which has: {', '.join(TABLE[op])}"
    if backend != "reference" and transformed():
        return "torch.func and forward-mode AD go by the reference"
    return TABLE[op][backend].supports(*args, **kwargs)


def why_not_chosen(op: str, backend: str, *args, **kwargs) -> str | None:
    """Returns why the automatic choice skips `backend` for these arguments, or None."""
    return why_not(op, backend, *args, **kwargs) or TABLE[op][backend].declines(*args, **kwargs)


def forced() -> str | None:
    """The backend that `use_backend` or AVADCLIP_FAST_BACKEND forces. Raises BackendError on an unknown name."""
    if _forced is not None and _forced not in ORDER:
        raise BackendError(f"AVADCLIP_FAST_BACKEND={_forced}: unknown backend; one of {', '.join(ORDER)}")
    return _forced


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces one backend inside the block for every op that has it (None: automatic choice for all).

    It applies to the whole process, all threads included; blocks in two threads must not overlap.
    Raises ValueError on an unknown name. In the block, a call that the backend cannot serve raises BackendError.
    """
    global _forced
    if backend is not None and backend not in ORDER:
        raise ValueError(f"unknown backend {backend!r}; one of {', '.join(ORDER)}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
