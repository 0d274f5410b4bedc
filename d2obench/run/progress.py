"""The display of a run as the runner sees it, and the words that it is given.

:class:`Display` is the protocol; ``d2obench.cli.display`` draws it. The figures of a running cell come from the rounds
that are on the disk already, and the memory of the worker from the system. The worker itself is never asked, so that
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
from d2obench.measure.samples import RequestTrace
from d2obench.metric import METRICS, show
from d2obench.record import CellRecord
from d2obench.run.worker_client import WorkerClient
from d2obench.suite.definition import Timing

MIB = 2**20


class Display(Protocol):
    """What shows how a run goes on. Texts are short: ``round 3/5  TPOT 11.8 ms ± 2 %  1,420 MiB now, 1,611 peak``."""

    def start(self, cells: Sequence[str]) -> None:
        """The run begins with these cell ids, in order."""

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """A cell is ``running``, with a ``share`` of its work done, or has ended with a status. An unknown id is
        added."""

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on now, such as ``loading embedded``; of ``total`` parts ``done`` are done."""

    def note(self, text: str) -> None:
        """A line that stays: a warning, a disturbance, a file that was written."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How many seconds each cell that has no row yet will take; told again whenever more is known."""

    def finish(self) -> None:
        """The run is over or was stopped; the terminal is left as it was. May be called twice."""


ENDED_FIGURES = (
    "tpot_s", "decode_tok_s", "speedup", "nvml_used_bytes", "rss_peak_bytes", "kl", "top1", "score", "gold_bpb",
)  # fmt: skip
"""Metrics that the display shows of a cell that has ended."""


def headline(record: CellRecord) -> str:
    """The few figures of a row that the display has room for.

    A ratio is shown only with its 95 % interval, as in ``decode, equal batch 1.166 × full (95 % interval 1.120 …
    1.210)``, because without one nobody can tell whether the policy is faster at all; and not on a busy machine, where
    the report gives no verdict on speed either.
    """
    words = []
    for key in ENDED_FIGURES:
        figure = record.values.get(key)
        if figure is None or figure.value is None:
            continue
        text = f"{METRICS[key].header} {show(key, figure.value, unit=True)}"
        if METRICS[key].kind == "ratio":
            if figure.kind != "interval" or record.details.get("busy"):
                continue
            text += f" (95 % interval {show(key, figure.lo)} … {show(key, figure.hi)})"
        words.append(text)
    return "  ".join(words)


def so_far(raw: Sequence[Mapping[str, Any]], timing: Timing, number: int) -> tuple[str, float]:
    """What the display shows of a cell whose next request begins.

    Args:
        raw: rounds of the cell so far, as ``samples/<hash>.json`` holds them.
        timing: how many rounds there may be.
        number: the round that begins, from 0.

    Returns:
        ``round 3/5  TPOT 11.82 ms ± 2 %  421 MiB now, 455 peak``, and the share of the cell's work that is done.
    """
    from d2obench.measure.summarise import narrowness, tpot  # loads scipy, which --dry-run can do without

    text = f"round {number + 1}/{timing.max_rounds}"
    rounds = msgspec.convert(raw, list[RequestTrace])
    if not rounds:
        return text, _share(0, timing.max_rounds, timing)
    width = narrowness(rounds)
    width_text = f" ± {width:.0%}".replace("%", " %") if math.isfinite(width) else ""
    step = f"TPOT {show('tpot_s', tpot(rounds).value, unit=True)}{width_text}"
    parts = [text, step, memory(rounds), clock(rounds[-1])]
    likely = timing.rounds if width <= timing.interval else timing.max_rounds
    return "  ".join(filter(None, parts)), _share(len(rounds), likely, timing)


def memory(rounds: Sequence[RequestTrace]) -> str:
    """``421 MiB now, 455 peak``: memory at the end of the last request and the highest of all requests, of the GPU
    where there is one, otherwise of the process."""
    last = rounds[-1]
    for key, rows, columns in (
        ("nvml_used_bytes", last.device_timeline, last.device_columns),
        ("rss_bytes", last.timeline, last.timeline_columns),
    ):
        now = _newest(rows, columns, key.removeprefix("nvml_"))
        peaks = [phase[key] for request in rounds for phase in request.peaks.values() if key in phase]
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
    """Memory of the worker process now and its highest value so far, as the system reports them to this process."""

    def __init__(self, client: WorkerClient) -> None:
        self._client, self._pid, self._peak = client, 0, 0

    def __call__(self) -> str:
        """``worker 421 MiB now, 455 peak``; an empty text while no worker runs."""
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
    """Share of a cell's requests that are over; those that warm it up and count its operations are requests too."""
    before = 1 + timing.warmup
    return min(0.95, (before + done) / (before + likely))


def _newest(rows: Sequence[Sequence[float | None]], columns: Sequence[str], column: str) -> float | None:
    place = columns.index(column) + 1 if column in columns else 0
    return next((row[place] for row in reversed(rows) if row[place] is not None), None) if place else None


class LockedDisplay:
    """Lets several threads use one display: calls are passed on one at a time."""

    def __init__(self, display: Display) -> None:
        self._display, self._lock = display, threading.Lock()

    def start(self, cells: Sequence[str]) -> None:
        """See :class:`Display`."""
        with self._lock:
            self._display.start(cells)

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """See :class:`Display`."""
        with self._lock:
            self._display.cell(cell, state, text, share)

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """See :class:`Display`."""
        with self._lock:
            self._display.phase(text, done, total)

    def note(self, text: str) -> None:
        """See :class:`Display`."""
        with self._lock:
            self._display.note(text)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """See :class:`Display`."""
        with self._lock:
            self._display.expect(seconds)

    def finish(self) -> None:
        """See :class:`Display`."""
        with self._lock:
            self._display.finish()
