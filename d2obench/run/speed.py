"""One group of speed cells: the same model, shape, batch and seed, every policy and budget, in interleaved rounds.

Rounds go over the cells forwards and backwards in turn (ABBA), so that a drift of the machine falls on all of them
alike and cancels in the ratios of one round. A cell is warmed up in every worker process before it is measured there,
until its decode steps settle. Each request is on the disk before the next one starts, so a run that goes on measures
nothing twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.measure.summarise import Machine, Summary, summarise, tpot
from d2obench.measure.trace import RequestTrace
from d2obench.record import Value
from d2obench.run.client import Client
from d2obench.run.ledger import Ledger
from d2obench.run.live import so_far
from d2obench.run.plan import abba
from d2obench.run.protocol import again
from d2obench.run.ratios import FULL, against_full
from d2obench.run.reference import Reference
from d2obench.run.resume import Samples
from d2obench.run.search import find_batch
from d2obench.run.warming import warm
from d2obench.suite.definition import Cell, Suite
from d2obench.suite.grammar import parse_shape


class SpeedGroup:
    """Measures the cells of one group and ends each as a row.

    ``worker_of`` says which worker measures a cell: one for all of them, or one for each.
    """

    client: Client
    """The worker of the cell at hand."""

    def __init__(
        self,
        suite: Suite,
        cells: Sequence[Cell],
        worker_of: Callable[[Cell], Client],
        ledger: Ledger,
        reference: Reference,
    ) -> None:
        self.timing, self.cells, self.ledger = suite.timing, list(cells), ledger
        self._worker_of = worker_of
        self._reference = reference
        self._samples = {cell.id: Samples(ledger.folder, cell) for cell in cells}
        self._warm: dict[str, int] = {}
        self._summaries: dict[str, Summary] = {}

    def run(self) -> None:
        """All rounds, then all rows."""
        cells, first = self._unfinished()
        for cell in cells:
            self._settle_batch(cell)
        number = first
        while (live := self._live(cells)) and not (why := self._stopped(live, range(first, number))):
            for order, cell in enumerate(abba(cells, number)):
                if self.ledger.open(cell) and not self._samples[cell.id].has(number):
                    self._measure(cell, number, order)
            number += 1
        for cell in self._live(cells):
            self._samples[cell.id].save(stopped=why)
        for cell in self._live(self.cells):
            self._finish(cell)

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

    def _settle_batch(self, cell: Cell) -> None:
        samples = self._samples[cell.id]
        if "batch" in samples.data:
            return
        self.ledger.begin(cell)
        self.client = self._worker_of(cell)
        if cell.axes.batch != "max":
            samples.data["batch"] = cell.axes.batch
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
        narrow = all(_width(tpot(name, _traces(one))) <= self.timing.interval for name, one in parts.items())
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
        """The request in full and once more sampled, either of them first in turn."""
        runs: dict[bool, dict[str, Any]] = {}
        for sampled in (True, False) if (request["round"] + order) % 2 else (False, True):
            runs[sampled] = self.client.call("measure", {**request, "sampled": self._sampled if sampled else None})
        trace, other = runs[False]["trace"], runs[True]["trace"]
        trace["sampled_s"] = other["decode_s"] if other.get("step_at") else None  # windows that cover all show nothing
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
        data["warm_up"] = warm(self.client, request, self.timing)
        self._warm[cell.id] = self.client.generation

    def _finish(self, cell: Cell) -> None:
        samples = self._samples[cell.id]
        summary = self._summary(cell)
        counts = {key: Value(count) for key, count in samples.data["counts"].items()}
        values = summary.values | counts | self._against_full(cell, summary)
        if cell.axes.batch == "max":
            values["batch_max"] = Value(samples.data["batch"], note=samples.data["limit"])
        self.ledger.end(
            cell,
            "ok",
            values=values,
            details=summary.details
            | {key: samples.data.get(key) for key in ("stopped", "warm_up", "model")}
            | {"device": self._reference.known(cell.axes.device)},
            flags=(
                *summary.flags,
                *self._apart(cell, values),
                *self._beyond(cell),
                *samples.data["model"].get("flags", ()),
            ),
            samples=samples.name,
            seconds=round(sum(part["seconds"] for part in samples.rounds), 3),
        )

    def _summary(self, cell: Cell) -> Summary:
        if cell.id not in self._summaries:
            samples = self._samples[cell.id]
            model, device = samples.data["model"], cell.axes.device
            bandwidth, idle_w = self._reference.bandwidth(device), self._reference.idle_w(device)
            machine = Machine(model["weights_bytes"], model["weights_read_bytes"], bandwidth, idle_w)
            self._summaries[cell.id] = summarise(cell.id, _traces(samples.rounds), machine)
        return self._summaries[cell.id]

    def _against_full(self, cell: Cell, summary: Summary) -> dict[str, Value]:
        full = next((one for one in self.cells if one.axes.policy == FULL), None)
        if full is None or full is cell or not (self.ledger.open(full) or self.ledger.records[full.id].status == "ok"):
            return {}
        mine, theirs = self._samples[cell.id], self._samples[full.id]
        if not theirs.rounds:  # its samples were taken away since
            return {}
        if cell.axes.batch == "max":
            batches = (mine.data["batch"], theirs.data["batch"])
            return against_full(cell.id, mine.rounds, theirs.rounds, batches=batches)
        found = against_full(cell.id, mine.rounds, theirs.rounds)
        step, step_full = (one.values["step_bytes"].value for one in (summary, self._summary(full)))
        if step and step_full:
            found["speedup_bound"] = Value(step_full / step)
        return found

    def _beyond(self, cell: Cell) -> list[str]:
        """A flag where the text is longer than the model was made for: it still takes its time, but says nothing."""
        (shape,), context = parse_shape(cell.axes.shape or ""), self._samples[cell.id].data["model"].get("context")
        past = context is not None and shape.prompt + shape.gen > context
        return [f"beyond the model's context of {context:,}: speed only"] if past else []

    def _apart(self, cell: Cell, values: dict[str, Value]) -> list[str]:
        """A flag where full was measured too, but in no round of this cell: see :meth:`_unfinished`."""
        full = [
            one for one in self.cells if one.axes.policy == FULL and one is not cell and self._samples[one.id].rounds
        ]
        known = {"speedup", "speedup_memory", "prefill_cost"} & values.keys()
        return ["not measured beside full"] if full and not known else []


def _traces(rounds: list[dict[str, Any]]) -> list[RequestTrace]:
    return msgspec.convert(rounds, list[RequestTrace])


def _width(value: Value) -> float:
    """Half an interval's width ÷ its value; 0 without steps, infinite where one round can't tell."""
    if not value.value:
        return 0.0
    return (value.hi - value.lo) / 2 / value.value if value.hi is not None and value.lo is not None else math.inf
