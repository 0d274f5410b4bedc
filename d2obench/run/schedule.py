"""Planning a run into the time it was given (``--within 3m``), and an honest estimate of the time that is left.

A short probe at the start loads the model and times one small request; from the rates it comes to, every cell is
predicted (:mod:`d2obench.run.predict`), and scaled by what the cells before it took. A unit is what
can only be measured as a whole: the cells that are timed together, or all cells of one quality task. Where the units
don't fit into the time, first their rounds and items are cut, and where even one round and a few items of each are too
much, whole units are dropped, the costliest first. What was cut or dropped stands in the rows.
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
from d2obench.run.plan import Plan, group
from d2obench.run.predict import ITEM_BYTES, Device, predict, rates_here
from d2obench.run.run_log import RunLog
from d2obench.run.worker_client import Client, again
from d2obench.stats.intervals import WINDOWS
from d2obench.suite.definition import Suite, Timing
from d2obench.suite.grammar import Shape
from d2obench.tasks.base import Cell

REPORT_S = 10.0
"""Seconds that are left for writing and rendering the report."""
LEAST_WINDOWS = WINDOWS
"""Windows of steps that a process measures at least, however few its rounds are: fewer carry no interval."""
LEAST_ITEMS = 2
"""Items below which a quality task is dropped rather than cut: one item carries no interval."""
PROBE = Shape(256, 9)
"""The small request that is timed first."""
UNKNOWN = Device(1.0, 1.0)
WINDOW_LEAD = 1.3
"""What a window of steps takes with the steps before it that are not counted, in lengths of the window."""


class Unit(NamedTuple):
    """Cells that are measured as a whole or not at all, and how often, at most."""

    cells: tuple[Cell, ...]
    most: int
    """Rounds of timed cells, items of a quality task, as the suite asks for them."""

    @property
    def timed(self) -> bool:
        """Whether rounds are counted, and not items."""
        return self.cells[0].timed

    @property
    def counted(self) -> str:
        """What is counted, in words."""
        return "rounds" if self.timed else "items"


class Schedule:
    """Decides for each group of cells how much of it is measured.

    Args:
        plan: of the run.
        log: its display hears how long the cells will take; rows of dropped cells are written to it.
        clock: seconds that only go forwards.
    """

    def __init__(self, plan: Plan, log: RunLog, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._log, self._clock = plan, log, clock
        self._units = [one for one in units_of(plan) if any(log.open(cell) for cell in one.cells)]
        self._load_s = 0.0
        self._scale = {True: 1.0, False: 1.0}
        """Measured ÷ predicted seconds, of timed cells and of the others."""
        self._device = dict.fromkeys(map(_kind, plan.cells), UNKNOWN)
        within = plan.suite.within_s
        self._until = None if within is None else plan.began + within - REPORT_S
        self._measured = any(record.status == "ok" for record in log.records.values())
        self._running: tuple[float, float] = (0.0, 0.0)
        """Of the group at hand: when it began, and what it was predicted to take, unscaled."""
        self._chosen: dict[str, tuple[Unit, int]] = {}
        """How many rounds or items each cell's unit was given, by cell id; 0 where it was dropped."""

    def probe(self, client: Client) -> None:
        """Loads the first model and times a small request on it, which gives the rates that the rest is predicted
        from."""
        cell = next((one for one in self._plan.cells if one.policy.yardstick is None and self._log.open(one)), None)
        model = self._plan.models.get(cell.axes.model) if cell is not None else None
        fresh = self._plan.suite.worker.mode == "fresh" and self._until is None  # no process beside those of the cells
        if cell is not None and model is not None and not fresh:
            self._log.watcher.phase("probing how fast this machine is")
            with suppress(D2OBenchError):  # the cells themselves say what is wrong
                self._load_s, self._device[_kind(cell)] = again(lambda: _probe(client, cell, model))
        for kind, device in self._device.items():
            if device == UNKNOWN:
                self._device[kind] = rates_here(*kind)
        self._expect()

    def begin(self, together: Sequence[Cell]) -> Suite | None:
        """The suite by which a group is measured, with fewer rounds or items where time is short; None where the group
        was dropped, and its rows say so."""
        unfinished = [cell for cell in together if self._log.open(cell)]
        suite = self._plan.suite if self._until is None or not unfinished else self._cut(unfinished)
        if suite is not None:
            self._running = self._clock(), sum(self._predicted(cell, suite) for cell in unfinished)
        return suite

    def end(self, together: Sequence[Cell]) -> None:
        """Notes what the group at hand took, for the estimates of those that come."""
        began, predicted = self._running
        self._measured = True
        if predicted > 0:
            fixed = self._fixed(together[0], self._plan.suite) * len(together)
            self._scale[together[0].timed] = max(0.0, self._clock() - began - fixed) / predicted or 1.0
        self._expect()

    def _cut(self, unfinished: Sequence[Cell]) -> Suite | None:
        suite = self._plan.suite
        if unfinished[0].id not in self._chosen:
            self._choose(unfinished[0])
        unit, count = self._chosen[unfinished[0].id]
        assert self._until is not None
        if count == 0 or (self._measured and self._clock() >= self._until):  # slower than the plan had it
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
        """Gives every unit from that of ``first`` on its rounds or items."""
        place = next(i for i, one in enumerate(self._units) if first in one.cells)
        left = list(self._units[place:])
        assert self._until is not None
        seconds = self._until - self._clock()
        dropped: list[Unit] = []
        while len(left) > 1 and sum(self._cost(one, _least(one)) for one in left) > seconds:
            dropped.append(max(left, key=lambda one: self._cost(one, _least(one))))
            left.remove(dropped[-1])
        if self._measured and self._cost(left[0], _least(left[0])) > seconds:
            dropped += left  # but something is measured, however short the time
            left.clear()
        counts = {id(one): 0 for one in dropped} | {id(one): _least(one) for one in left}
        grown = True
        while grown:  # one round or item more for each in turn, as long as it fits
            grown = False
            for one in left:
                more = counts[id(one)] + 1
                spent = sum(self._cost(other, counts[id(other)]) for other in left if other is not one)
                if more <= one.most and spent + self._cost(one, more) <= seconds:
                    counts[id(one)], grown = more, True
        chosen = self._units[place]
        known = [found for cell in chosen.cells if (found := self._items_of(cell, chosen)) is not None]
        count = known[0] if known else counts[id(chosen)]  # items are paired with those of the rows that stand
        for cell in chosen.cells:
            self._chosen[cell.id] = chosen, count
        if count < chosen.most:
            self._log.watcher.note(f"within {self._plan.suite.within}: {_spelt(chosen, count)}")

    def _items_of(self, cell: Cell, unit: Unit) -> int | None:
        """The items of a quality cell that was measured in an earlier part of the run."""
        record = self._log.records.get(cell.id)
        if unit.timed or record is None or record.status != "ok":
            return None
        cut = [flag.partition(" of ")[0] for flag in record.flags if flag.endswith(f"within {self._plan.suite.within}")]
        return int(cut[0]) if cut else unit.most

    def _cost(self, unit: Unit, count: int) -> float:
        """Seconds of a unit in so many rounds or items."""
        if count == 0:
            return 0.0
        suite = self._plan.suite
        if unit.timed:
            suite = msgspec.structs.replace(suite, timing=cut_timing(suite, count))
            return sum(self._seconds(cell, suite) for cell in unit.cells) + self._load_s * suite.timing.processes
        suite = msgspec.structs.replace(suite, quality=msgspec.structs.replace(suite.quality, limit=count))
        return sum(self._seconds(cell, suite) for cell in unit.cells)

    def _seconds(self, cell: Cell, suite: Suite) -> float:
        return self._predicted(cell, suite) * self._scale[cell.timed] + self._fixed(cell, suite)

    def _fixed(self, cell: Cell, suite: Suite) -> float:
        """Seconds that windows of steps take whatever the machine's speed: they are as long as they are."""
        if not cell.timed:
            return 0.0
        timing = suite.timing
        return WINDOW_LEAD * timing.windows * timing.window_s * timing.processes

    def _predicted(self, cell: Cell, suite: Suite) -> float:
        """The unscaled prediction; 0 where nothing can be predicted."""
        model = self._plan.models.get(cell.axes.model)
        if model is None or not self._log.open(cell):
            return 0.0
        return predict(cell, suite, model, self._device[_kind(cell)]).seconds or 0.0

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
        if self._until is not None and (total := sum(left.values())) > 0:  # what does not fit will be cut
            shrink = min(1.0, max(0.0, self._until - self._clock()) / total)
            left = {name: seconds * shrink for name, seconds in left.items()}
        self._log.watcher.expect(left)


def units_of(plan: Plan) -> list[Unit]:
    """The units of a plan in the order of their first cells."""
    units: dict[Any, list[Cell]] = {}
    for together in group(plan.cells):
        a = together[0].axes
        key = together[0].id if together[0].timed else (a.task, a.model, a.dtype, a.device, a.shape, a.seed)
        units.setdefault(key, []).extend(together)
    return [Unit(tuple(cells), _most(plan, cells[0])) for cells in units.values()]


def cut_timing(suite: Suite, rounds: int) -> Timing:
    """The table ``timing`` with at most so many rounds, and its windows and processes in proportion."""
    timing = suite.timing
    if rounds >= timing.rounds:
        return timing
    windows = max(LEAST_WINDOWS, math.ceil(timing.windows * rounds / timing.rounds)) if timing.windows else 0
    processes = min(timing.processes, rounds)
    return msgspec.structs.replace(timing, rounds=rounds, max_rounds=rounds, windows=windows, processes=processes)


def _spelt(unit: Unit, count: int) -> str:
    """``2 of 3 rounds of speed, 768+32, 4 cells``, or that the unit is dropped."""
    axes = unit.cells[0].axes
    name = ", ".join(filter(None, (axes.task, axes.model, axes.shape, f"{len(unit.cells)} cells")))
    return f"{count} of {unit.most} {unit.counted} of {name}" if count else f"{name} dropped"


def _most(plan: Plan, cell: Cell) -> int:
    if cell.task is None:
        return plan.suite.timing.rounds
    model = plan.models.get(cell.axes.model)
    work = cell.task.work(plan.suite.quality, cell.shape, model.context) if model is not None else None
    return work.items if work is not None else max(1, plan.suite.quality.limit)


def _least(unit: Unit) -> int:
    return 1 if unit.timed else min(LEAST_ITEMS, unit.most)


def _kind(cell: Cell) -> tuple[str, str]:
    return cell.axes.device, cell.axes.dtype


def _probe(client: Client, cell: Cell, model: Dimensions) -> tuple[float, Device]:
    """Seconds of loading a cell's model, and the rates that a small request of the full cache on it comes to."""
    axes = msgspec.structs.replace(cell.axes, task="speed", policy="full", budget=None, shape=str(PROBE), batch=1)
    request = {"axes": msgspec.to_builtins(axes), "round": 0, "batch": 1, "sampled": None}
    since = time.monotonic()
    client.call("load", request)
    load_s = time.monotonic() - since
    client.call("measure", request)  # warms up
    trace = client.call("measure", request)["trace"]
    weights = model.parameters * ITEM_BYTES[axes.dtype]
    return load_s, Device(weights / median(trace["step_s"]), 2 * model.parameters * PROBE.prompt / trace["prefill_s"])
