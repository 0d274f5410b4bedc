"""One group of speed cells: the same model, shape, batch and seed, every policy and budget, in interleaved rounds.

Rounds go over the cells forwards and backwards in turn (ABBA), so that a drift of the machine falls on all of them
alike and cancels in the ratios of one round. In every worker process a cell is warmed up before it is measured there,
until its decode steps no longer change. Each request is on the disk before the next one starts, so a run that goes on
measures nothing twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.measure.summarise import tpot
from d2obench.measure.trace import RequestTrace
from d2obench.record import Value
from d2obench.run.plan import abba
from d2obench.run.progress import so_far
from d2obench.run.run_log import RunLog, Samples
from d2obench.run.search import find_batch
from d2obench.run.speed_row import DeviceRates, SpeedRows
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import Suite, Timing
from d2obench.tasks.base import Cell


class SpeedGroup:
    """Measures the cells of one group and ends each as a row.

    Args:
        suite: its table ``timing`` says how often.
        cells: the group.
        worker_of: which worker measures a cell: one for all of them, or one for each.
        ledger: takes the rows.
        rates: of the devices.
    """

    client: Client
    """The worker of the cell at hand."""

    def __init__(
        self,
        suite: Suite,
        cells: Sequence[Cell],
        worker_of: Callable[[Cell], Client],
        ledger: RunLog,
        rates: DeviceRates,
    ) -> None:
        self.timing, self.cells, self.ledger = suite.timing, list(cells), ledger
        self._worker_of = worker_of
        self._samples = {cell.id: Samples(ledger.folder, cell) for cell in cells}
        self._rows = SpeedRows(cells, self._samples, ledger, rates)
        self._warm: dict[str, int] = {}

    def run(self) -> None:
        """All rounds, then all rows."""
        cells, first = self._unfinished()
        for cell in cells:
            self._find_batch(cell)
        number = first
        while (live := self._live(cells)) and not (why := self._stopped(live, range(first, number))):
            for order, cell in enumerate(abba(cells, number)):
                if self.ledger.open(cell) and not self._samples[cell.id].has(number):
                    self._measure(cell, number, order)
            number += 1
        for cell in self._live(cells):
            self._samples[cell.id].save(stopped=why)
        for cell in self._live(self.cells):
            self._rows.write(cell)

    def _unfinished(self) -> tuple[list[Cell], int]:
        """The cells that need rounds, and the number of their first one.

        A cell that is tried again after its group has ended gets numbers of its own: its rounds were not measured
        beside the others' and must not be paired with them.
        """
        over = [one for one in self._samples.values() if "stopped" in one.data]
        if not over:
            return self._live(self.cells), 0
        count = 1 + max(part["round"] for one in over for part in one.rounds)
        for cell in self._live(self.cells):
            samples = self._samples[cell.id]
            if "stopped" not in samples.data and all(samples.has(number) for number in range(count)):
                samples.save(stopped=over[0].data["stopped"])  # killed while this was being written
        return [cell for cell in self._live(self.cells) if "stopped" not in self._samples[cell.id].data], count

    def _live(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.ledger.open(cell)]

    def _find_batch(self, cell: Cell) -> None:
        """Notes the batch of a cell; the largest one where the suite asks for ``max``."""
        samples = self._samples[cell.id]
        if "batch" in samples.data:
            return
        self.ledger.begin(cell)
        self.client = self._worker_of(cell)
        if cell.batch != "max":
            samples.data["batch"] = cell.batch
            return
        self.ledger.watcher.cell(cell.id, "running", "searching the largest batch")
        try:
            samples.save(**again(lambda: find_batch(cell, self.timing.memory_limit, self.client)))
        except D2OBenchError as problem:
            self.ledger.fail(cell, problem)

    def _stopped(self, cells: Sequence[Cell], rounds: range) -> str:
        """Why no round is needed after ``rounds``; empty while one is.

        Rounds on the disk from before a kill are looked at one after another, so that a run that goes on comes to the
        same decisions as one that was never stopped.
        """
        if not rounds:
            return ""
        parts = {cell.id: [one for one in self._samples[cell.id].rounds if one["round"] in rounds] for cell in cells}
        if sum(part["seconds"] for one in parts.values() for part in one) >= self.timing.max_seconds:
            return "max_seconds"
        if len(rounds) >= self.timing.max_rounds:
            return "max_rounds"
        undisturbed = min(sum(not part["flags"] for part in one) for one in parts.values())
        if undisturbed < self.timing.rounds:
            return ""
        traces = {name: msgspec.convert(one, list[RequestTrace]) for name, one in parts.items()}
        narrow = all(_relative_width(tpot(name, one)) <= self.timing.interval for name, one in traces.items())
        return "interval" if narrow else ""

    def _measure(self, cell: Cell, number: int, order: int) -> None:
        """One request, warmed up first where this worker process has not seen the cell; its round or its row."""
        samples = self._samples[cell.id]
        self.ledger.begin(cell)
        self.client = self._worker_of(cell)
        request = {
            "axes": msgspec.to_builtins(cell.axes),
            "round": number,
            "batch": samples.data["batch"],
            "sampled": self._sampled if self.timing.decode == "sampled" else None,
        }

        def measured() -> tuple[dict[str, Any], float]:
            self._warm_up(cell, request)
            self.ledger.watcher.cell(cell.id, "running", *so_far(cell.id, samples.rounds, self.timing, number))
            since = time.monotonic()
            found = self._both(request, order) if self.timing.decode == "both" else self.client.call("measure", request)
            return found, time.monotonic() - since

        try:
            found, seconds = again(measured)
        except D2OBenchError as problem:
            self.ledger.fail(cell, problem, samples)
            return
        samples.data["model"] = found["model"]
        samples.add({**found["trace"], "round": number, "order": order, "seconds": round(seconds, 6)})

    @property
    def _sampled(self) -> list[int]:
        return [self.timing.depths, self.timing.steps]

    def _both(self, request: dict[str, Any], order: int) -> dict[str, Any]:
        """The request with every step measured and once more sampled, either of them first in turn."""
        runs: dict[bool, dict[str, Any]] = {}
        for sampled in (True, False) if (request["round"] + order) % 2 else (False, True):
            runs[sampled] = self.client.call("measure", {**request, "sampled": self._sampled if sampled else None})
        trace, other = runs[False]["trace"], runs[True]["trace"]
        # where sampling would have measured every step there is nothing to compare
        trace["sampled_s"] = other["decode_s"] if other.get("step_at") else None
        trace["flags"] = [*trace["flags"], *other["flags"]]
        return runs[False]

    def _warm_up(self, cell: Cell, request: dict[str, Any]) -> None:
        if self.client.pid is not None and self._warm.get(cell.id) == self.client.generation:
            return
        watcher = self.ledger.watcher
        self.client.call("load", request, progress=lambda done, total, words: watcher.phase(words, done, total))
        watcher.cell(cell.id, "running", "warm-up")
        data = self._samples[cell.id].data
        if "counts" not in data:
            data["counts"] = self.client.call("count", request)
        data["warm_up"] = warm_up(self.client, request, self.timing)
        self._warm[cell.id] = self.client.generation


def warm_up(client: Client, request: Mapping[str, Any], timing: Timing, most: int | None = None) -> list[Any]:
    """Runs requests of a cell in a cold worker process until its decode steps no longer change.

    Args:
        client: the worker.
        request: of the cell, as for a measurement.
        timing: how near the medians of two successive groups of steps must come, and how many requests are made at
            most.
        most: in place of ``timing.warmup``.

    Returns:
        What each request saw (see :class:`d2obench.measure.warmup.WarmUp`), the last one stable or not.
    """
    found: list[Any] = []
    while len(found) < (timing.warmup if most is None else most):
        found.append(client.call("warm_up", {**request, "within": timing.warm_within}))
        if found[-1]["stable"]:
            break
    return found


def _relative_width(value: Value) -> float:
    """Half an interval's width ÷ its value; 0 without steps, infinite where there is no interval yet."""
    if not value.value:
        return 0.0
    return (value.hi - value.lo) / 2 / value.value if value.hi is not None and value.lo is not None else math.inf
