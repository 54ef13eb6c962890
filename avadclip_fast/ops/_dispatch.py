"""Which backend serves which op: one table, op -> backend -> supports(arguments) -> reason or None."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .. import profiling

ORDER = ("cuda", "triton", "cpp", "reference")  # the automatic choice: the first that can serve
TABLE: dict[str, dict[str, "Backend"]] = {}

_forced: str | None = os.environ.get("AVADCLIP_FAST_BACKEND") or None
_logged: set[tuple[str, str]] = set()
_log = logging.getLogger("avadclip_fast")


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: the function, and why it cannot serve given arguments (None: it can)."""

    function: Callable
    supports: Callable[..., str | None]


def register(op: str, backend: str, function: Callable, supports: Callable[..., str | None] = lambda *a, **k: None):
    """Adds a row to the table. `supports` takes the op's arguments and must be cheap: no launch, no sync."""
    if backend not in ORDER:
        raise ValueError(f"{op}: unknown backend {backend!r}; one of {', '.join(ORDER)}")
    TABLE.setdefault(op, {})[backend] = Backend(function, supports)


def run(op: str, backend: str | None, *args, **kwargs):
    """Calls `op` by the backend asked for (argument, `use_backend`, AVADCLIP_FAST_BACKEND), or the first that fits.

    What is asked for a call must serve it. What is asked for all calls, by the last two, must serve every op that has
    such a backend at all; the others choose for themselves.
    """
    wanted = backend or _forced
    if backend is None and _forced in ORDER and _forced not in TABLE[op]:
        wanted = None
    if wanted is not None:
        reason = why_not(op, wanted, *args, **kwargs)
        if reason is not None:
            raise BackendError(f"{op}: backend {wanted!r} cannot serve this call: {reason}")
        return _call(op, wanted, args, kwargs)
    for name in ORDER:
        if name in TABLE[op] and TABLE[op][name].supports(*args, **kwargs) is None:
            if not torch.compiler.is_compiling() and (op, name) not in _logged:
                _logged.add((op, name))
                _log.info("%s is served by %s", op, name)
            return _call(op, name, args, kwargs)
    raise BackendError(f"{op}: no backend can serve this call")


def _call(op: str, name: str, args: tuple, kwargs: dict):
    function = TABLE[op][name].function
    if not profiling.enabled or torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with profiling.span(f"{op}:{name}"):
        out = function(*args, **kwargs)
    profiling.span_backward(f"{op}:{name}:backward", out)
    return out


def why_not(op: str, backend: str, *args, **kwargs) -> str | None:
    """The reason why `backend` cannot serve `op` with these arguments, or None."""
    if backend not in ORDER:
        return f"unknown backend; one of {', '.join(ORDER)}"
    if backend not in TABLE[op]:
        return f"not implemented for this op, which has: {', '.join(TABLE[op])}"
    return TABLE[op][backend].supports(*args, **kwargs)


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces one backend for every op that has it inside the block (None: the automatic choice for all)."""
    global _forced
    if backend is not None and backend not in ORDER:
        raise ValueError(f"unknown backend {backend!r}; one of {', '.join(ORDER)}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
