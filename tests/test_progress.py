"""Progress bars: who sees them, and what a bar of long videos tells."""

import io
from itertools import count

import pytest

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
