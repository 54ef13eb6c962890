"""Progress bars: who sees them, and what a bar of long videos tells."""

import io
from itertools import count

import pytest
from tqdm import tqdm

from avadclip_fast.engine import progress


@pytest.mark.parametrize("terminal, shown, lines", [(True, True, 6), (True, False, 0), (False, True, 3)])
def test_a_bar_counts_the_frames_of_long_videos(monkeypatch, terminal, shown, lines):
    """At its beginning and its end; between, as it goes on a terminal, and once a minute in a log."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("time.monotonic", count(0, 20).__next__)  # each look at the clock is 20 seconds later
    with progress.bar(total=1, unit="video", shown=shown) as meter:
        add = progress.frames_in(meter)
        for _ in range(4):
            add(100)
    told = screen.getvalue().split("\r")[1:]
    assert len(told) == lines and all("0/1" in line for line in told)
    assert not told or "frames=400" in told[-1]


def test_closed_standard_error_shows_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress.bar(range(3))) == [0, 1, 2]


def test_what_is_told_beside_a_bar_draws_none_in_a_log(monkeypatch):
    """Each event of a watched camera cleared and drew it again, all in one line that never ended."""
    log, out = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr("sys.stdout", out)
    with progress.bar(total=3, unit="video") as meter:
        for i in range(3):
            tqdm.write(f"note: {i}", file=log)
            tqdm.write(f"event {i}")
            meter.update()
    first, *told, last, rest = log.getvalue().split("\n")
    assert told == [f"note: {i}" for i in range(3)] and "0/3" in first and "3/3" in last and not rest
    assert out.getvalue() == "event 0\nevent 1\nevent 2\n"
