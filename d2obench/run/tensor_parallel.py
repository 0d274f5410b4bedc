"""Tensor parallelism: several worker processes ("ranks") share one model; to the runner they are one worker.

Each rank is an ordinary worker with torchrun's environment variables. All ranks get the same request and run the same
code, so that each collective operation of the model is called by all of them. The answer is that of rank 0, with the
memory and the rates of all ranks added up (:func:`combined`). The ranks connect over loopback when a model is first
loaded.

When a rank fails, the others wait for it in a collective operation for ever. So after the first failure the others have
a short time to fail as well, and then all are killed; the next call starts new processes. They are kept only where all
ranks have raised the same clear error, such as a prompt that is too long. A rank that hangs is killed after its
timeout, like any worker. After a fault of one GPU all ranks do without the part of the GPU path that failed.
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
from d2obench.run.worker_client import WORKER, DeadWorkerError, DeviceFaultError, Progress, WorkerClient, WorkerProcess
from d2obench.suite.definition import Placement, Suite

TOGETHER = ("load", "warm_up", "measure", "count", "evaluate", "evaluate_part", "conclude")
"""Operations on the model, which all ranks run together."""
EACH = ("bandwidth", "rates")
"""Operations on a device, which every rank runs on its own device."""
GRACE_S = 3.0
"""Seconds that the other ranks have to fail by themselves once one of them has."""
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def client_for(suite: Suite) -> WorkerClient:
    """The client of the worker, or of the ranks, for the models of a suite."""
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
    """The clients of all ranks: this object is the client of rank 0 and keeps those of the others.

    Args:
        ranks: number of processes.
        env: see :class:`WorkerClient`.
        timeout_s: how long a rank may stay silent, and how long it waits for the others.
        threads: CPU threads of each rank.
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
        """Rank 0's process id while all ranks run; where one has ended, the others are killed here."""
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
        requests = [request_of_rank(args or {}, rank, self.ranks) for rank in range(self.ranks)]
        work: list[Callable[[], dict[str, Any]]] = [
            lambda: super(RankedClient, self).call(op, requests[0], progress=progress, timeout_s=timeout_s)
        ]
        for other, request in zip(self.peers, requests[1:], strict=True):
            work.append(lambda other=other, request=request: other.call(op, request, timeout_s=timeout_s))  # type: ignore[misc]
        calls = _RankCalls(work, self._kill_processes)
        self._busy = True
        try:
            answers = calls.run()
        except BaseException as problem:
            if isinstance(problem, DeviceFaultError):  # ranks that take different paths would not compute the same
                for client in (self, *self.peers):
                    client._do_without(args, problem)
            if not calls.failed_alike:
                self.kill()
            raise
        finally:
            self._busy = False
        return combined(op, answers)

    def beside(self) -> RankedClient:
        """The same number of new ranks, which share another copy of the model."""
        other = RankedClient(self.ranks, timeout_s=self.timeout_s, command=self.command)
        for ours, new in zip((self, *self.peers), (other, *other.peers), strict=True):
            new.env = dict(ours.env)
        return other

    def close(self) -> None:
        """Lets all ranks end."""
        for client in self.peers:
            client.close()
        super().close()
        self._leave()

    def kill(self) -> None:
        """Kills all ranks."""
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
        """torchrun's environment variables of a rank; ``path`` is the file through which the ranks find each other."""
        own: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks}
        own |= {"LOCAL_WORLD_SIZE": self.ranks, RENDEZVOUS: path, TIMEOUT_S: self.timeout_s}
        sockets = {name: self.env.get(name, LOOPBACK) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        return {**sockets, **{name: str(value) for name, value in own.items()}}

    def _kill_processes(self) -> None:
        """Kills every process, so that the threads that wait for their answers go on. Any thread may call it."""
        for client in (self, *self.peers):
            if client.started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(client.started, signal.SIGKILL)

    def _leave(self) -> None:
        self._joined = False
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _RankCalls:
    """One call for each rank, all at the same time: rank 0's in this thread, the others in threads of their own.

    Args:
        work: the calls.
        kill: ends all processes, and with them the calls that still run.
    """

    def __init__(self, work: Sequence[Callable[[], dict[str, Any]]], kill: Callable[[], None]) -> None:
        self._work, self._kill = work, kill
        self._answers: dict[int, dict[str, Any]] = {}
        """By rank; an empty one where the call has failed."""
        self._failures: list[D2OBenchError] = []
        self._killed = False
        self._change = threading.Condition()

    @property
    def failed_alike(self) -> bool:
        """Whether all ranks have failed by themselves with the same clear error, so that none waits for another."""
        errors = {(type(failure), failure.what) for failure in self._failures}
        unclear = any(isinstance(failure, WorkerError | OutOfMemory) for failure in self._failures)
        return len(self._failures) == len(self._work) and len(errors) == 1 and not unclear and not self._killed

    def run(self) -> list[dict[str, Any]]:
        """The answers of all ranks; raises the failure that explains the others where one has failed."""
        threads = [threading.Thread(target=self._call, args=(rank,), daemon=True) for rank in range(1, len(self._work))]
        threads.append(threading.Thread(target=self._end_after_failure, daemon=True))
        for thread in threads:
            thread.start()
        try:
            self._call(0)
        except BaseException:  # Ctrl-C has killed rank 0
            self._kill()
            raise
        finally:
            for thread in threads:
                thread.join()
        if self._failures:
            raise min(self._failures, key=_priority)
        return [self._answers[rank] for rank in range(len(self._work))]

    def _call(self, rank: int) -> None:
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
            if failure is not None and not self._killed:  # a failure after the kill is only its consequence
                self._failures.append(failure)
            self._change.notify_all()

    def _end_after_failure(self) -> None:
        """Waits until all calls have ended; after a failure, kills those that have not ended in time."""
        # 1. All have ended, or one has failed and the others end within a short time.
        with self._change:
            self._change.wait_for(lambda: self._failures or self._over())
            if self._over() or self._change.wait_for(self._over, GRACE_S):
                return
            self._killed = True
        # 2. Kill the others, repeatedly, because a process may be starting just now.
        until = time.monotonic() + 60
        while time.monotonic() < until:
            self._kill()
            with self._change:
                if self._change.wait_for(self._over, 0.5):
                    return

    def _over(self) -> bool:
        return len(self._answers) == len(self._work)


def _priority(failure: D2OBenchError) -> int:
    """Order of failures, causes first: too little memory, a fault of a GPU, a dead process, and then what follows from
    these, such as a broken connection."""
    order = (OutOfMemory, DeviceFaultError, DeadWorkerError)
    return next((place for place, kind in enumerate(order) if isinstance(failure, kind)), len(order))


def request_of_rank(args: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """A request as one rank gets it: with its own GPU, and with its part of a memory limit."""
    request = dict(args)
    if str(request.get("device", "")).startswith("cuda"):
        request["device"] = f"cuda:{rank}"
    for key in ("axes", "cell"):
        if isinstance(request.get(key), Mapping):
            request[key] = request_of_rank(request[key], rank, ranks)
    if request.get("limit"):
        request["limit"] = int(request["limit"]) // ranks
    return request


def combined(op: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's answer, with the bytes and rates of all ranks added up."""
    answer = dict(answers[0])
    # 1. Rates of devices, and counts of what each rank does for its own part of the heads.
    if op == "bandwidth":
        return {**answer, **{key: _total(answers, key) for key in ("bytes_per_s", "median")}}
    if op == "rates":
        return {key: _total(answers, key) for key in answer}
    if op == "count":
        parts = ("flops_step", "fresh_step_bytes", "live_bytes")
        answer |= {key: _total(answers, key) for key in parts if key in answer}
    # 2. Weights, in the description of the model: the answer itself, or its key "model".
    models = [answer, *answers[1:]] if op == "load" else [other.get("model") for other in answers]
    if all(isinstance(model, Mapping) and "weights_bytes" in model for model in models):
        weights = {key: _total(models, key) for key in ("weights_bytes", "weights_read_bytes")}
        answer = {**answer, **weights} if op == "load" else {**answer, "model": {**answer["model"], **weights}}
    # 3. Memory of a request.
    if op == "measure":
        answer["trace"] = _trace([other["trace"] for other in answers])
    return answer


def _trace(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's trace with the memory of all ranks. The peaks of a phase are added up, although the ranks may have
    reached them at different times."""
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
