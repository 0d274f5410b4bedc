"""What the progress display is told while a run goes on.

The figures of a running cell come from the rounds that are on the disk already. The worker is not asked, so that
showing progress disturbs no measurement.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import psutil

from d2obench.measure.nvml import slowdown_names
from d2obench.measure.trace import RequestTrace
from d2obench.metric import show
from d2obench.run.worker_client import WorkerClient
from d2obench.suite.definition import Timing

MIB = 2**20


class Display(Protocol):
    """What shows how a run goes on, such as the displays of ``d2obench.report.display``."""

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """A cell is ``running``, with a share of its work done, or ended with a status."""

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on now, and how far it is."""

    def note(self, text: str) -> None:
        """Something to know about the whole run."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long each cell that has no row yet will take; told again whenever more is known."""


def so_far(cell: str, raw: Sequence[Mapping[str, Any]], timing: Timing, number: int) -> tuple[str, float]:
    """``round 3/5  TPOT 11.82 ms ± 2 %  421 MiB now, 455 peak``, and the share of the cell's work that is done.

    Args:
        cell: the cell's id.
        raw: its rounds.
        timing: how many there may be.
        number: the round that begins, from 0.
    """
    from d2obench.measure.summarise import narrowness, tpot  # brings scipy, which a plan needs not

    text = f"round {number + 1}/{timing.max_rounds}"
    rounds = msgspec.convert(raw, list[RequestTrace])
    if not rounds:
        return text, _share(0, timing.max_rounds, timing)
    width = narrowness(cell, rounds)
    width_text = f" ± {width:.0%}".replace("%", " %") if math.isfinite(width) else ""
    step = f"TPOT {show('tpot_s', tpot(cell, rounds).value, unit=True)}{width_text}"
    parts = [text, step, memory(rounds), clock(rounds[-1])]
    likely = timing.rounds if width <= timing.interval else timing.max_rounds
    return "  ".join(filter(None, parts)), _share(len(rounds), likely, timing)


def memory(rounds: Sequence[RequestTrace]) -> str:
    """Memory at the end of the last request and the highest of all: the GPU's, or else the process's."""
    last = rounds[-1]
    for key, rows, columns in (
        ("nvml_used_bytes", last.device_timeline, last.device_columns),
        ("rss_bytes", last.timeline, last.timeline_columns),
    ):
        now = _newest(rows, columns, key.removeprefix("nvml_"))
        peaks = [phase[key] for one in rounds for phase in one.peaks.values() if key in phase]
        if now is not None and peaks:
            return f"{now / MIB:,.0f} MiB now, {max(peaks) / MIB:,.0f} peak"
    return ""


def clock(last: RequestTrace) -> str:
    """``1,755 MHz, power cap``: the GPU's clock at the end of the last request and what slowed it down in it."""
    newest = _newest(last.device_timeline, last.device_columns, "sm_mhz")
    if newest is None:
        return ""
    slow: list[str] = []
    if "slowdown" in last.device_columns:
        place = last.device_columns.index("slowdown") + 1
        slow = [word for row in last.device_timeline for word in slowdown_names(row[place])]
    return ", ".join([f"{newest:,.0f} MHz", *dict.fromkeys(slow)])


class Vitals:
    """Memory of the worker as the system sees it now, read from this process."""

    def __init__(self, client: WorkerClient) -> None:
        self._client, self._pid, self._peak = client, 0, 0

    def __call__(self) -> str:
        """``worker 421 MiB now, 455 peak``; nothing where none runs."""
        pid = self._client.started
        try:
            now = psutil.Process(pid).memory_info().rss if pid else 0
        except psutil.Error:
            return ""
        if not pid or not now:
            return ""
        self._pid, self._peak = pid, max(now, self._peak if pid == self._pid else 0)
        return f"worker {now / MIB:,.0f} MiB now, {self._peak / MIB:,.0f} peak"


def _share(done: int, likely: int, timing: Timing) -> float:
    """Share of a cell's requests that are over, those that warm it up and count its operations among them."""
    before = 1 + timing.warmup
    return min(0.95, (before + done) / (before + likely))


def _newest(rows: Sequence[Sequence[float | None]], columns: Sequence[str], column: str) -> float | None:
    place = columns.index(column) + 1 if column in columns else 0
    return next((row[place] for row in reversed(rows) if row[place] is not None), None) if place else None


class LockedDisplay:
    """Passes everything on to ``watcher``, which hears one thing at a time."""

    def __init__(self, watcher: Display) -> None:
        self._watcher, self._lock = watcher, threading.Lock()

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """A cell is running or ended."""
        with self._lock:
            self._watcher.cell(cell, state, text, share)

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on now."""
        with self._lock:
            self._watcher.phase(text, done, total)

    def note(self, text: str) -> None:
        """Something to know about the whole run."""
        with self._lock:
            self._watcher.note(text)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long the cells will take."""
        with self._lock:
            self._watcher.expect(seconds)
