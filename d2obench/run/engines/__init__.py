"""Where cells run: on this machine or on a cluster. One engine is chosen for a run, and only its module is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from d2obench.errors import RecordError
from d2obench.measure.environment import differences, environment_hash
from d2obench.record import CellRecord, Run, read_run
from d2obench.run.isolated_workers import IsolatedWorkers
from d2obench.run.plan import Plan, group
from d2obench.run.progress import Display, Vitals
from d2obench.run.run_folder import describe_run, locked, write_info
from d2obench.run.run_log import RunLog, finished
from d2obench.run.runner import GroupRunner
from d2obench.run.schedule import Schedule
from d2obench.run.tensor_parallel import client_for
from d2obench.run.worker_client import Client, WorkerClient, again
from d2obench.suite.definition import Suite

ENGINES = ("local", "ray", "slurm")


class Engine(Protocol):
    """Measures every cell and writes its row; how a cell is measured and recorded is the same for all engines."""

    suite: Suite
    """The suite, its devices named as far as the engine decides them."""

    @property
    def client(self) -> Client:
        """A worker to ask about models and devices before anything runs."""

    def environment(self, device: str, like: str = "") -> dict[str, Any]:
        """The fingerprint of the hardware and software that the cells will run on.

        Args:
            device: of the suite.
            like: the hash of an earlier part of the run; where there is hardware of several kinds, that one is chosen.
        """

    def run(self, plan: Plan, log: RunLog) -> None:
        """Every cell that has no row yet gets one.

        Raises:
            RecordError: the run folder can't be written any more.
            WorkerError: nothing is left to run on.
        """

    def vitals(self) -> str:
        """A few words on what works now, for the display. Any thread may ask."""

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
    """The engine ``local`` or ``ray``; the others are arguments of :class:`d2obench.run.engines.ray.RayEngine`."""
    if name == "ray":
        from d2obench.run.engines.ray import RayEngine

        return RayEngine(suite, address, cpus=cpus, resource=resource, allow_busy=allow_busy, say=say)
    from d2obench.run.engines import LocalEngine

    return LocalEngine(suite, python=python)


class LocalEngine:
    """Runs in the order of the suite, on ``client`` or on the worker that the suite asks for.

    ``python`` is the interpreter for cells of another library that can't share ours.
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
        for together in group(plan.cells):
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
    watcher: Display,
    *,
    command: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Runs a checked suite into a folder, or goes on with it.

    Args:
        plan: what to run.
        folder: a new run folder, or one to go on with.
        engine: where it runs.
        watcher: is told how it goes.
        command: the words it was started with, for the record.
        resume: go on with the run that is in the folder.

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
            records = _comparable(earlier, facts, watcher).cells
        else:
            write_info(folder, describe_run(plan.suite, plan.cells, facts, environment_hash(facts), command))
        log = RunLog(folder, watcher, finished(plan.cells, records), environment_hash(facts), plan.cells)
        for cell in plan.cells:
            if cell.id in plan.too_long and log.open(cell):
                log.end(cell, "skipped", reason=plan.too_long[cell.id])
        engine.run(plan, log)


def _comparable(run: Run, facts: Mapping[str, Any], watcher: Display) -> Run:
    """``run``, if its figures can stand beside those of this environment."""
    apart = run.info.environment.get("environments") != facts.get("environments")
    if apart or run.info.environment_hash != environment_hash(facts):
        other = ", ".join([*differences(run.info.environment, facts), *(["environments"] if apart else [])])
        raise RecordError(
            f"{run.path} was measured in another environment", why=f"it differs in {other}", remedy="start a new run"
        )
    for warning in run.warnings:
        watcher.note(warning)
    return run
