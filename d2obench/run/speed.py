"""Measures one group of speed cells: those with the same model, shape, batch and seed, of all policies and budgets.

Decode steps are measured in *windows*: the caches of all cells live in one worker and decode a few steps each, in turn
(:mod:`d2obench.run.speed_windows`; the row says ``turns`` = ``windows``). Everything else (TTFT, compression, peaks of
memory) is measured in *requests*: one cell at a time runs prefill, compression and decode, while no other cache is in
memory. Cells whose caches don't fit into memory together have no windows; their decode steps are taken from the
requests, too (``turns`` = ``requests``).

One *round* is one request of every cell. The first round goes forwards over the cells, the next one backwards, and so
on (ABBA), so that a steady drift of the machine's speed cancels in the ratios. Windows and rounds are divided among
several worker processes that are started one after another, because the memory layout of a process changes its times
by percents (Mytkowicz et al., ASPLOS 2009); more samples in the same process would not show that.

A cell is warmed up in each process, until its decode steps no longer change, before it is measured there. Windows are
written when those of a process are complete, and each request before the next one begins, so a run that was stopped
and goes on repeats little work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.measure.disturbance import is_disturbance
from d2obench.measure.samples import RequestTrace
from d2obench.measure.summarise import narrowness
from d2obench.run.plan import abba
from d2obench.run.predict import find_batch
from d2obench.run.progress import so_far
from d2obench.run.run_folder import RunLog, Samples
from d2obench.run.speed_row import DeviceRates, SpeedRows
from d2obench.run.speed_windows import BUSY, SpeedWindows
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import Suite, Timing
from d2obench.tasks.base import Cell


class SpeedGroup:
    """Measures the cells of one group and ends each as a row.

    Args:
        suite: its table ``timing`` says how often.
        cells: the group.
        worker_of: the worker that measures a cell: the same for all cells, or one for each.
        log: takes the rows.
        rates: of the devices.
        obstacles: the reasons why some of these cells can't be measured in windows, by cell id; called once.
    """

    client: Client
    """The worker of the cell that is measured now."""

    def __init__(
        self,
        suite: Suite,
        cells: Sequence[Cell],
        worker_of: Callable[[Cell], Client],
        log: RunLog,
        rates: DeviceRates,
        obstacles: Callable[[Sequence[Cell]], Mapping[str, str]],
    ) -> None:
        self.timing, self.cells, self.log = suite.timing, list(cells), log
        self._worker_of, self._obstacles = worker_of, obstacles
        self._samples = {cell.id: Samples(log.folder, cell) for cell in cells}
        self._rows = SpeedRows(cells, self._samples, log, rates)
        self._windows = SpeedWindows(suite, self._samples, log)
        self._warm: dict[str, int] = {}
        """The worker process (:attr:`Client.generation`) in which a cell was warmed up, by cell id."""
        self._clients: dict[int, Client] = {}
        self._process: int | None = None
        """Number of the group's process that is in use; None before the first one."""
        self._no_windows: dict[str, str] = {}
        """Why a cell has no windows, by its id."""

    def run(self) -> None:
        """Measures all windows and rounds, then writes all rows."""
        # 1. What is missing: cells without a row, and the numbers of their first round and process.
        cells, first_round, first_process = self._unfinished()
        for cell in cells:
            self._find_batch(cell)
        self._no_windows = dict(self._obstacles(live)) if (live := self._live(cells)) else {}
        number, stopped = first_round, ""
        for count in range(1, self.timing.processes + 1):
            # 2. In each worker process first the windows,
            process = first_process + count - 1
            self._measure_windows(cells, process)
            # 3. then rounds of requests, until this process has done its part or no round is needed any more.
            while live := self._live(cells):
                rounds = range(first_round, number)
                if self._part_done(live, rounds, count) or (stopped := self._stopped(live, rounds)):
                    break
                for order, cell in enumerate(abba(cells, number)):
                    if self.log.open(cell) and not self._samples[cell.id].has(number):
                        self._measure(cell, number, order, process)
                number += 1
        # 4. The samples say that the group is complete before any row is written, so that a kill between two rows
        #    does not look like a group that has to be measured again.
        for cell in self._live(cells):
            self._samples[cell.id].save(stopped=stopped, turns_why=self._no_windows.get(cell.id, ""))
        for cell in self._live(self.cells):
            self._rows.write(cell)

    def _measure_windows(self, cells: Sequence[Cell], process: int) -> None:
        """Measures the windows of one process, unless they are on the disk.

        Windows of different cells are compared with each other, so where one cell lacks them all cells are measured.
        """
        able = [cell for cell in self._live(cells) if cell.id not in self._no_windows]
        if all(self._samples[cell.id].has_windows(process) for cell in able):
            return
        self._start_process(process)
        self.client = self._client_of(able[0])
        self._no_windows |= self._windows.run(able, self.client, process)
        for cell in able:
            if cell.id not in self._no_windows:
                self._warm[cell.id] = self.client.generation

    def _start_process(self, process: int) -> None:
        """Ends the workers where another of the group's processes begins; the next call starts new ones."""
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

        A cell that is tried again after its group has ended begins with the numbers after the group's: it is not
        measured beside the others now and must not be paired with them.
        """
        # 1. No cell says that its group has ended: the group begins, or goes on where it was stopped.
        complete = [samples for samples in self._samples.values() if "stopped" in samples.data]
        if not complete:
            return self._live(self.cells), 0, 0
        # 2. Cells with all rounds of the group: the run was killed while "stopped" was written to their samples.
        count = 1 + max(trace["round"] for samples in complete for trace in samples.rounds)
        for cell in self._live(self.cells):
            samples = self._samples[cell.id]
            if "stopped" not in samples.data and all(samples.has(number) for number in range(count)):
                samples.save(stopped=complete[0].data["stopped"])
        # 3. The others are measured alone, with new numbers.
        alone = [cell for cell in self._live(self.cells) if "stopped" not in self._samples[cell.id].data]
        measured = [part for samples in complete for part in (*samples.rounds, *samples.data.get("windows", ()))]
        return alone, count, 1 + max(part.get("process", 0) for part in measured)

    def _live(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells without a row: those that have not failed."""
        return [cell for cell in cells if self.log.open(cell)]

    def _find_batch(self, cell: Cell) -> None:
        """Writes the batch of a cell into its samples; searches the largest one where the suite asks for ``max``."""
        samples = self._samples[cell.id]
        if "batch" in samples.data:
            return
        self.log.begin(cell)
        self.client = self._worker_of(cell)
        if cell.batch != "max":
            samples.data["batch"] = cell.batch
            return
        self.log.display.cell(cell.id, "running", "searching the largest batch")
        try:
            samples.save(**again(lambda: find_batch(cell, self.timing.memory_limit, self.client)))
        except D2OBenchError as problem:
            self.log.fail(cell, problem)

    def _stopped(self, cells: Sequence[Cell], rounds: range) -> str:
        """Why no more rounds are needed after ``rounds``; empty where another one is needed.

        Rounds that are on the disk already are counted one by one as if they were measured now, so that a run that was
        stopped and goes on decides as one that was not.
        """
        if not rounds:
            return ""
        measured = self._rounds_of(cells, rounds)
        if _seconds(measured) >= self.timing.max_seconds:
            return "max_seconds"
        if len(rounds) >= self.timing.max_rounds:
            return "max_rounds"
        if min(map(_undisturbed, measured.values())) < self.timing.rounds:
            return ""
        # cells with windows have their decode steps from there, so only the others wait for a narrow interval
        timed = [measured[cell.id] for cell in cells if not self._samples[cell.id].data.get("windows")]
        widths = [narrowness(msgspec.convert(raw, list[RequestTrace])) for raw in timed]
        return "interval" if all(width <= self.timing.interval for width in widths) else ""

    def _part_done(self, cells: Sequence[Cell], rounds: range, count: int) -> bool:
        """Whether the first ``count`` processes have done their part of all rounds; the last one does all the rest."""
        timing = self.timing
        if count == timing.processes or not rounds:
            return False
        measured, part = self._rounds_of(cells, rounds), count / timing.processes
        return (
            min(map(_undisturbed, measured.values())) >= math.ceil(timing.rounds * part)
            or len(rounds) >= math.ceil(timing.max_rounds * part)
            or _seconds(measured) >= timing.max_seconds * part
        )

    def _rounds_of(self, cells: Sequence[Cell], numbers: range) -> dict[str, list[dict[str, Any]]]:
        """The raw rounds with these numbers, by cell id."""
        return {
            cell.id: [trace for trace in self._samples[cell.id].rounds if trace["round"] in numbers] for cell in cells
        }

    def _measure(self, cell: Cell, number: int, order: int, process: int) -> None:
        """Measures one request of a cell and adds it to the samples, or writes the row of a cell that fails.

        The cell is warmed up first where its worker process has not run it yet.
        """
        samples = self._samples[cell.id]
        self.log.begin(cell)
        self._start_process(process)
        self.client = self._client_of(cell)
        request = {
            "axes": msgspec.to_builtins(cell.axes),
            "round": number,
            "batch": samples.data["batch"],
            "sampled": self._sampled if self.timing.decode == "sampled" else None,
        }

        def measured() -> tuple[dict[str, Any], float]:  # the answer of the worker, and the seconds it took
            self._warm_up(cell, request)
            self.log.display.cell(cell.id, "running", *so_far(samples.rounds, self.timing, number))
            since = time.monotonic()
            if self.timing.decode == "both":
                answer = self._full_and_sampled(request, order)
            else:
                answer = self.client.call("measure", request)
            return answer, time.monotonic() - since

        try:
            answer, seconds = again(measured)
        except D2OBenchError as problem:
            self.log.fail(cell, problem, samples)
            return
        samples.data["model"] = answer["model"]
        place = {"round": number, "process": process, "order": order}
        samples.add({**answer["trace"], **place, "seconds": round(seconds, 6)})
        if any(map(is_disturbance, answer["trace"]["flags"])):
            self.log.note_once(BUSY)

    @property
    def _sampled(self) -> list[int]:
        return [self.timing.depths, self.timing.steps]

    def _full_and_sampled(self, request: dict[str, Any], order: int) -> dict[str, Any]:
        """Runs the request twice, with all decode steps measured and with a sample of them; from round to round the
        other one comes first. The answer is that of the full request, with ``sampled_s`` from the sampled one."""
        answers: dict[bool, dict[str, Any]] = {}
        for sampled in (True, False) if (request["round"] + order) % 2 else (False, True):
            answers[sampled] = self.client.call("measure", {**request, "sampled": self._sampled if sampled else None})
        trace, other = answers[False]["trace"], answers[True]["trace"]
        # a short generation is measured whole even where a sample was asked for; then there is nothing to compare
        trace["sampled_s"] = other["decode_s"] if other.get("step_at") else None
        trace["flags"] = [*trace["flags"], *other["flags"]]
        return answers[False]

    def _warm_up(self, cell: Cell, request: dict[str, Any]) -> None:
        """Warms the cell up, unless it has run in this worker process already, in windows or in a request."""
        if self.client.pid is not None and self._warm.get(cell.id) == self.client.generation:
            return
        display = self.log.display
        self.client.call("load", request, progress=lambda done, total, words: display.phase(words, done, total))
        display.cell(cell.id, "running", "warm-up")
        data = self._samples[cell.id].data
        if "counts" not in data:
            data["counts"] = self.client.call("count", request)
        data["warm_up"] = warm_up(self.client, request, self.timing)
        self._warm[cell.id] = self.client.generation


def warm_up(client: Client, request: Mapping[str, Any], timing: Timing, most: int | None = None) -> list[Any]:
    """Runs requests of a cell in a new worker process until its decode steps no longer change.

    Args:
        client: the worker.
        request: of the cell, as for a measurement.
        timing: ``warm_within``: how near the medians of two successive groups of decode steps must come; ``warmup``:
            the largest number of requests.
        most: the largest number of requests in place of ``timing.warmup``.

    Returns:
        The median steps of each request (:class:`d2obench.measure.phases.WarmUp`). The last request may be unstable,
        too.
    """
    requests: list[Any] = []
    while len(requests) < (timing.warmup if most is None else most):
        requests.append(client.call("warm_up", {**request, "within": timing.warm_within}))
        if requests[-1]["stable"]:
            break
    return requests


def _seconds(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """What all rounds of all cells took."""
    return float(sum(trace["seconds"] for traces in rounds.values() for trace in traces))


def _undisturbed(rounds: Sequence[Mapping[str, Any]]) -> int:
    """How many of the rounds of a cell were not disturbed."""
    return sum(not any(map(is_disturbance, trace["flags"])) for trace in rounds)
