"""Fits a run into the time it was given (``--within 3m``), and estimates the time that is left.

A short probe at the start loads the model and times one small request. The rates of the device that follow from it give
a prediction for every cell (:mod:`d2obench.run.predict`), which is corrected by what the cells before it really took.

A *unit* is what is only worth measuring as a whole: the cells that are timed together, or all cells of one quality
task. Where the units don't fit into the time, they get fewer rounds or items. Where even one round and a few items of
each are too much, whole units are dropped, the one that takes longest first. The rows say what was cut or dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import Any, NamedTuple

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.models import Dimensions
from d2obench.run.plan import Plan, group, shares
from d2obench.run.predict import ITEM_BYTES, Device, predict, rates_here
from d2obench.run.run_folder import RunLog
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import Suite, Timing
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell

REPORT_S = 12.0
"""Seconds reserved for writing and rendering the report: about what it takes on a busy machine."""
LEAST_ITEMS = 2
"""A quality task gets at least so many items or is dropped: one item gives no interval."""
PROBE = Shape(256, 9)
"""The small request of the probe."""
UNKNOWN = Device(1.0, 1.0)
WINDOW_LEAD = 1.3
"""Time of a window together with its uncounted first steps, divided by the time of the window."""


class Unit(NamedTuple):
    """Cells that are measured together or not at all.

    ``most`` is the number of rounds (timed cells) or items (a quality task) that the suite asks for.
    """

    cells: tuple[Cell, ...]
    most: int

    @property
    def timed(self) -> bool:
        """Whether its cells are timed in rounds; otherwise they have items."""
        return self.cells[0].timed

    @property
    def counted(self) -> str:
        """``rounds`` or ``items``."""
        return "rounds" if self.timed else "items"


class Schedule:
    """Decides for each group of cells how many rounds or items of it are measured.

    Args:
        plan: of the run.
        log: takes the rows of dropped cells; its display is told how long the cells will take.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, plan: Plan, log: RunLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._log, self._clock = plan, log, clock
        self._units = [unit for unit in units_of(plan) if any(map(log.open, unit.cells))]
        self._sharing = sharing_of(plan)
        self._load_s = 0.0
        self._scale = {True: 1.0, False: 1.0}
        """Measured ÷ predicted seconds of the last group: of timed cells (True) and of quality cells (False)."""
        self._device = dict.fromkeys(map(_kind, plan.cells), UNKNOWN)
        within = plan.suite.within_s
        self._until = None if within is None else plan.began + within - REPORT_S
        self._measured = any(record.status == "ok" for record in log.records.values())
        self._running: tuple[float, float] = (0.0, 0.0)
        """When the present group began, and the seconds predicted for it without :attr:`_scale`."""
        self._chosen: dict[str, tuple[Unit, int]] = {}
        """The unit of a cell and its rounds or items, by cell id; 0 where it was dropped."""

    def probe(self, client: Client) -> None:
        """Loads the first model and times a small request on it; the rates of the device follow from that."""
        unfinished = (cell for cell in self._plan.cells if self._log.open(cell))
        cell = next((cell for cell in unfinished if cell.policy.yardstick is None), None)
        model = self._plan.models.get(cell.axes.model) if cell is not None else None
        # with worker.mode = "fresh" no process may run beside those of the cells, unless the time is limited
        fresh = self._plan.suite.worker.mode == "fresh" and self._until is None
        if cell is not None and model is not None and not fresh:
            self._log.display.phase("probing how fast this machine is")
            with suppress(D2OBenchError):  # the cells will meet the same error, and their rows say it
                self._load_s, self._device[_kind(cell)] = again(lambda: _probe(client, cell, model))
        for kind, device in self._device.items():
            if device == UNKNOWN:
                self._device[kind] = rates_here(*kind)
        self._expect()

    def begin(self, together: Sequence[Cell]) -> Suite | None:
        """The suite by which the next group is measured, with fewer rounds or items where time is short.

        Returns:
            None where the group is dropped; its rows are written then.
        """
        unfinished = [cell for cell in together if self._log.open(cell)]
        suite = self._plan.suite if self._until is None or not unfinished else self._cut(unfinished)
        if suite is not None:
            self._running = self._clock(), sum(self._predicted(cell, suite) for cell in unfinished)
        return suite

    def end(self, together: Sequence[Cell]) -> None:
        """Compares the time of the group that has ended with the prediction, to correct later ones."""
        began, predicted = self._running
        self._measured = True
        if predicted > 0:
            fixed = self._fixed(together[0], self._plan.suite) * len(together)
            self._scale[together[0].timed] = max(0.0, self._clock() - began - fixed) / predicted or 1.0
        self._expect()

    def _cut(self, unfinished: Sequence[Cell]) -> Suite | None:
        """As :meth:`begin`, in a run with limited time."""
        suite = self._plan.suite
        if unfinished[0].id not in self._chosen:
            self._choose(unfinished[0])
        unit, count = self._chosen[unfinished[0].id]
        assert self._until is not None
        if count == 0 or (self._measured and self._clock() >= self._until):  # earlier cells took longer than predicted
            for cell in unfinished:
                self._log.end(cell, "skipped", reason=f"dropped: no time was left for it within {suite.within}")
            return None
        if count < unit.most:
            for cell in unfinished:
                self._log.flag(cell, f"{count} of {unit.most} {unit.counted} within {suite.within}")
        if not unit.timed:
            quality = msgspec.structs.replace(suite.quality, limit=count)
            return suite if count == unit.most else msgspec.structs.replace(suite, quality=quality)
        timing = cut_timing(suite, count)
        most = min(timing.max_seconds, max(1.0, self._until - self._clock()))
        return msgspec.structs.replace(suite, timing=msgspec.structs.replace(timing, max_seconds=most))

    def _choose(self, first: Cell) -> None:
        """Chooses the rounds or items of the unit that ``first`` belongs to, by planning it and all later units."""
        assert self._until is not None
        position = next(i for i, unit in enumerate(self._units) if first in unit.cells)
        chosen, kept = self._units[position], list(self._units[position:])
        seconds = self._until - self._clock()
        # 1. Drop the costliest units until the others fit with their fewest rounds or items. The last one is kept if
        #    nothing has been measured yet, so that even the shortest run gives a figure.
        while len(kept) > 1 and sum(self._cost(unit, _least(unit)) for unit in kept) > seconds:
            kept.remove(max(kept, key=lambda unit: self._cost(unit, _least(unit))))
        if self._measured and self._cost(kept[0], _least(kept[0])) > seconds:
            kept.clear()
        # 2. Give one more round or item to each unit in turn, as long as all of them fit.
        counts = {id(unit): _least(unit) for unit in kept}
        grown = True
        while grown:
            grown = False
            for unit in kept:
                more = counts[id(unit)] + 1
                others = sum(self._cost(other, counts[id(other)]) for other in kept if other is not unit)
                if more <= unit.most and others + self._cost(unit, more) <= seconds:
                    counts[id(unit)], grown = more, True
        # 3. Items are compared in pairs: where cells of the unit have rows already, the others get as many items.
        known = [items for cell in chosen.cells if (items := self._items_of(cell, chosen)) is not None]
        count = known[0] if known else counts.get(id(chosen), 0)
        for cell in chosen.cells:
            self._chosen[cell.id] = chosen, count
        if count < chosen.most:
            self._log.display.note(f"within {self._plan.suite.within}: {_in_words(chosen, count)}")

    def _items_of(self, cell: Cell, unit: Unit) -> int | None:
        """How many items a quality cell had that was measured already; None where it was not, and for timed cells."""
        record = self._log.records.get(cell.id)
        if unit.timed or record is None or record.status != "ok":
            return None
        cut = [flag.partition(" of ")[0] for flag in record.flags if flag.endswith(f"within {self._plan.suite.within}")]
        return int(cut[0]) if cut else unit.most

    def _cost(self, unit: Unit, count: int) -> float:
        """Predicted seconds of a unit with ``count`` rounds or items."""
        if count == 0:
            return 0.0
        suite = self._plan.suite
        if unit.timed:
            suite = msgspec.structs.replace(suite, timing=cut_timing(suite, count))
            return sum(self._seconds(cell, suite) for cell in unit.cells) + self._load_s * suite.timing.processes
        suite = msgspec.structs.replace(suite, quality=msgspec.structs.replace(suite.quality, limit=count))
        return sum(self._seconds(cell, suite) for cell in unit.cells)

    def _seconds(self, cell: Cell, suite: Suite) -> float:
        """Predicted seconds of a cell, corrected by what earlier cells took."""
        return self._predicted(cell, suite) * self._scale[cell.timed] + self._fixed(cell, suite)

    def _fixed(self, cell: Cell, suite: Suite) -> float:
        """Seconds of the windows of a cell, which last equally long on every machine."""
        if not cell.timed:
            return 0.0
        timing = suite.timing
        return WINDOW_LEAD * timing.windows * timing.window_s * timing.processes

    def _predicted(self, cell: Cell, suite: Suite) -> float:
        """Predicted seconds of a cell's requests or items, not corrected; 0 where nothing can be predicted."""
        model = self._plan.models.get(cell.axes.model)
        if model is None or not self._log.open(cell):
            return 0.0
        sharing = self._sharing.get(cell.id, 1)
        return predict(cell, suite, model, self._device[_kind(cell)], sharing).seconds or 0.0

    def _expect(self) -> None:
        """Tells the display how long each cell that has no row yet will take."""
        left: dict[str, float] = {}
        for cell in self._plan.cells:
            if self._log.open(cell):
                unit, count = self._chosen.get(cell.id, (None, 0))
                suite = self._plan.suite
                if unit is not None and count < unit.most and unit.timed:
                    suite = msgspec.structs.replace(suite, timing=cut_timing(suite, max(1, count)))
                left[cell.id] = self._seconds(cell, suite)
        if self._until is not None and (total := sum(left.values())) > 0:  # cells that don't fit will be cut
            shrink = min(1.0, max(0.0, self._until - self._clock()) / total)
            left = {name: seconds * shrink for name, seconds in left.items()}
        self._log.display.expect(left)


def units_of(plan: Plan) -> list[Unit]:
    """The units of a plan in the order of their first cells."""
    units: dict[Any, list[Cell]] = {}
    for together in group(plan.cells):
        a = together[0].axes
        key = together[0].id if together[0].timed else (a.task, a.model, a.dtype, a.device, a.shape, a.seed)
        units.setdefault(key, []).extend(together)
    return [Unit(tuple(cells), _most(plan, cells[0])) for cells in units.values()]


def sharing_of(plan: Plan) -> dict[str, int]:
    """For each quality cell that shares its prefills, by id, the number of cells that do."""
    units = units_of(plan) if shares(plan.suite) else []
    return {cell.id: len(unit.cells) for unit in units if not unit.timed for cell in unit.cells}


def cut_timing(suite: Suite, rounds: int) -> Timing:
    """The table ``timing`` with at most ``rounds`` rounds, and with windows and processes in proportion; there are
    enough windows for an interval."""
    from d2obench.stats.intervals import WINDOWS

    timing = suite.timing
    if rounds >= timing.rounds:
        return timing
    windows = max(WINDOWS, math.ceil(timing.windows * rounds / timing.rounds)) if timing.windows else 0
    processes = min(timing.processes, rounds)
    return msgspec.structs.replace(timing, rounds=rounds, max_rounds=rounds, windows=windows, processes=processes)


def _in_words(unit: Unit, count: int) -> str:
    """``2 of 3 rounds of speed, 768+32, 4 cells``, or that the unit is dropped."""
    axes = unit.cells[0].axes
    name = ", ".join(filter(None, (axes.task, axes.model, axes.shape, f"{len(unit.cells)} cells")))
    return f"{count} of {unit.most} {unit.counted} of {name}" if count else f"{name} dropped"


def _most(plan: Plan, cell: Cell) -> int:
    """The rounds or items of a cell's unit in the whole suite."""
    if cell.task is None:
        return plan.suite.timing.rounds
    model = plan.models.get(cell.axes.model)
    work = cell.task.work(plan.suite.quality, cell.shape, model.context) if model is not None else None
    return work.items if work is not None else max(1, plan.suite.quality.limit)


def _least(unit: Unit) -> int:
    """The fewest rounds or items with which a unit is measured."""
    return 1 if unit.timed else min(LEAST_ITEMS, unit.most)


def _kind(cell: Cell) -> tuple[str, str]:
    """Device and dtype, for which a device has rates of its own."""
    return cell.axes.device, cell.axes.dtype


def _probe(client: Client, cell: Cell, model: Dimensions) -> tuple[float, Device]:
    """Seconds of loading a cell's model, and the device's rates from a small request of the full cache."""
    axes = msgspec.structs.replace(cell.axes, task="speed", policy="full", budget=None, shape=str(PROBE), batch=1)
    request = {"axes": msgspec.to_builtins(axes), "round": 0, "batch": 1, "sampled": None}
    since = time.monotonic()
    client.call("load", request)
    load_s = time.monotonic() - since
    client.call("measure", request)  # warms up
    trace = client.call("measure", request)["trace"]
    weights = model.parameters * ITEM_BYTES[axes.dtype]
    return load_s, Device(weights / median(trace["step_s"]), 2 * model.parameters * PROBE.prompt / trace["prefill_s"])
