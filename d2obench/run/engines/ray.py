"""``--engine ray``: groups of cells run on the devices of a cluster and are recorded here, as a local run records them.

Design. For each device an actor reserves it (:mod:`d2obench.run.engines.ray_device`) and hosts the worker process. A
thread of this process runs group after group on it with the same code as a local run, so that rounds, rows, samples and
resume are the same too; only single operations cross the wire. A group stays on one device, because its rounds are
paired.

A worker that dies is handled as in a local run. When an actor dies or a node is lost, its group goes back to the queue
and another device of the same hardware goes on with it; a round that was cut in the middle is measured again there.
Nodes that join later are used. A run has one kind of hardware, told by its fingerprint; other devices are left out and
named.
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
from d2obench.run.engines.group_queue import GroupQueue, model_of
from d2obench.run.engines.ray_cluster import (
    ClusterDevice,
    check_devices,
    cluster_devices,
    connect,
    gpus_to_reserve,
    memory_to_reserve,
)
from d2obench.run.engines.ray_device import PATIENCE_S, LostError, RayClient, ReservedDevice, ScoutClient, StoppedError
from d2obench.run.engines.ray_host import Settings
from d2obench.run.plan import Plan, group
from d2obench.run.progress import LockedDisplay
from d2obench.run.run_log import RunLog, forget_cut_round
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
        cpus: cores reserved with each GPU; 0 shares a node's cores out evenly.
        resource: use only nodes with this Ray resource.
        allow_busy: measure even where other processes compute on a GPU.
        patience: seconds to wait for a device that is in use, or for a node when none is left.
        command: what the worker process runs after ``python``, in place of its own.
        env: variables of the worker process.
        say: is told what is waited for before a run.
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
        told = Settings(
            self.suite, tuple(command), env or {}, os.environ.get("OMP_NUM_THREADS", ""), whole_node=kind == "cpu"
        )
        self._settings = msgspec.json.encode(told)
        self._scout: ReservedDevice | None = None
        self._places: dict[ClusterDevice, ReservedDevice] = {}
        self._fatal: BaseException | None = None
        self._known: dict[str, Any] = {}

    @property
    def client(self) -> RayClient:
        """A worker on the first device that is free."""
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
        """Every cell gets its row on some device."""
        log.watcher = LockedDisplay(log.watcher)
        if plan.suite.within:
            log.watcher.note(f"within {plan.suite.within} is not kept on a cluster: every cell is measured in full")
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
        """``3 devices``: how many are held."""
        held = sum(place.held for place in list(self._places.values()))
        return f"{held} device{'s' * (held != 1)} of the cluster" if held else ""

    def close(self) -> None:
        """Gives all devices back and leaves the cluster; one that was started here ends."""
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
        watcher, device = log.watcher, plan.suite.axes.device[0]
        try:
            client = RayClient(place)
            if not place.hold(self._patience):
                watcher.note(f"{spot} is left out: other work of the cluster uses it")
                return
            facts = self._facts(client, device)
            if environment_hash(facts) != log.environment:
                differ = ", ".join(differences(self._known, facts))
                watcher.note(f"{spot} is left out: only like hardware is compared, and it differs in {differ}")
                failures[spot] = FAILURES
                return
            if self._kind == "cuda" and not self._allow_busy:
                client.call("refuse_busy", {"device": device, "own": [os.getpid()]})
            bench, warm = GroupRunner(plan, client, log), None
            while (cells := queue.next(warm)) is not None:
                warm = model_of(cells)
                try:
                    forget_cut_round(log.folder, [cell for cell in cells if log.open(cell)])
                    bench.run(cells)
                except LostError as loss:
                    self._moved(cells, spot, loss, log, queue)
                    return
                failures.pop(spot, None)
                queue.done()
        except StoppedError:
            pass
        except LostError as loss:
            watcher.note(f"{spot} is left out: {loss}")
        except RecordError as problem:
            self._fatal = problem
        except D2OBenchError as problem:
            watcher.note(f"{spot} is left out: {problem}")
        except BaseException as problem:
            self._fatal = problem
        finally:
            place.dismiss("*")
            place.leave()

    def _moved(
        self, cells: Sequence[Cell], spot: ClusterDevice, loss: LostError, log: RunLog, queue: GroupQueue
    ) -> None:
        """The group of a lost device waits for another one, or is given up; rows first, so that none is missing."""
        if queue.give_back(cells):
            log.watcher.note(f"{spot}: {loss}; its cells go on elsewhere")
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
        """A place at the first of these devices that comes free."""
        if not wanted:
            of = f" with the resource {self._resource}" if self._resource else ""
            what = "GPU" if self._kind == "cuda" else "CPU"
            raise WorkerError(f"the Ray cluster has no node{of} that offers a {what}", remedy="see ray status")
        until, said, why = time.monotonic() + self._patience, False, "all are in use"
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
            if not said:
                self._say("waiting for a device of the cluster: " + why)
                said = True
