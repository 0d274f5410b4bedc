"""The live display: one line per ended cell off a terminal, a table that cleans up after itself on one."""

from __future__ import annotations

import io

import pytest

from d2obench.report.display import STATES, LiveDisplay, PlainDisplay, QuietDisplay, display, spell


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds as told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def play(shown: PlainDisplay | LiveDisplay | QuietDisplay, clock: Clock) -> None:
    """A run of four cells, the last of which never starts."""
    shown.start(["a", "b", "c", "d"])
    shown.phase("loading embedded", 1, 2)
    shown.phase("loading embedded", 2, 2)
    shown.cell("a", "running", "round 1/5")
    clock.now = 60.0
    shown.cell("a", "ok", "TPOT 11.80 ms ± 2 %  1,420 MiB now, 1,611 peak")
    shown.cell("a", "ok", "again")
    shown.cell("b", "oom", "out of\nmemory \x1b[31m")
    shown.note("the machine is busy")
    shown.cell("c", "running")
    shown.finish()
    shown.finish()


def test_plain_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainDisplay(stream, clock), clock)
    assert stream.getvalue().splitlines() == [
        "4 cells",
        "loading embedded",
        "[1/4]  a  ok  TPOT 11.80 ms ± 2 %  1,420 MiB now, 1,611 peak  about 3 min left",
        "[2/4]  b  oom  out of memory  [31m  about 60 s left",
        "the machine is busy",
    ]


def test_live_table_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    shown = LiveDisplay(stream, clock)
    play(shown, clock)
    text = stream.getvalue()
    assert "the machine is busy" in text
    assert "1 waiting, 1 running, 1 ok, 1 oom in 60 s" in text
    assert "\x1b[31m" not in text.replace("\x1b[31moom", "")
    assert text.count("\x1b[?25h") >= text.count("\x1b[?25l") > 0  # the cursor is shown again


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_drawn(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = LiveDisplay(Terminal(), Clock())
    shown.start([str(i) for i in range(100)])
    shown.cell("99", "running", "[bold]not markup[/bold]")
    shown.cell("98", state, "text")
    shown.console.print(shown._draw())
    shown.finish()
    assert "[bold]not markup[/bold]" in shown.console.file.getvalue()  # type: ignore[attr-defined]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, clock = Terminal(), Clock()
    play(LiveDisplay(stream, clock), clock)
    assert "\x1b[36m" not in stream.getvalue()
    assert "\x1b[32m" not in stream.getvalue()


def test_the_display_that_fits() -> None:
    assert isinstance(display(stream=io.StringIO()), PlainDisplay)
    assert isinstance(display(stream=Terminal()), LiveDisplay)
    assert isinstance(display(plain=True, stream=Terminal()), PlainDisplay)
    quiet = display(quiet=True)
    assert isinstance(quiet, QuietDisplay)
    play(quiet, Clock())


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (7500, "2 h 05 min")])
def test_time_in_words(seconds: float, words: str) -> None:
    assert spell(seconds) == words
