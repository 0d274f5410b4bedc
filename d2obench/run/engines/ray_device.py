"""GPU reservation on a Ray cluster: an actor holds one device, and the workers on it are clients of the runner.

Two cells never share a device: an actor reserves every core of a node, or whole GPUs, and does one operation at a time.
Ray gives the device to nobody else until the actor ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.run.engines.ray_cluster import ClusterDevice, alive
from d2obench.run.engines.ray_host import Answer, Host, Request
from d2obench.run.worker_client import Progress, revive
from d2obench.run.worker_process import DeadWorkerError

POLL_S = 0.5
PATIENCE_S = 600.0
"""How long a device that other work of the cluster uses is waited for."""


class LostError(Exception):
    """The device is gone, and the cell is not the cause: its group goes on elsewhere."""


class StoppedError(Exception):
    """The run is being stopped."""


class ReservedDevice:
    """An actor on a device.

    Args:
        ray: connected.
        spot: the device.
        settings: of the host, as JSON.
        stop: set when the run ends.
    """

    def __init__(self, ray: Any, spot: ClusterDevice, settings: bytes, stop: threading.Event) -> None:
        self.spot, self.held = spot, False
        self._ray, self._settings, self._stop = ray, settings, stop
        self._actor: Any = None
        self._ready: Any = None

    def hold(self, patience: float = PATIENCE_S) -> bool:
        """Whether the device is ours within ``patience`` seconds.

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
                    raise LostError(f"no worker can be started there: {_said(problem)}") from None
                self.held = True
            elif time.monotonic() >= until:
                self.leave()
                return False
        return True

    def ask(self, message: bytes, progress: Progress | None = None) -> bytes:
        """One :class:`Request` → one :class:`Answer`, both JSON.

        Raises:
            OutOfMemory: Ray ended the host because the node ran low on memory.
            LostError: the host or its node is gone.
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
            found: bytes = ray.get(answer)
            return found
        except ray.exceptions.OutOfMemoryError as problem:
            self.leave()
            raise OutOfMemory("out of memory", why=f"the node ran low: {_said(problem)}") from None
        except ray.exceptions.RayError as problem:
            self.leave()
            self._check()
            raise LostError(f"the worker's host ended: {_said(problem)}") from None

    def dismiss(self, worker: str) -> None:
        """Lets one worker process of this place end; ``*`` means all of them."""
        if self.held:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(self._actor.close.remote(worker), timeout=10)

    def leave(self) -> None:
        """Gives the device back. Any thread may ask."""
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
                max_concurrency=2,  # one operation, and somebody who asks how far it is
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=spot.node, soft=False),
            )
            .remote(self._settings)
        )


class RayClient:
    """One worker process at a place; the runner's :class:`d2obench.run.worker_client.Client`."""

    def __init__(self, place: ReservedDevice, name: str = "") -> None:
        self._place, self._name = place, name
        self._token, self._generation, self._others = "", 0, 0

    @property
    def generation(self) -> int:
        """How many processes this client has met."""
        return self._generation

    @property
    def pid(self) -> int | None:
        """Some number while a process is known to run."""
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
        if answer.error["kind"] == DeadWorkerError.__name__:
            raise DeadWorkerError(answer.error["what"], why=answer.error["why"])
        raise revive(answer.error)

    def beside(self) -> RayClient:
        """Another process at the same place."""
        self._others += 1
        return RayClient(self._place, f"{self._name}{self._others}.")

    def close(self) -> None:
        """Lets the process end; the place stays held."""
        self._token = ""
        with contextlib.suppress(D2OBenchError):
            self._place.dismiss(self._name)


class ScoutClient(RayClient):
    """A worker that is asked before a run: where it is lost, the run can't begin."""

    def call(
        self, op: str, args: Any = None, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """As :meth:`RayClient.call`; a device that is lost is a WorkerError."""
        try:
            return super().call(op, args, progress=progress, timeout_s=timeout_s)
        except LostError as loss:
            raise WorkerError("a device of the cluster was lost", why=str(loss), remedy="see ray status") from None


def _said(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(problem).__name__
