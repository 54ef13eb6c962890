"""Progress bars, for people who look on: on a terminal or in a notebook, not in a log or a pipe."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def bar(*given: Any, shown: bool = True, **options: Any) -> tqdm:
    """Returns tqdm(...), which draws nothing unless `shown`, nor into a log, which a watched camera would fill."""
    seen = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())  # None where it is closed
    return tqdm(*given, disable=not (shown and seen), **options)


def frames_in(shown: tqdm) -> Callable[[int], None]:
    """Returns a function that adds to the frames beside a bar of videos, each of which may take hours."""
    frames, told = 0, time.monotonic()

    def add(decoded: int) -> None:
        nonlocal frames, told
        frames += decoded
        if time.monotonic() - told > 1:
            told = time.monotonic()
            shown.set_postfix(frames=frames)

    return add
