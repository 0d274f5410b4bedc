"""``--engine ray``: groups of cells run on the devices of a Ray cluster and are recorded on this machine.

Each device is reserved by a Ray actor, which starts the worker process there (:mod:`d2obench.run.ray_device`). For each
device a thread of this process takes group after group from a queue and measures it with the same code as a local run;
only single operations of the worker are sent over the network. So rounds, rows, samples and ``--resume`` are the same
as in a local run. A group stays on one device, because its rounds are paired.

A worker that dies is handled as in a local run. Where an actor dies or a node is lost, its group goes back to the queue
and another device goes on with it; an incomplete round is measured again there. Nodes that join during the run are
used. All devices of a run must have the same fingerprint; others are left out with a note.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from d2obench import __version__
from d2obench.errors import D2OBenchError, RecordError, WorkerError
from d2obench.measure.environment import differences, environment_hash
from d2obench.run.plan import Plan, group
from d2obench.run.progress import LockedDisplay
from d2obench.run.ray_cluster import (
    ClusterDevice,
    check_devices,
    cluster_devices,
    connect,
    gpus_to_reserve,
    memory_to_reserve,
)
from d2obench.run.ray_device import (
    PATIENCE_S,
    LostError,
    RayClient,
    ReservedDevice,
    ScoutClient,
    Settings,
    StoppedError,
)
from d2obench.run.run_folder import RunLog, forget_cut_round
from d2obench.run.runner import GroupRunner
from d2obench.run.worker_client import again
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

SCAN_S = 2.0
"""How often the cluster is asked for nodes that have joined."""
FAILURES = 3
"""How often a device may fail to serve before it is left alone."""


class RayEngine:
    """Runs on a Ray cluster.

    Args:
        suite: as read; gives timeouts, threads and how a model is placed.
        address: of a running cluster; empty starts one on this machine.
        cpus: cores reserved with each GPU; 0 divides a node's cores evenly among its GPUs.
        resource: only nodes with this Ray resource are used.
        allow_busy: whether other processes may compute on the GPUs meanwhile.
        patience: seconds to wait for a device that is in use, or for a node when none is left.
        command: arguments of ``python`` that start another worker than ours, in tests.
        env: variables of the worker process.
        say: is told what the engine waits for before a run.
    """

    def __init__(
        self,
        suite: Suite,
        address: str = "",
        *,
        cpus: float = 0.0,
        resource: str = "",
        allow_busy: bool = False,
        patience: float = PATIENCE_S,
        command: Sequence[str] = (),
        env: dict[str, str] | None = None,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        check_devices(suite)
        self._ray, self._ours = connect(address)
        self._cpus, self._resource, self._patience, self._say = cpus, resource, patience, say
        self._stop, self._allow_busy = threading.Event(), allow_busy
        kind = suite.axes.device[0].partition(":")[0]
        if kind == "auto":
            kind = "cuda" if any(node["Resources"].get("GPU", 0) for node in self._ray.nodes()) else "cpu"
        self._kind = kind
        self.suite = msgspec.structs.replace(suite, axes=msgspec.structs.replace(suite.axes, device=(kind,)))
        settings = Settings(
            self.suite, tuple(command), env or {}, os.environ.get("OMP_NUM_THREADS", ""), whole_node=kind == "cpu"
        )
        self._settings = msgspec.json.encode(settings)
        self._scout: ReservedDevice | None = None
        self._places: dict[ClusterDevice, ReservedDevice] = {}
        self._fatal: BaseException | None = None
        self._known: dict[str, Any] = {}

    @property
    def client(self) -> RayClient:
        """The client of a worker on the first device that is free."""
        if self._scout is None:
            self._scout = self._first(self._spots())
        return ScoutClient(self._scout)

    def environment(self, device: str, like: str = "") -> dict[str, Any]:
        """The fingerprint of the first device, or of the first whose hash is ``like``."""
        self._known = self._facts(self.client, device)
        for spot in self._spots() if like else ():
            if environment_hash(self._known) == like:
                break
            if self._scout is None or spot.node == self._scout.spot.node:
                continue
            self._scout.leave()
            self._scout = self._first([spot])
            self._known = self._facts(self.client, device)
        return self._known

    def run(self, plan: Plan, log: RunLog) -> None:
        """Measures every cell on some device."""
        log.display = LockedDisplay(log.display)
        if plan.suite.within:
            log.display.note(f"within {plan.suite.within} is not kept on a cluster: every cell is measured in full")
        queue = GroupQueue([one for one in group(plan.cells) if any(log.open(cell) for cell in one)])
        memory = memory_to_reserve(plan)
        threads: dict[ClusterDevice, threading.Thread] = {}
        failures: dict[ClusterDevice, int] = {}
        if self._scout is not None:
            self._scout.leave()
            self._scout = None
        self._fatal, deadline, scanned = None, time.monotonic() + self._patience, 0.0
        try:
            while not queue.wait(0.2):
                if self._fatal is not None:
                    raise self._fatal
                if any(thread.is_alive() for thread in threads.values()):
                    deadline = time.monotonic() + self._patience
                elif time.monotonic() > deadline:
                    raise WorkerError(
                        "no device of the cluster is left to run on", remedy="bring nodes back and go on with --resume"
                    )
                if time.monotonic() < scanned + SCAN_S:
                    continue
                for spot in self._spots(memory):
                    idle = spot not in threads or not threads[spot].is_alive()
                    if idle and failures.get(spot, 0) < FAILURES:
                        failures[spot] = failures.get(spot, 0) + 1
                        serve = threading.Thread(
                            target=self._serve,
                            args=(spot, plan, log, queue, failures),
                            name=str(spot),
                            daemon=True,
                        )
                        threads[spot] = serve
                        serve.start()
                scanned = time.monotonic()
            if self._fatal is not None:
                raise self._fatal
        finally:
            queue.stop()
            self._stop.set()
            if self._fatal is not None or not queue.finished:
                for place in list(self._places.values()):
                    place.leave()
            for thread in threads.values():
                thread.join(30)
            self._stop.clear()

    def vitals(self) -> str:
        """``3 devices of the cluster``: how many are reserved now."""
        held = sum(place.held for place in list(self._places.values()))
        return f"{held} device{'s' * (held != 1)} of the cluster" if held else ""

    def close(self) -> None:
        """Gives all devices back and disconnects; a cluster that was started here is stopped."""
        if self._scout is not None:
            self._scout.leave()
            self._scout = None
        if self._ours:
            self._ray.shutdown()

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(
        self, spot: ClusterDevice, plan: Plan, log: RunLog, queue: GroupQueue, failures: dict[ClusterDevice, int]
    ) -> None:
        """Runs group after group on one device, until none is left or the device is lost."""
        place = self._places[spot] = ReservedDevice(self._ray, spot, self._settings, self._stop)
        display, device = log.display, plan.suite.axes.device[0]
        try:
            client = RayClient(place)
            if not place.hold(self._patience):
                display.note(f"{spot} is left out: other work of the cluster uses it")
                return
            facts = self._facts(client, device)
            if environment_hash(facts) != log.environment:
                differ = ", ".join(differences(self._known, facts))
                display.note(f"{spot} is left out: only like hardware is compared, and it differs in {differ}")
                failures[spot] = FAILURES
                return
            if self._kind == "cuda" and not self._allow_busy:
                client.call("refuse_busy", {"device": device, "own": [os.getpid()]})
            runner, warm = GroupRunner(plan, client, log), None
            while (cells := queue.next(warm)) is not None:
                warm = model_of(cells)
                try:
                    forget_cut_round(log.folder, [cell for cell in cells if log.open(cell)])
                    runner.run(cells)
                except LostError as loss:
                    self._moved(cells, spot, loss, log, queue)
                    return
                failures.pop(spot, None)
                queue.done()
        except StoppedError:
            pass
        except LostError as loss:
            display.note(f"{spot} is left out: {loss}")
        except RecordError as problem:
            self._fatal = problem
        except D2OBenchError as problem:
            display.note(f"{spot} is left out: {problem}")
        except BaseException as problem:
            self._fatal = problem
        finally:
            place.dismiss("*")
            place.leave()

    def _moved(
        self, cells: Sequence[Cell], spot: ClusterDevice, loss: LostError, log: RunLog, queue: GroupQueue
    ) -> None:
        """Puts the group of a lost device back into the queue, or writes its rows where that has happened too often."""
        if queue.give_back(cells):
            log.display.note(f"{spot}: {loss}; its cells go on elsewhere")
            return
        for cell in cells:
            if log.open(cell):
                log.fail(cell, WorkerError("its devices were lost again and again", why=str(loss)))

    def _facts(self, client: RayClient, device: str) -> dict[str, Any]:
        facts = again(lambda: client.call("environment", {"device": device}))
        if facts.get("d2obench", __version__) not in (__version__, None):
            raise WorkerError(
                f"a node of the cluster has d2obench {facts['d2obench']}",
                why=f"this is {__version__}",
                remedy="install the same version on every node",
            )
        return facts

    def _spots(self, memory: int = 0) -> list[ClusterDevice]:
        gpus = gpus_to_reserve(self.suite)
        return cluster_devices(
            self._ray, self._kind, gpus=gpus, cpus=self._cpus, memory=memory, resource=self._resource
        )

    def _first(self, wanted: Sequence[ClusterDevice]) -> ReservedDevice:
        """Reserves the first of these devices that is free."""
        if not wanted:
            of = f" with the resource {self._resource}" if self._resource else ""
            what = "GPU" if self._kind == "cuda" else "CPU"
            raise WorkerError(f"the Ray cluster has no node{of} that offers a {what}", remedy="see ray status")
        until, told, why = time.monotonic() + self._patience, False, "all are in use"
        while True:
            for spot in wanted:
                place = ReservedDevice(self._ray, spot, self._settings, self._stop)
                try:
                    if place.hold(min(10.0, self._patience)):
                        return place
                except LostError as loss:
                    why = str(loss)
            if time.monotonic() > until:
                raise WorkerError("no device of the Ray cluster came free", why=why, remedy="see ray status")
            if not told:
                self._say("waiting for a device of the cluster: " + why)
                told = True


LOSSES = 3
"""How often a group may lose its device before its cells fail."""
Model = tuple[str, str]


def model_of(cells: Sequence[Cell]) -> Model:
    """The model and the dtype that a worker needs for a group."""
    return cells[0].axes.model, cells[0].axes.dtype


class GroupQueue:
    """The groups of a run that wait for a device; the threads of all devices take from it.

    A group that was taken is either finished (:meth:`done`) or comes back because its device was lost
    (:meth:`give_back`).
    """

    def __init__(self, groups: Sequence[Sequence[Cell]]) -> None:
        self._waiting = [list(cells) for cells in groups]
        self._taken = 0
        self._losses: dict[str, int] = {}
        self._over = False
        self._change = threading.Condition()

    def next(self, warm: Model | None = None) -> list[Cell] | None:
        """The next group: the first whose model is ``warm`` (loaded on the device), or else the first.

        Returns:
            None when no group is left. While other threads have groups that may come back, it waits.
        """
        with self._change:
            while not self._over and not self._waiting and self._taken:
                self._change.wait()
            if self._over or not self._waiting:
                return None
            first = next((i for i, cells in enumerate(self._waiting) if model_of(cells) == warm), 0)
            self._taken += 1
            return self._waiting.pop(first)

    def done(self) -> None:
        """A group that was taken has all its rows."""
        with self._change:
            self._taken -= 1
            self._change.notify_all()

    def give_back(self, cells: Sequence[Cell]) -> bool:
        """A group that was taken has lost its device; false where that has happened too often and it must fail."""
        with self._change:
            self._taken -= 1
            losses = self._losses[cells[0].id] = self._losses.get(cells[0].id, 0) + 1
            if losses < LOSSES:
                self._waiting.insert(0, list(cells))
            self._change.notify_all()
            return losses < LOSSES

    def stop(self) -> None:
        """From now on :meth:`next` returns None to every thread."""
        with self._change:
            self._over = True
            self._change.notify_all()

    def wait(self, seconds: float) -> bool:
        """Whether all groups are done; waits for that up to ``seconds``."""
        with self._change:
            return self._change.wait_for(lambda: self.finished, seconds)

    @property
    def finished(self) -> bool:
        """Whether every group has its rows."""
        return not self._waiting and not self._taken
