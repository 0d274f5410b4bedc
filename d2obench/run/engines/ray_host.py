"""The actor that holds one device of a node: it hosts the same worker process, by the same protocol, as a local run.

A crash, a hang and an out of memory are met by :class:`d2obench.run.worker_client.WorkerClient` on the node, and travel
as data. Messages are JSON: nothing but bytes is handed to Ray. This file imports no ray.
"""

from __future__ import annotations

import os
import uuid
from typing import Any

import msgspec

from d2obench.run.tensor_parallel import client_for
from d2obench.run.worker_client import WorkerClient, describe
from d2obench.run.worker_process import DeadWorkerError
from d2obench.suite.definition import Suite


class Settings(msgspec.Struct):
    """How worker processes are started on a node.

    ``command`` replaces the worker's own, ``env`` is laid over the node's variables. ``omp`` are the driver's CPU
    threads where they are set; where they are not, a place that has a whole node leaves torch its choice, as a local
    run does, in place of what Ray sets.
    """

    suite: Suite
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    omp: str = ""
    whole_node: bool = False

    def client(self) -> WorkerClient:
        """The first worker of this place."""
        if self.omp:
            os.environ["OMP_NUM_THREADS"] = self.omp
        elif self.whole_node:
            os.environ.pop("OMP_NUM_THREADS", None)
        if not self.command:
            return client_for(self.suite)
        worker = self.suite.worker
        return WorkerClient(env=self.env, timeout_s=worker.timeout_s, threads=worker.threads, command=self.command)


class Request(msgspec.Struct):
    """One operation of one worker. ``token`` is the process it must be done in; empty: whichever runs."""

    worker: str
    token: str
    op: str
    args: Any
    timeout_s: float | None


class Answer(msgspec.Struct):
    """``ok`` or ``error`` (see :func:`d2obench.run.worker_client.describe`), and the process that gave it."""

    token: str
    ok: dict[str, Any] | None = None
    error: dict[str, str] | None = None


class Host:
    """Worker processes of one device, by name; one operation at a time."""

    def __init__(self, settings: bytes) -> None:
        self._born = uuid.uuid4().hex[:8]
        self._clients = {"": msgspec.json.decode(settings, type=Settings).client()}
        self._progress: list[Any] = [0, 0, ""]

    def ready(self) -> int:
        """The process id, once the place is held."""
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
        """How far the operation is: ``[done, total, words]`` as JSON. May be asked while one runs."""
        return msgspec.json.encode(self._progress)

    def close(self, worker: str) -> None:
        """Lets one worker process end, or with ``*`` all of them."""
        for name, client in list(self._clients.items()):
            if worker in (name, "*"):
                client.close()
                if name:
                    del self._clients[name]

    def _token(self, worker: str, client: WorkerClient) -> str:
        return f"{self._born}/{worker}/{client.generation}" if client.pid is not None else ""
