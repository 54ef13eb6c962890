"""Progress bars: who sees them, and what a bar of long videos tells."""

import io
from itertools import count

import pytest

from avadclip_fast.engine import progress


@pytest.mark.parametrize("terminal, shown, seen", [(True, True, True), (True, False, False), (False, True, False)])
def test_a_bar_of_videos_counts_frames_on_a_terminal_alone(monkeypatch, terminal, shown, seen):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("time.monotonic", count().__next__)  # each look at the clock is a second later
    with progress.bar(total=1, unit="video", shown=shown) as meter:
        add = progress.frames_in(meter)
        for _ in range(4):
            add(100)
    assert ("0/1" in screen.getvalue() and "frames=400" in screen.getvalue()) == seen
    assert seen or not screen.getvalue()


def test_closed_standard_error_shows_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress.bar(range(3))) == [0, 1, 2]
