"""The live display: one line per ended cell off a terminal, a table that cleans up after itself on one."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from d2obench.cli.display import STATES, LiveDisplay, PlainDisplay, QuietDisplay, display
from d2obench.suite.grammar import show_duration


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
    shown.phase("dequantise", 1, 9)
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
        "unpacking the model's weights, once",
        "[1/4]  a  ok  TPOT 11.80 ms ± 2 %  1,420 MiB now, 1,611 peak  about 3 min left",
        "[2/4]  b  oom  out of memory  [31m  about 2 min left",
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


def left(play: Callable[[PlainDisplay, Clock], None]) -> str:
    """The time left that the last line tells."""
    stream, clock = io.StringIO(), Clock()
    play(PlainDisplay(stream, clock), clock)
    return stream.getvalue().splitlines()[-1].split("  ")[-1]


def test_cells_that_end_together_do_not_make_the_time_left_too_long() -> None:
    def group(shown: PlainDisplay, clock: Clock) -> None:
        shown.start([f"{i}" for i in range(11)])
        for number in range(10):
            for i in range(10):  # ten cells side by side, 10 s a cell
                clock.now += 1.0
                shown.cell(f"{i}", "running", "round", (number + 1) / 10 if number < 9 else 0.95)
        shown.cell("0", "ok")

    assert left(group) == "about 15 s left"  # half a second each of the nine running, and the last cell


def test_cells_of_an_earlier_part_say_nothing_about_the_pace() -> None:
    def resumed(shown: PlainDisplay, clock: Clock) -> None:
        shown.start(["a", "b", "c", "d"])
        shown.cell("a", "ok")
        shown.cell("b", "ok")
        shown.cell("c", "running")
        clock.now = 60.0
        shown.cell("c", "ok")

    assert left(resumed) == "about 60 s left"


def test_the_worker_is_looked_at_at_every_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    told = ["worker 1 MiB now"]
    shown = LiveDisplay(Terminal(), Clock(), lambda: told[-1])
    shown.console.print(shown._draw())
    told.append("worker 2 MiB now\x1b[31m")
    shown.console.print(shown._draw())
    text = shown.console.file.getvalue()  # type: ignore[attr-defined]
    assert "worker 1 MiB now" in text
    assert "worker 2 MiB now [31m" in text


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (7500, "2 h 05 min")])
def test_time_in_words(seconds: float, words: str) -> None:
    assert show_duration(seconds) == words
