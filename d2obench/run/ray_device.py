"""One device of a Ray cluster: the actor that reserves it, and the client through which the runner uses it.

The actor, :class:`Host`, runs on the node. It reserves every core of the node, or whole GPUs, which Ray gives to nobody
else until the actor ends, and does one operation at a time; so no two cells ever use a device at the same time. It
starts the same worker process as a local run, and its :class:`d2obench.run.worker_client.WorkerClient` handles crashes,
hangs and a lack of memory there. Requests and answers are JSON, so that Ray carries nothing but bytes.

On this side :class:`ReservedDevice` is the actor and :class:`RayClient` one worker process of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.run.ray_cluster import ClusterDevice, alive
from d2obench.run.tensor_parallel import client_for
from d2obench.run.worker_client import DeadWorkerError, Progress, WorkerClient, describe, revive
from d2obench.suite.definition import Suite

POLL_S = 0.5
PATIENCE_S = 600.0
"""Seconds to wait for a device that other work of the cluster uses."""


class LostError(Exception):
    """The device is gone for a reason that is not the cell's: its group continues on another device."""


class StoppedError(Exception):
    """The run is being stopped."""


class ReservedDevice:
    """A device, and the actor that reserves it once :meth:`hold` was called.

    Args:
        ray: the module, connected to a cluster.
        spot: the device.
        settings: :class:`Settings` as JSON.
        stop: is set when the run ends.
    """

    def __init__(self, ray: Any, spot: ClusterDevice, settings: bytes, stop: threading.Event) -> None:
        self.spot, self.held = spot, False
        self._ray, self._settings, self._stop = ray, settings, stop
        self._actor: Any = None
        self._ready: Any = None

    def hold(self, patience: float = PATIENCE_S) -> bool:
        """Reserves the device; false where it is not free within ``patience`` seconds.

        Raises:
            LostError: the node is gone, or no host can be started on it.
            StoppedError: the run ends.
        """
        ray, until = self._ray, time.monotonic() + patience
        if self._actor is None:
            self._actor = self._new()
            self._ready = self._actor.ready.remote()
        while not self.held:
            self._check()
            if ray.wait([self._ready], timeout=min(POLL_S, max(0.0, until - time.monotonic())))[0]:
                try:
                    ray.get(self._ready)
                except ray.exceptions.RayError as problem:
                    self.leave()
                    raise LostError(f"no worker can be started there: {_last_line(problem)}") from None
                self.held = True
            elif time.monotonic() >= until:
                self.leave()
                return False
        return True

    def ask(self, message: bytes, progress: Progress | None = None) -> bytes:
        """Sends a :class:`Request` as JSON; returns the :class:`Answer` as JSON.

        Raises:
            OutOfMemory: Ray ended the actor because the node ran low on memory.
            LostError: the actor or its node is gone.
            StoppedError: the run ends.
        """
        ray = self._ray
        if not self.held and not self.hold():
            raise LostError("its device did not come free")
        try:
            answer = self._actor.call.remote(message)
            while progress and not ray.wait([answer], timeout=POLL_S)[0]:
                done, total, words = msgspec.json.decode(ray.get(self._actor.progress.remote()))
                if total:
                    progress(int(done), int(total), str(words))
            reply: bytes = ray.get(answer)
            return reply
        except ray.exceptions.OutOfMemoryError as problem:
            self.leave()
            raise OutOfMemory("out of memory", why=f"the node ran low: {_last_line(problem)}") from None
        except ray.exceptions.RayError as problem:
            self.leave()
            self._check()
            raise LostError(f"the worker's host ended: {_last_line(problem)}") from None

    def dismiss(self, worker: str) -> None:
        """Lets one worker process on this device end; ``*`` stands for all of them."""
        if self.held:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(self._actor.close.remote(worker), timeout=10)

    def leave(self) -> None:
        """Gives the device back. Any thread may call it."""
        actor, self._actor, self.held = self._actor, None, False
        if actor is not None:
            with contextlib.suppress(Exception):  # Ray may be gone already
                self._ray.kill(actor)

    def _check(self) -> None:
        if self._stop.is_set():
            raise StoppedError
        if not alive(self._ray, self.spot.node):
            self.leave()
            raise LostError("the node is gone")

    def _new(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        spot = self.spot
        return (
            self._ray.remote(Host)
            .options(
                num_cpus=spot.cpus,
                num_gpus=spot.gpus,
                memory=spot.memory or None,
                max_concurrency=2,  # an operation, and a question how far it is
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=spot.node, soft=False),
            )
            .remote(self._settings)
        )


class RayClient:
    """The client (:class:`d2obench.run.worker_client.Client`) of one worker process on a reserved device."""

    def __init__(self, place: ReservedDevice, name: str = "") -> None:
        self._place, self._name = place, name
        self._token, self._generation, self._others = "", 0, 0

    @property
    def generation(self) -> int:
        """How many processes have answered so far: a new number means that nothing is warmed up or loaded."""
        return self._generation

    @property
    def pid(self) -> int | None:
        """A number while a process is known to run, and None otherwise; its real process id is of another machine."""
        return self._generation if self._token else None

    def call(
        self, op: str, args: Any = None, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Runs one operation on the node; raises as a local worker does, and what :meth:`ReservedDevice.ask` raises."""
        token, self._token = self._token, ""
        request = Request(self._name, token, op, args or {}, timeout_s)
        answer = msgspec.json.decode(self._place.ask(msgspec.json.encode(request), progress), type=Answer)
        self._generation += answer.token not in ("", token)
        self._token = answer.token
        if answer.error is None:
            return answer.ok or {}
        raise revive(answer.error)

    def beside(self) -> RayClient:
        """Another process on the same device."""
        self._others += 1
        return RayClient(self._place, f"{self._name}{self._others}.")

    def close(self) -> None:
        """Lets the process end; the device stays reserved."""
        self._token = ""
        with contextlib.suppress(D2OBenchError):
            self._place.dismiss(self._name)


class ScoutClient(RayClient):
    """The client of the worker that is asked about models and devices before a run begins."""

    def call(
        self, op: str, args: Any = None, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """As :meth:`RayClient.call`; a device that is lost is a WorkerError."""
        try:
            return super().call(op, args, progress=progress, timeout_s=timeout_s)
        except LostError as loss:
            raise WorkerError("a device of the cluster was lost", why=str(loss), remedy="see ray status") from None


def _last_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(problem).__name__


class Settings(msgspec.Struct):
    """How worker processes are started on a node.

    Args:
        suite: gives timeouts, threads and how a model is distributed.
        command: arguments of ``python`` that start another worker than ours, in tests.
        env: variables of the worker process, in addition to those of the node.
        omp: ``OMP_NUM_THREADS`` of the process that runs the suite; may be empty.
        whole_node: whether all cores of the node are reserved. Then, and if ``omp`` is empty, torch chooses the number
            of threads, as in a local run; otherwise it would be Ray's choice.
    """

    suite: Suite
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    omp: str = ""
    whole_node: bool = False

    def client(self) -> WorkerClient:
        """The client of the first worker on the device."""
        if self.omp:
            os.environ["OMP_NUM_THREADS"] = self.omp
        elif self.whole_node:
            os.environ.pop("OMP_NUM_THREADS", None)
        if not self.command:
            return client_for(self.suite)
        worker = self.suite.worker
        return WorkerClient(env=self.env, timeout_s=worker.timeout_s, threads=worker.threads, command=self.command)


class Request(msgspec.Struct):
    """One operation of one worker. ``token`` names the process that must do it; if it is empty, any may."""

    worker: str
    token: str
    op: str
    args: Any
    timeout_s: float | None


class Answer(msgspec.Struct):
    """The result ``ok``, or an ``error`` (see :func:`d2obench.run.worker_client.describe`), and the ``token`` of the
    process that it comes from."""

    token: str
    ok: dict[str, Any] | None = None
    error: dict[str, str] | None = None


class Host:
    """The Ray actor of one device: keeps its worker processes, by name, and does one operation at a time."""

    def __init__(self, settings: bytes) -> None:
        self._born = uuid.uuid4().hex[:8]
        self._clients = {"": msgspec.json.decode(settings, type=Settings).client()}
        self._progress: list[Any] = [0, 0, ""]

    def ready(self) -> int:
        """The actor's process id; Ray answers when the device is reserved."""
        return os.getpid()

    def call(self, message: bytes) -> bytes:
        """A :class:`Request` as JSON → an :class:`Answer` as JSON."""
        asked = msgspec.json.decode(message, type=Request)
        client = self._clients.get(asked.worker) or self._clients.setdefault(asked.worker, self._clients[""].beside())
        if asked.token and asked.token != self._token(asked.worker, client):
            lost = DeadWorkerError("the worker was lost between two operations")
            return msgspec.json.encode(Answer("", error=describe(lost)))
        self._progress = [0, 0, ""]

        def progress(done: int, total: int, words: str) -> None:
            self._progress = [done, total, words]

        try:
            ok = client.call(asked.op, asked.args, progress=progress, timeout_s=asked.timeout_s)
            answer = Answer(self._token(asked.worker, client), ok=ok)
        except Exception as problem:
            answer = Answer(self._token(asked.worker, client), error=describe(problem))
        return msgspec.json.encode(answer)

    def progress(self) -> bytes:
        """How far the present operation is: ``[done, total, words]`` as JSON. May be called while one runs."""
        return msgspec.json.encode(self._progress)

    def close(self, worker: str) -> None:
        """Lets one worker process end, or all of them (``*``)."""
        for name, client in list(self._clients.items()):
            if worker in (name, "*"):
                client.close()
                if name:
                    del self._clients[name]

    def _token(self, worker: str, client: WorkerClient) -> str:
        return f"{self._born}/{worker}/{client.generation}" if client.pid is not None else ""
