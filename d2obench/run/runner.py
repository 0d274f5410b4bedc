"""Measuring groups of cells on one device, in the same way for every engine.

With ``worker.mode = "fresh"`` every cell has a process of its own. Timed cells take turns, so their processes live side
by side until the group is done: one measures while the others wait. In three cases the group shares one fresh process
instead: on a GPU, where the memory in use would count the processes that wait; with batch ``max``, which fills the
memory; and where all processes together would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.record import Value
from d2obench.run.isolated_workers import IsolatedWorkers
from d2obench.run.plan import Plan
from d2obench.run.predict import memory_of
from d2obench.run.run_log import RunLog, Samples
from d2obench.run.speed import SpeedGroup
from d2obench.run.speed_row import DeviceRates
from d2obench.run.window_stage import window_obstacles
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

SHARE = 0.8
"""How much of the free memory the processes of a group may be predicted to take together."""
PROCESS_BYTES = 512 * 2**20
"""What a process with its libraries takes before it loads a model, roughly."""


class GroupRunner:
    """Measures groups one after another on one device.

    Args:
        plan: the run's cells and the dimensions of its models.
        client: the worker; a shared one keeps its model warm from group to group.
        log: holds the rows that stand already and takes the new ones.
        isolated: the workers of cells that can't share ``client``.
    """

    def __init__(self, plan: Plan, client: Client, log: RunLog, isolated: IsolatedWorkers | None = None) -> None:
        self._plan, self._common, self._log, self._isolated = plan, client, log, isolated
        self._last = client
        self._rates = DeviceRates(client, log.watcher)

    def run(self, together: Sequence[Cell], suite: Suite | None = None) -> None:
        """Brings every cell of one group to its row; ``suite`` in place of the plan's, with fewer rounds or items.

        Raises:
            RecordError: the run folder can't be written any more.
        """
        suite, log = suite or self._plan.suite, self._log
        for cell in together:
            log.skip_if_too_large(cell)
        if not any(log.open(cell) for cell in together):
            return
        if suite.worker.mode == "fresh":
            self._common.close()
            if self._isolated is not None:
                self._isolated.stop()
        if not together[0].timed:
            evaluate(suite, together[0], self._client(together[0]), log)
            return
        with self._workers(together) as worker_of:
            obstacles = partial(self._window_obstacles, suite)
            SpeedGroup(suite, together, worker_of, log, self._rates, obstacles).run()

    def _window_obstacles(self, suite: Suite, cells: Sequence[Cell]) -> dict[str, str]:
        """Why cells of a group can't decode in turn in one worker, by cell id."""
        return window_obstacles(
            suite,
            cells,
            self._plan.models,
            isolated=lambda cell: self._isolated is not None and self._isolated.of(cell) is not None,
            free_bytes=lambda device: int(again(lambda: self._common.call("memory", {"device": device}))["free"]),
        )

    def _client(self, cell: Cell) -> Client:
        """The worker of a cell: an isolated one or the common one. Only one of them holds a GPU at a time, because the
        memory in use there is a figure of the device."""
        found = (self._isolated.of(cell) if self._isolated else None) or self._common
        if found is not self._last and cell.axes.device.startswith("cuda"):
            self._last.close()
        self._last = found
        return found

    @contextmanager
    def _workers(self, together: Sequence[Cell]) -> Iterator[Callable[[Cell], Client]]:
        """Which worker measures a cell."""
        unfinished = [cell for cell in together if self._log.open(cell)]
        if self._plan.suite.worker.mode == "shared" or len(unfinished) < 2 or not self._side_by_side(unfinished):
            yield self._client
            return
        known = {cell.id: self._client(cell).beside() for cell in together}
        try:
            yield lambda cell: known[cell.id]
        finally:
            for client in known.values():
                client.close()

    def _side_by_side(self, cells: Sequence[Cell]) -> bool:
        """Whether every cell can have a process while the others hold theirs."""
        axes = cells[0].axes
        model = self._plan.models.get(axes.model)
        if axes.device.startswith("cuda") or model is None:
            return False
        needed = 0.0
        for cell in cells:
            if not isinstance(cell.batch, int):
                return False
            needed += memory_of(cell, model, cell.batch) + PROCESS_BYTES
        free = again(lambda: self._common.call("memory", {"device": axes.device}))["free"]
        if needed <= SHARE * free:
            return True
        sizes = f"{needed / 2**30:.1f} GiB predicted, {free / 2**30:.1f} free"
        self._log.watcher.note(f"{len(cells)} cells share one fresh worker, side by side they may not fit: {sizes}")
        return False


def evaluate(suite: Suite, cell: Cell, client: Client, log: RunLog) -> None:
    """Brings a quality cell to its row."""
    log.begin(cell)
    log.watcher.cell(cell.id, "running")
    request = {"cell": cell.sent(), "quality": msgspec.to_builtins(suite.quality)}

    def progress(done: int, total: int, text: str) -> None:
        log.watcher.phase(text or f"{cell.axes.task} {done}/{total}", done, total)
        if not text:
            log.watcher.cell(cell.id, "running", share=done / max(1, total))

    try:
        found = again(lambda: client.call("evaluate", request, progress=progress))
    except D2OBenchError as problem:
        log.fail(cell, problem)
        return
    samples = Samples(log.folder, cell)
    samples.save(items=found["items"])
    log.end(
        cell,
        "ok",
        values=msgspec.convert(found["values"], dict[str, Value]),
        details={**found["details"], "model": found["model"]},
        flags=tuple(found["flags"]),
        samples=samples.name,
    )
