"""One group of speed cells: the same model, shape, batch and seed, every policy and budget, measured in turn.

Caches that fit into memory together decode in turn in one worker, a few steps at a time (``turns`` = ``windows``, see
:mod:`d2obench.measure.windows`). Beside that every cell is measured in whole requests: TTFT, compression and peaks of
memory come from these, with no other cache alive. Where a cell has no windows (``turns`` = ``requests``), its decode
steps come from them, too. Rounds of requests go over the cells forwards and backwards in turn (ABBA), so that a drift
of the machine falls on all of them alike and cancels in the ratios of one round.

Both are divided among several worker processes, each started afresh: where a process happens to lie in memory moves
its times by percents (Mytkowicz et al., ASPLOS 2009), and no number of windows in the same one would show it.

In every process a cell is warmed up before it is measured there, until its decode steps no longer change. Windows are
on the disk when those of a process are complete, and each request before the next one starts, so that a run that goes
on measures little twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.measure.disturbance import is_disturbance
from d2obench.measure.summarise import narrowness
from d2obench.measure.trace import RequestTrace
from d2obench.run.plan import abba
from d2obench.run.progress import so_far
from d2obench.run.run_log import RunLog, Samples
from d2obench.run.search import find_batch
from d2obench.run.speed_row import DeviceRates, SpeedRows
from d2obench.run.window_stage import BUSY, WindowStage
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
        obstacles: why cells of the group can't live side by side, by cell id; asked once.
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
        obstacles: Callable[[Sequence[Cell]], Mapping[str, str]],
    ) -> None:
        self.timing, self.cells, self.ledger = suite.timing, list(cells), ledger
        self._worker_of, self._obstacles = worker_of, obstacles
        self._samples = {cell.id: Samples(ledger.folder, cell) for cell in cells}
        self._rows = SpeedRows(cells, self._samples, ledger, rates)
        self._stage = WindowStage(suite, self._samples, ledger)
        self._warm: dict[str, int] = {}
        self._clients: dict[int, Client] = {}
        self._process: int | None = None
        """Which of the group's processes has measured last, in this run of the program."""
        self._why: dict[str, str] = {}
        """Why a cell has no windows, by its id."""

    def run(self) -> None:
        """All windows and rounds, then all rows."""
        cells, first_round, first_process = self._unfinished()
        for cell in cells:
            self._find_batch(cell)
        self._why = dict(self._obstacles(live)) if (live := self._live(cells)) else {}
        number, stopped = first_round, ""
        for share in range(1, self.timing.processes + 1):
            process = first_process + share - 1
            self._measure_windows(cells, process)
            while live := self._live(cells):
                rounds = range(first_round, number)
                if self._enough(live, rounds, share) or (stopped := self._stopped(live, rounds)):
                    break
                for order, cell in enumerate(abba(cells, number)):
                    if self.ledger.open(cell) and not self._samples[cell.id].has(number):
                        self._measure(cell, number, order, process)
                number += 1
        for cell in self._live(cells):
            self._samples[cell.id].save(stopped=stopped, turns_why=self._why.get(cell.id, ""))
        for cell in self._live(self.cells):
            self._rows.write(cell)

    def _measure_windows(self, cells: Sequence[Cell], process: int) -> None:
        """The windows of one process, where they are not on the disk.

        Windows are compared with those of other cells, so they are measured again for all where one cell lacks them.
        """
        able = [cell for cell in self._live(cells) if cell.id not in self._why]
        if all(self._samples[cell.id].has_windows(process) for cell in able):
            return
        self._enter(process)
        self.client = self._client_of(able[0])
        self._why |= self._stage.run(able, self.client, process)
        for cell in able:
            if cell.id not in self._why:
                self._warm[cell.id] = self.client.generation

    def _enter(self, process: int) -> None:
        """Begins another of the group's processes: the workers are ended, and start afresh when they are next asked."""
        if self._process not in (None, process):
            for client in self._clients.values():
                client.close()
        self._process = process

    def _client_of(self, cell: Cell) -> Client:
        client = self._worker_of(cell)
        self._clients[id(client)] = client
        return client

    def _unfinished(self) -> tuple[list[Cell], int, int]:
        """The cells that need rounds, and the numbers of their first round and of their first process.

        A cell that is tried again after its group has ended gets numbers of its own: it was not measured beside the
        others and must not be paired with them.
        """
        over = [one for one in self._samples.values() if "stopped" in one.data]
        if not over:
            return self._live(self.cells), 0, 0
        count = 1 + max(part["round"] for one in over for part in one.rounds)
        measured = [part for one in over for part in (*one.rounds, *one.data.get("windows", ()))]
        for cell in self._live(self.cells):
            samples = self._samples[cell.id]
            if "stopped" not in samples.data and all(samples.has(number) for number in range(count)):
                samples.save(stopped=over[0].data["stopped"])  # killed while this was being written
        left = [cell for cell in self._live(self.cells) if "stopped" not in self._samples[cell.id].data]
        return left, count, 1 + max(part.get("process", 0) for part in measured)

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
        parts = self._parts(cells, rounds)
        if _seconds(parts) >= self.timing.max_seconds:
            return "max_seconds"
        if len(rounds) >= self.timing.max_rounds:
            return "max_rounds"
        if min(map(_undisturbed, parts.values())) < self.timing.rounds:
            return ""
        timed = [cell.id for cell in cells if not self._samples[cell.id].data.get("windows")]
        traces = {name: msgspec.convert(parts[name], list[RequestTrace]) for name in timed}
        narrow = all(narrowness(name, one) <= self.timing.interval for name, one in traces.items())
        return "interval" if narrow else ""

    def _enough(self, cells: Sequence[Cell], rounds: range, share: int) -> bool:
        """Whether ``share`` of the group's processes have done their part of the rounds; the last one does the rest."""
        timing = self.timing
        if share == timing.processes or not rounds:
            return False
        parts, part = self._parts(cells, rounds), share / timing.processes
        return (
            min(map(_undisturbed, parts.values())) >= math.ceil(timing.rounds * part)
            or len(rounds) >= math.ceil(timing.max_rounds * part)
            or _seconds(parts) >= timing.max_seconds * part
        )

    def _parts(self, cells: Sequence[Cell], rounds: range) -> dict[str, list[dict[str, Any]]]:
        return {cell.id: [one for one in self._samples[cell.id].rounds if one["round"] in rounds] for cell in cells}

    def _measure(self, cell: Cell, number: int, order: int, process: int) -> None:
        """One request, warmed up first where this worker process has not seen the cell; its round or its row."""
        samples = self._samples[cell.id]
        self.ledger.begin(cell)
        self._enter(process)
        self.client = self._client_of(cell)
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
        place = {"round": number, "process": process, "order": order}
        samples.add({**found["trace"], **place, "seconds": round(seconds, 6)})
        if any(map(is_disturbance, found["trace"]["flags"])):
            self.ledger.note_once(BUSY)

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
        """Warms the cell up where its worker is cold; windows in this process have warmed it up already."""
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


def _seconds(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    return float(sum(part["seconds"] for one in parts.values() for part in one))


def _undisturbed(rounds: Sequence[Mapping[str, Any]]) -> int:
    return sum(not any(map(is_disturbance, part["flags"])) for part in rounds)
