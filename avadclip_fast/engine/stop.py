"""Being asked to end: a run that gets SIGTERM or Ctrl-C saves its state first."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(Exception):
    """The run ended because it was asked to, by signal `number`; what it had done is saved. left: what to do next."""

    def __init__(self, number: int, left: str = "the state is saved, and --resume goes on from there"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {left}")
        self.number = number


class Request:
    """Which signal asked the run to end, if one did."""

    number: int | None = None


@contextlib.contextmanager
def listening() -> Iterator[Request]:
    """Inside the block SIGTERM and SIGINT are noted instead of obeyed. A second SIGINT is obeyed at once.

    A second SIGTERM is not: who ends a job by a signal to all its processes reaches those of torchrun twice.

    Outside the main thread, where Python hears no signals, nothing is changed.
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
