"""Tensor parallelism: several worker processes share one model and look like one worker.

Design. Each rank is an ordinary worker with torchrun's environment variables. All ranks get the same request and run
the same code, so that the collectives of the model meet. Rank 0's answer counts, with the memory and rates of all ranks
added up (:func:`combined`). The ranks connect over loopback when a model is first loaded.

A rank that fails leaves the others waiting in a collective. The first failure therefore ends all of them, after a short
time in which the others may fail too: where every rank raises the same clear error (a prompt that is too long), they
keep running. The next call starts new processes. A rank that hangs is ended after its timeout, as any worker is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.models.devices import RENDEZVOUS, TIMEOUT_S
from d2obench.run.worker_client import WORKER, Progress, WorkerClient
from d2obench.run.worker_process import DeadWorkerError, WorkerProcess
from d2obench.suite.definition import Placement, Suite

TOGETHER = ("load", "warm_up", "measure", "count", "evaluate")
"""Operations on a model: every rank runs them, and they meet in it."""
EACH = ("bandwidth", "rates")
"""Operations on a device that every rank asks of its own."""
GRACE_S = 3.0
"""How long ranks may take to fail by themselves once one of them has."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def client_for(suite: Suite) -> WorkerClient:
    """The worker, or the ranks, that a suite's models lie in."""
    placement, worker = suite.models, suite.worker
    if placement == Placement():
        return WorkerClient(timeout_s=worker.timeout_s, threads=worker.threads)
    command = (*WORKER, msgspec.json.encode(placement).decode())
    if placement.tensor_parallel == 1:
        return WorkerClient(timeout_s=worker.timeout_s, threads=worker.threads, command=command)
    cores = os.cpu_count() or 1
    return RankedClient(
        placement.tensor_parallel,
        {"CUDA_VISIBLE_DEVICES": ""} if set(suite.axes.device) == {"cpu"} else {},
        timeout_s=worker.timeout_s,
        threads=worker.threads or max(1, cores // placement.tensor_parallel),
        command=command,
    )


class RankedClient(WorkerClient):
    """As many workers as ``ranks``; this object is rank 0's client and holds the others'.

    Args:
        ranks: how many.
        env: as :class:`WorkerClient` has it.
        timeout_s: how long one of them may stay silent, and how long it waits for the others.
        threads: CPU threads of each.
        command: arguments after the interpreter.
    """

    def __init__(
        self,
        ranks: int,
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 1800.0,
        threads: int = 0,
        command: Sequence[str] = WORKER,
    ) -> None:
        super().__init__(env=env, timeout_s=timeout_s, threads=threads, command=command)
        self.peers = [
            WorkerClient(env=env, timeout_s=timeout_s, threads=threads, command=command) for _ in range(1, ranks)
        ]
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._joined = self._busy = False

    @property
    def ranks(self) -> int:
        """How many processes share a model."""
        return 1 + len(self.peers)

    @property
    def pid(self) -> int | None:
        """Rank 0's process id while all run; where one has ended, the others are ended too."""
        if self._joined and not self._busy and any(other.pid is None for other in self.peers):
            self.kill()
        return super().pid

    def call(
        self, op: str, args: Any = None, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """As :meth:`WorkerClient.call`; the error is that of the rank that failed first."""
        if op not in TOGETHER + EACH:
            return super().call(op, args, progress=progress, timeout_s=timeout_s)
        self._running()
        for other in self.peers:
            other._running()
        self._joined = True
        requests = [share(args or {}, rank, self.ranks) for rank in range(self.ranks)]
        work: list[Callable[[], dict[str, Any]]] = [
            lambda: super(RankedClient, self).call(op, requests[0], progress=progress, timeout_s=timeout_s)
        ]
        for other, request in zip(self.peers, requests[1:], strict=True):
            work.append(lambda other=other, request=request: other.call(op, request, timeout_s=timeout_s))  # type: ignore[misc]
        together = _Together(work, self._strike)
        self._busy = True
        try:
            answers = together.run()
        except BaseException:
            if not together.alike:
                self.kill()
            raise
        finally:
            self._busy = False
        return combined(op, answers)

    def beside(self) -> RankedClient:
        """As many more, which share a model of their own."""
        other = RankedClient(self.ranks, timeout_s=self.timeout_s, command=self.command)
        for mine, theirs in zip((self, *self.peers), (other, *other.peers), strict=True):
            theirs.env = dict(mine.env)
        return other

    def close(self) -> None:
        """Lets all of them end."""
        for client in self.peers:
            client.close()
        super().close()
        self._leave()

    def kill(self) -> None:
        """Ends all of them at once."""
        for client in self.peers:
            client.kill()
        super().kill()
        self._leave()

    def _running(self) -> WorkerProcess:
        if self.pid is None:
            self.kill()
            self._folder = tempfile.TemporaryDirectory(prefix="d2obench-ranks-")
            for rank, client in enumerate((self, *self.peers)):
                client.env = client.env | self._variables(rank, Path(self._folder.name) / "rendezvous")
        return super()._running()

    def _variables(self, rank: int, path: Path) -> dict[str, str]:
        own: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks}
        own |= {"LOCAL_WORLD_SIZE": self.ranks, RENDEZVOUS: path, TIMEOUT_S: self.timeout_s}
        sockets = {name: self.env.get(name, LOOPBACK) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return {**sockets, **{name: str(value) for name, value in own.items()}}

    def _strike(self) -> None:
        """Kills every process; whoever waits for its answer sees it die. Any thread may call it."""
        for client in (self, *self.peers):
            if client.started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(client.started, signal.SIGKILL)

    def _leave(self) -> None:
        self._joined = False
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _Together:
    """Calls that only end together: the first one in this thread, the others in threads of their own.

    Args:
        work: the calls.
        strike: ends all that still run.
    """

    def __init__(self, work: Sequence[Callable[[], dict[str, Any]]], strike: Callable[[], None]) -> None:
        self._work, self._strike = work, strike
        self._answers: dict[int, dict[str, Any]] = {}
        self._failures: list[D2OBenchError] = []
        self._struck = False
        self._change = threading.Condition()

    @property
    def alike(self) -> bool:
        """Whether all failed by themselves with the same clear error, so that none waits for another."""
        told = {(type(failure), failure.what) for failure in self._failures}
        unclear = any(isinstance(failure, WorkerError | OutOfMemory) for failure in self._failures)
        return len(self._failures) == len(self._work) and len(told) == 1 and not unclear and not self._struck

    def run(self) -> list[dict[str, Any]]:
        """All answers; or the failure that explains the others."""
        threads = [threading.Thread(target=self._one, args=(rank,), daemon=True) for rank in range(1, len(self._work))]
        threads.append(threading.Thread(target=self._guard, daemon=True))
        for thread in threads:
            thread.start()
        try:
            self._one(0)
        except BaseException:  # Ctrl-C: rank 0 has been killed
            self._strike()
            raise
        finally:
            for thread in threads:
                thread.join()
        if self._failures:
            raise min(self._failures, key=_priority)
        return [self._answers[rank] for rank in range(len(self._work))]

    def _one(self, rank: int) -> None:
        try:
            answer, failure = self._work[rank](), None
        except D2OBenchError as problem:
            answer, failure = {}, problem
        except BaseException:
            with self._change:
                self._answers[rank] = {}
                self._change.notify_all()
            raise
        with self._change:
            self._answers[rank] = answer
            if failure is not None and not self._struck:
                self._failures.append(failure)
            self._change.notify_all()

    def _guard(self) -> None:
        """Waits for the end, or for a failure and then a moment."""
        with self._change:
            self._change.wait_for(lambda: self._failures or self._over())
            if self._over() or self._change.wait_for(self._over, GRACE_S):
                return
            self._struck = True
        until = time.monotonic() + 60
        while time.monotonic() < until:  # one may be starting just now
            self._strike()
            with self._change:
                if self._change.wait_for(self._over, 0.5):
                    return

    def _over(self) -> bool:
        return len(self._answers) == len(self._work)


def _priority(failure: D2OBenchError) -> int:
    """Lost memory and a process that ended explain a broken connection, never the other way round."""
    if isinstance(failure, OutOfMemory):
        return 0
    return 1 if isinstance(failure, DeadWorkerError) else 2


def share(args: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """A request as one rank gets it: with its own GPU, and its part of a memory limit."""
    found = dict(args)
    if str(found.get("device", "")).startswith("cuda"):
        found["device"] = f"cuda:{rank}"
    for key in ("axes", "cell"):
        if isinstance(found.get(key), Mapping):
            found[key] = share(found[key], rank, ranks)
    if found.get("limit"):
        found["limit"] = int(found["limit"]) // ranks
    return found


def combined(op: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's answer, with the bytes and rates of all ranks added up."""
    found = dict(answers[0])
    if op == "bandwidth":
        return {**found, **{key: _total(answers, key) for key in ("bytes_per_s", "median")}}
    if op == "rates":
        return {key: _total(answers, key) for key in found}
    if op == "count":
        found |= {key: _total(answers, key) for key in ("flops_step", "fresh_step_bytes", "live_bytes") if key in found}
    models = [found, *answers[1:]] if op == "load" else [answer.get("model") for answer in answers]
    if all(isinstance(model, Mapping) and "weights_bytes" in model for model in models):
        held = {key: _total(models, key) for key in ("weights_bytes", "weights_read_bytes")}
        found = {**found, **held} if op == "load" else {**found, "model": {**found["model"], **held}}
    if op == "measure":
        found["trace"] = _trace([answer["trace"] for answer in answers])
    return found


def _trace(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's trace with the memory of all: peaks are added phase by phase, though they need not fall together."""
    first = dict(traces[0])
    first["peaks"] = {
        phase: {key: _total([trace["peaks"].get(phase, {}) for trace in traces], key) for key in peaks}
        for phase, peaks in first["peaks"].items()
    }
    if first.get("uss_bytes") is not None:
        first["uss_bytes"] = _total(traces, "uss_bytes")
    first["flags"] = list(dict.fromkeys(flag for trace in traces for flag in trace["flags"]))
    if len({trace["tokens_digest"] for trace in traces}) > 1:
        first["flags"].append("the ranks' tokens differ")
    return first


def _total(parts: Sequence[Any], key: str) -> Any:
    return sum(part.get(key) or 0 for part in parts)
