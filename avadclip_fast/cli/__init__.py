"""The command line: `avadclip-fast COMMAND`. Commands parse options and call the library, without further logic."""

import atexit
import io
import os
import signal
import sys
import threading

INTERRUPTED = 130  # exit code of typer on Ctrl-C, and of shells for a process ended by SIGINT
_RESUMES = {  # how commands go on after Ctrl-C
    "extract": ", and the same call goes on from there",
    "pack": ", and the same call goes on from there",
    "train": ", and --resume goes on from there",
    "distill": ", and --resume goes on from there",
}
_TAKES_LESS = {  # what helps where memory is short
    "train": "; a smaller --batch-size or --length takes less",
    "distill": "; a smaller --batch-size takes less",
}


def main() -> None:
    """Runs a command. A user error prints one line on stderr and exits with code 2, without a stack trace."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`: what is told goes nowhere
            setattr(sys, name, open(os.devnull, "w"))
    try:
        code = _run()
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        resumes = "".join(_RESUMES.get(name, "") for name in sys.argv[1:2])
        code = _fail(f"interrupted; what was written stays{resumes}", INTERRUPTED)
    finally:
        # All is done and told: a second Ctrl-C, while Python takes its time to exit, would end in a stack trace.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _run() -> int:
    """Imports and runs the commands: Ctrl-C may come while the imports still take seconds. Returns the exit code."""
    import logging
    import warnings

    from ..data import DataError
    from ..engine.recipe import RecipeError
    from ..engine.state import StateError
    from ..engine.stop import Stopped
    from ..models import CheckpointError, TextWeightsError
    from ..ops import BackendError
    from . import export, kernels, media, profile  # noqa: F401  register commands
    from .commands import app

    logging.basicConfig(format="%(message)s")
    threading.excepthook = _in_thread
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # plots show a box, and files keep the name
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # a .pth that is none: the error says it in a line
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a name ends no call where it has no encoding
    try:
        app()
    except (
        DataError,
        StateError,
        RecipeError,
        CheckpointError,
        TextWeightsError,
        BackendError,
        FloatingPointError,
    ) as error:
        return _fail(error, 2)
    except OSError as error:  # a full disk, a folder without permission
        return _fail(f"{error}{_of_output()}", 2)
    except Stopped as stop:
        return _fail(stop, 128 + stop.number)
    except (MemoryError, RuntimeError) as error:
        if str(error) == "can't start new thread":  # Python has no type of error for it
            return _fail("out of threads: the system starts no more: end others, or raise the limit of processes", 2)
        if (short := _of_memory(error)) is None:
            raise
        smaller = "".join(_TAKES_LESS.get(name, "") for name in sys.argv[1:2])
        return _fail(f"out of memory: {short}{smaller}", 2)
    return 0


def _of_memory(error: Exception) -> str | None:
    """What an error says of memory that is short; None if it is of something else."""
    import torch

    said = str(error)
    # torch has no type of error for a processor's memory
    if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said):
        return None
    said = said.partition(" If reserved")[0].rpartition("DefaultCPUAllocator: ")[2].rstrip(". ")
    return said or "the system gives no more"


def _in_thread(failed: threading.ExceptHookArgs) -> None:
    """Leaves out what TensorBoard's thread raises, such as a full disk: its writer raises it again, to be told."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


def _of_output() -> str:
    """Names standard output if that takes no more, and gives it up: Python would try again as it exits, and tell it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ": standard output"
    return ""


def _fail(what: object, code: int) -> int:
    from ..data.errors import printable

    print("error:", "\n".join(map(printable, str(what).split("\n"))), file=sys.stderr)
    return code
