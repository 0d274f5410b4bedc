"""The progress of a run, on stderr; results go to stdout.

On a terminal it is a table that rich redraws; elsewhere it is a plain line for each cell that ends. rich itself obeys
``NO_COLOR``. The runner knows only the protocol, :class:`d2obench.run.progress.Display`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from d2obench.suite.grammar import show_duration

if TYPE_CHECKING:
    from d2obench.run.progress import Display

STATES = ("waiting", "running", "ok", "oom", "skipped", "failed", "incomparable")
ENDED = STATES[2:]
STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "ok": "green",
    "oom": "red",
    "skipped": "yellow",
    "failed": "bold red",
}
MAX_SHOWN, MAX_TEXT = 16, 200
PHASES = {
    "download": "fetching the model, once; its digest is checked",
    "dequantise": "unpacking the model's weights, once",
    "load": "loading the model",
}
"""A worker's name for a step of its work → the words for the reader."""


@dataclass
class _Progress:
    """The states of all cells, and the time left, extrapolated from the work done: finished cells and shares of cells.

    Cells that ended without running here, such as those of an earlier part of the run, do not count as work.
    """

    clock: Callable[[], float] = time.monotonic
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    words: str = ""
    begun: float = 0.0
    expected: dict[str, float] = field(default_factory=dict)

    def start(self, cells: Sequence[str]) -> None:
        self.states, self.shares, self.begun = dict.fromkeys(cells, ("waiting", "")), {}, self.clock()

    def cell(self, cell: str, state: str, text: str, share: float) -> None:
        self.states[cell] = (state, text)
        if state == "running":
            self.shares[cell] = max(share, self.shares.get(cell, 0.0))
        elif cell in self.shares:
            self.shares[cell] = 1.0

    def done(self) -> int:
        return sum(state in ENDED for state, _ in self.states.values())

    def left(self) -> str:
        """``about 2 min left``, from the predicted durations if there are any, otherwise from the work done so far."""
        waiting = [cell for cell, (state, _) in self.states.items() if state not in ENDED]
        if any(self.expected.get(cell) for cell in waiting):
            seconds = sum(self.expected.get(cell, 0.0) * (1 - self.shares.get(cell, 0.0)) for cell in waiting)
            return f"about {show_duration(seconds)} left"
        work = sum(self.shares.values())
        total = work + sum(
            1 - self.shares.get(cell, 0.0) for cell, (state, _) in self.states.items() if state not in ENDED
        )
        seconds = (self.clock() - self.begun) * (total / work - 1) if work else 0.0
        return f"about {show_duration(seconds)} left" if seconds > 0 else ""


class PlainDisplay:
    """One line for each cell that ended and for each note, without escape sequences."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._progress, self._last = stream or sys.stderr, _Progress(clock), ""

    def start(self, cells: Sequence[str]) -> None:
        """Prints the number of cells."""
        self._progress.start(cells)
        self._line(f"{len(cells)} cells")

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """Prints a line when the cell ends, once."""
        before = self._progress.states.get(cell, ("", ""))[0]
        self._progress.cell(cell, state, text, share)
        if state in ENDED and before != state:
            place = f"[{self._progress.done()}/{len(self._progress.states)}]"
            self._line("  ".join(word for word in (place, cell, state, text, self._progress.left()) if word))

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Prints a line when a new kind of work begins, that is, when the first word changes."""
        kind = text.split(" ")[0]
        if kind and kind != self._last:
            self._line(PHASES.get(text, text))
        self._last = kind

    def note(self, text: str) -> None:
        """Prints the line."""
        self._line(text)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Prints the time left when it is first known."""
        first = not self._progress.expected
        self._progress.expected = dict(seconds)
        if first and (left := self._progress.left()):
            self._line(left)

    def finish(self) -> None:
        """Does nothing: there is nothing to restore."""

    def _line(self, text: str) -> None:
        print(_clean(text), file=self._stream, flush=True)


class LiveDisplay:
    """A table of the running cells and their neighbours, redrawn four times a second, with a bar and the time left.

    ``vitals`` is called at every drawing and returns a few words about the worker, such as its memory.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        vitals: Callable[[], str] = str,
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=stream or sys.stderr)
        self._progress, self._part, self._vitals = _Progress(clock), (0, 0), vitals
        self._live = Live(console=self.console, refresh_per_second=4, get_renderable=self._draw, transient=True)

    def start(self, cells: Sequence[str]) -> None:
        """Starts drawing."""
        self._progress.start(cells)
        self._live.start()

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """Takes effect at the next drawing."""
        self._progress.cell(cell, state, text, share)

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Shown below the table."""
        self._progress.words, self._part = PHASES.get(text, text), (done or 0, total or 0)

    def note(self, text: str) -> None:
        """Printed above the table, where it remains."""
        from rich.text import Text

        self.console.print(Text(_clean(text)))

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Takes effect at the next drawing."""
        self._progress.expected = dict(seconds)

    def finish(self) -> None:
        """Replaces the table with one line of totals."""
        if self._live.is_started:
            self._live.stop()
            states = [state for state, _ in self._progress.states.values()]
            counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
            self.note(f"{counts or 'no cells'} in {show_duration(self._progress.clock() - self._progress.begun)}")

    def _draw(self):  # type: ignore[no-untyped-def]
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=3)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=4)
        for cell in self._window():
            state, text = self._progress.states[cell]
            table.add_row(Text(_clean(cell)), Text(state, style=STYLES.get(state, "")), Text(_clean(text)))
        done, total = self._progress.done(), max(1, len(self._progress.states))
        part = self._part[0] / self._part[1] if self._part[1] else 0.0
        share = f" ({part:.0%})" if self._part[1] else ""
        words = f"{_clean(self._progress.words)}{share}"
        foot = "  ".join(filter(None, (f"{done}/{total} cells", self._progress.left(), words, _clean(self._vitals()))))
        return Group(table, ProgressBar(total=total, completed=done, width=40), Text(foot, style="dim"))

    def _window(self) -> list[str]:
        """As many cells around the first running one as fit on the terminal."""
        cells = list(self._progress.states)
        size = max(3, min(MAX_SHOWN, self.console.height - 6))
        running = [i for i, cell in enumerate(cells) if self._progress.states[cell][0] == "running"]
        first = running[0] if running else self._progress.done()
        start = max(0, min(first - 2, len(cells) - size))
        return cells[start : start + size]


class QuietDisplay:
    """Shows nothing, for ``--quiet``."""

    def start(self, cells: Sequence[str]) -> None:
        """Does nothing."""

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """Does nothing."""

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


def display(
    *, quiet: bool = False, plain: bool = False, stream: TextIO | None = None, vitals: Callable[[], str] = str
) -> Display:
    """The display to use: none if ``quiet``, a live table on a terminal, otherwise or if ``plain`` lines of text."""
    stream = stream or sys.stderr
    if quiet:
        return QuietDisplay()
    return PlainDisplay(stream) if plain or not stream.isatty() else LiveDisplay(stream, vitals=vitals)


def _clean(text: str) -> str:
    """The text as one printable line of at most MAX_TEXT characters."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
