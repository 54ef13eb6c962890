"""Progress bars: live in a terminal or notebook, a line a minute in a log or pipe."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

A_LINE = 60.0  # seconds, where nobody looks on: more would fill the log of a watched camera


class Log:
    """Standard error as the file of a bar, each of whose drawings ends the line.

    `tqdm.write` takes it for another file than standard error, whose bars it draws again after each line that it tells.
    """

    def __init__(self, file: TextIO):
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, drawn: str) -> None:
        if drawn.strip():  # else it clears a line
            self.file.write(f"{drawn.rstrip()}\n")


def bar(*given: Any, shown: bool = True, **options: Any) -> tqdm:
    """Returns tqdm(...), which draws nothing unless `shown`, and in a log at most a line a minute."""
    closed = sys.stderr is None
    live = "ipykernel" in sys.modules or (not closed and sys.stderr.isatty())
    seldom = {} if live or closed else {"mininterval": A_LINE, "maxinterval": A_LINE, "file": Log(sys.stderr)}
    return tqdm(*given, disable=closed or not shown, **seldom, **options)


def due(shown: tqdm, since: float) -> bool:
    """Whether to update a bar that was last updated at `since` (time.monotonic())."""
    return not shown.disable and time.monotonic() - since > max(1, shown.mininterval)


def frames_in(shown: tqdm) -> Callable[[int], None]:
    """Returns a function that adds to the frame count beside a bar of videos, which may take hours each."""
    frames, told = 0, time.monotonic()

    def add(decoded: int) -> None:
        nonlocal frames, told
        frames += decoded
        if due(shown, told):
            told = time.monotonic()
            shown.set_postfix(frames=frames)

    return add
