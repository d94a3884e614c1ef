"""A job writes a line to a log every minute, and shows a bar on a terminal."""

import io

import pytest

from mimi_jax.tokenization import progress
from mimi_jax.tokenization.progress import Progress

RATE = 24_000


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def strftime(self, _: str) -> str:
        return "12:00:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_minute(clock: Clock):
    stream = io.StringIO()
    shown = Progress(1000, RATE, stream)
    for second in range(1, 181):
        clock.now = 1000.0 + second
        shown.coded(100 * RATE)
        if second % 10 == 0:
            shown.clip(25)
    shown.error(25)
    shown.close()
    assert stream.getvalue().splitlines() == [
        "12:00:00 12%: 1.67 h, 100x realtime, 5 clips, 0 errors, 07:00 left",
        "12:00:00 28%: 3.33 h, 100x realtime, 11 clips, 0 errors, 05:16 left",
        "12:00:00 42%: 5.00 h, 100x realtime, 17 clips, 0 errors, 04:03 left",
    ]
    assert (shown.clips, shown.errors, shown.samples) == (18, 1, 18_000 * RATE)


def test_a_long_clip_counts_before_it_ends(clock: Clock):
    stream = io.StringIO()
    shown = Progress(1000, RATE, stream)
    clock.now += 60
    shown.coded(3600 * RATE)
    assert stream.getvalue() == "12:00:00 0%: 1.00 h, 60x realtime, 0 clips, 0 errors, ? left\n"


def test_a_terminal_shows_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    shown = Progress(1000, RATE, stream)
    shown.coded(7200 * RATE)
    shown.shard(3, 1, 0, 500)
    shown.close()
    assert "tokenizing:  50%" in stream.getvalue()
    assert "2.00 h" in stream.getvalue()
    assert "3 clips, 1 errors" in stream.getvalue()
