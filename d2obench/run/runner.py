"""Runs a plan: :func:`run_suite` hands it to an engine, and the engine's :class:`GroupRunner` measures its groups.

An engine is a place where cells run. :class:`LocalEngine` is this machine, ``d2obench.run.ray_engine`` a Ray cluster,
which is imported only where it is asked for. Both measure every group of cells by the same code, on one device.

With ``worker.mode = "fresh"`` every cell has a process of its own. Timed cells are measured in turn, so the processes
of a group exist at the same time: one measures while the others wait. In three cases the group shares one fresh process
instead: on a GPU, where the memory in use would include that of the waiting processes; with batch ``max``, which fills
the memory; and where the memory is too small for all processes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from d2obench.errors import RecordError
from d2obench.measure.environment import differences, environment_hash
from d2obench.record import CellRecord, Run, read_run
from d2obench.run.isolated_workers import IsolatedWorkers
from d2obench.run.plan import Plan, group, shares
from d2obench.run.predict import memory_of
from d2obench.run.progress import Display, Vitals
from d2obench.run.quality import QualityGroup, evaluate
from d2obench.run.run_folder import RunLog, describe_run, finished, locked, write_info
from d2obench.run.schedule import Schedule
from d2obench.run.speed import SpeedGroup
from d2obench.run.speed_row import DeviceRates
from d2obench.run.speed_windows import window_obstacles
from d2obench.run.tensor_parallel import client_for
from d2obench.run.worker_client import Client, WorkerClient, again
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell


class Engine(Protocol):
    """A place where cells run; how a cell is measured and recorded is the same for all engines."""

    suite: Suite
    """The suite; an engine may have replaced the names of its devices."""

    @property
    def client(self) -> Client:
        """A worker to ask about models and devices before anything runs."""

    def environment(self, device: str, like: str = "") -> dict[str, Any]:
        """The fingerprint of the hardware and software that the cells will run on.

        Args:
            device: of the suite.
            like: the hash of the fingerprint that a run was begun with, where it goes on now; of several kinds of
                hardware, the one with this hash is chosen.
        """

    def run(self, plan: Plan, log: RunLog) -> None:
        """Every cell that has no row yet gets one.

        Raises:
            RecordError: the run folder can't be written any more.
            WorkerError: nothing is left to run on.
        """

    def vitals(self) -> str:
        """A few words for the display on the memory or the devices in use. Any thread may call it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_engine(
    name: str,
    suite: Suite,
    *,
    address: str = "",
    cpus: float = 0.0,
    resource: str = "",
    allow_busy: bool = False,
    python: Path | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Engine:
    """The engine ``local`` or ``ray``; see :class:`LocalEngine` and :class:`d2obench.run.ray_engine.RayEngine`."""
    if name == "ray":
        from d2obench.run.ray_engine import RayEngine

        return RayEngine(suite, address, cpus=cpus, resource=resource, allow_busy=allow_busy, say=say)
    return LocalEngine(suite, python=python)


class LocalEngine:
    """Runs the groups on this machine, in the order of the suite.

    Args:
        suite: as read.
        client: the worker; by default the one that the suite asks for.
        python: an interpreter for policies of kvpress, in place of the managed environment's.
    """

    def __init__(self, suite: Suite, client: WorkerClient | None = None, python: Path | None = None) -> None:
        self.suite, self.client = suite, client or client_for(suite)
        self._isolated = IsolatedWorkers(suite, python)
        self._versions: dict[str, dict[str, Any]] = {}
        self._vitals = Vitals(self.client)

    def environment(self, device: str, like: str = "") -> dict[str, Any]:
        """The fingerprint of this machine."""
        facts = again(lambda: self.client.call("environment", {"device": device}))
        return {**facts, "environments": self._versions} if self._versions else facts

    def run(self, plan: Plan, log: RunLog) -> None:
        """Brings every cell to its row."""
        runner = GroupRunner(plan, self.client, log, self._isolated)
        schedule = Schedule(plan, log)
        schedule.probe(self.client)
        for together in group(plan.cells, shared=shares(plan.suite)):
            suite = schedule.begin(together)
            if suite is not None:
                runner.run(together, suite)
                schedule.end(together)

    def vitals(self) -> str:
        """Memory of the worker."""
        return self._vitals()

    def __enter__(self) -> Self:
        self._versions = self._isolated.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._isolated.close()


def run_suite(
    plan: Plan,
    folder: Path,
    engine: Engine,
    display: Display,
    *,
    command: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Runs a checked suite into a folder, or goes on with it.

    Args:
        plan: what to run.
        folder: a new run folder, or one to go on with.
        engine: where it runs.
        display: is told what goes on.
        command: the command line, for the record.
        resume: whether to go on with the run that is in the folder.

    Raises:
        RecordError: another process uses the folder, it can't be written, or what is in it was measured on a machine
            or software whose figures can't stand beside this one's.
        WorkerError: nothing is left to run on.
    """
    with locked(folder):
        earlier = read_run(folder) if resume else None
        device = plan.suite.axes.device[0]
        facts = engine.environment(device, like=earlier.info.environment_hash if earlier else "")
        records: tuple[CellRecord, ...] = ()
        if earlier:
            records = _comparable(earlier, facts, display).cells
        else:
            write_info(folder, describe_run(plan.suite, plan.cells, facts, environment_hash(facts), command))
        log = RunLog(folder, display, finished(plan.cells, records), environment_hash(facts), plan.cells)
        for cell in plan.cells:
            if cell.id in plan.too_long and log.open(cell):
                log.end(cell, "skipped", reason=plan.too_long[cell.id])
        engine.run(plan, log)


def _comparable(run: Run, facts: Mapping[str, Any], display: Display) -> Run:
    """``run``, or a RecordError where its figures can't be compared with figures measured in this environment."""
    apart = run.info.environment.get("environments") != facts.get("environments")
    if apart or run.info.environment_hash != environment_hash(facts):
        other = ", ".join([*differences(run.info.environment, facts), *(["environments"] if apart else [])])
        raise RecordError(
            f"{run.path} was measured in another environment", why=f"it differs in {other}", remedy="start a new run"
        )
    for warning in run.warnings:
        display.note(warning)
    return run


MEMORY_SHARE = 0.8
"""Largest share of the free memory that the processes of a group may be predicted to take together."""
PROCESS_BYTES = 512 * 2**20
"""Memory of a process that has imported its libraries and loaded no model, roughly."""


class GroupRunner:
    """Measures groups of cells one after another on one device.

    Args:
        plan: the run's cells and the dimensions of its models.
        client: the common worker, which keeps its model loaded from group to group.
        log: knows the rows that are written already, and takes the new ones.
        isolated: the workers of cells that can't use the common one.
    """

    def __init__(self, plan: Plan, client: Client, log: RunLog, isolated: IsolatedWorkers | None = None) -> None:
        self._plan, self._common, self._log, self._isolated = plan, client, log, isolated
        self._last = client
        self._rates = DeviceRates(client, log.display)

    def run(self, together: Sequence[Cell], suite: Suite | None = None) -> None:
        """Measures every cell of one group that has no row yet, and writes its row.

        Args:
            together: the group.
            suite: in place of the plan's, with fewer rounds or items.

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
            self._run_quality(suite, [cell for cell in together if log.open(cell)])
            return
        with self._workers(together) as worker_of:
            obstacles = partial(self._window_obstacles, suite)
            SpeedGroup(suite, together, worker_of, log, self._rates, obstacles).run()

    def _run_quality(self, suite: Suite, cells: Sequence[Cell]) -> None:
        """Runs quality cells that differ in policy and budget alone, those of one worker together as far as they can
        take turns."""
        by_worker: dict[int, list[Cell]] = {}
        alone = []
        for cell in cells:
            if cell.policy.carries_over or not (cell.task and cell.task.in_batches):
                alone.append(cell)
            else:
                by_worker.setdefault(id(self._worker(cell)), []).append(cell)
        for alike in by_worker.values():
            QualityGroup(suite, alike, self._client(alike[0]), self._log).run()
        for cell in alone:
            evaluate(suite, cell, self._client(cell), self._log)

    def _window_obstacles(self, suite: Suite, cells: Sequence[Cell]) -> dict[str, str]:
        """Why cells of a group can't be measured in windows, by cell id."""
        return window_obstacles(
            suite,
            cells,
            self._plan.models,
            isolated=lambda cell: self._isolated is not None and self._isolated.of(cell) is not None,
            free_bytes=lambda device: int(again(lambda: self._common.call("memory", {"device": device}))["free"]),
        )

    def _worker(self, cell: Cell) -> Client:
        """The worker of a cell: an isolated one or the common one."""
        return (self._isolated.of(cell) if self._isolated else None) or self._common

    def _client(self, cell: Cell) -> Client:
        """The worker of a cell, ready to be called.

        Only one of them may have a process on a GPU, because the driver reports the memory of all processes together.
        """
        client = self._worker(cell)
        if client is not self._last and cell.axes.device.startswith("cuda"):
            self._last.close()
        self._last = client
        return client

    @contextmanager
    def _workers(self, together: Sequence[Cell]) -> Iterator[Callable[[Cell], Client]]:
        """A function from a cell of the group to the worker that measures it."""
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
        """Whether each of these cells can have a process of its own at the same time."""
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
        if needed <= MEMORY_SHARE * free:
            return True
        sizes = f"{needed / 2**30:.1f} GiB predicted, {free / 2**30:.1f} free"
        self._log.display.note(f"{len(cells)} cells share one fresh worker, side by side they may not fit: {sizes}")
        return False
