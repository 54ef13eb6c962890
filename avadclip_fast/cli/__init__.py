"""The command line: `avadclip-fast COMMAND`. Commands read options and call the library; there is no logic here."""

import sys

INTERRUPTED = 130  # what typer makes of Ctrl-C, and shells of a process that it ended


def main() -> None:
    """Runs a command. A mistake of the user's ends in one line on stderr and exit code 2, never in a stack trace."""
    import logging

    from ..data import DataError
    from ..engine.recipe import RecipeError
    from ..engine.state import StateError
    from ..engine.stop import Stopped
    from ..models import CheckpointError, TextWeightsError
    from ..ops import BackendError
    from . import export, kernels, media, profile  # noqa: F401  add their commands
    from .commands import app

    logging.basicConfig(format="%(message)s")
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
        sys.exit(_fail(error, 2))
    except Stopped as stop:
        sys.exit(_fail(stop, 128 + stop.number))
    except OSError as error:  # a full disk, a folder without permission
        sys.exit(_fail(error, 2))
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        again = "`extract` and `pack` go on when they are called again, `train` and `distill` with --resume"
        sys.exit(_fail(f"interrupted; what was written stays: {again}", INTERRUPTED))


def _fail(what: object, code: int) -> int:
    print(f"error: {what}", file=sys.stderr)
    return code
