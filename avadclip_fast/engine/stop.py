"""Graceful shutdown: a run that receives SIGTERM or Ctrl-C saves its state before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(Exception):
    """Signal `number` ended the run, after its progress was saved. left: what was saved and how to continue."""

    def __init__(self, number: int, left: str = "the state is saved, and --resume goes on from there"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {left}")
        self.number = number


class Request:
    """The signal that asked the run to end, or None."""

    number: int | None = None


@contextlib.contextmanager
def listening() -> Iterator[Request]:
    """Records SIGTERM and SIGINT inside the block instead of handling them. A second SIGINT takes effect at once.

    A second SIGTERM does not: when a job manager signals all processes, those of torchrun receive it twice.

    Does nothing outside the main thread, where Python receives no signals.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        request.number = number
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
