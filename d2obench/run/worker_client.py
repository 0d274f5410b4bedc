"""A worker process and the protocol spoken with it: one JSON object a line, over two pipes.

The worker's stdout and stderr are a log, so that nothing a library prints can corrupt an answer. A request is
``{"id", "op", "args"}``; an answer has the same id and one of ``"ok"`` (the result), ``"error"`` (see
:func:`describe`) or ``"progress"`` (``[done, total, words]``, any number of them before the last answer). There is one
request at a time. A worker ends when its end of the pipe closes, so it never outlives its parent.

A crash, a kill and a hang are WorkerError; memory that ended, on the device or in the machine, is OutOfMemory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from d2obench import errors
from d2obench.errors import D2OBenchError, WorkerError
from d2obench.measure.memory import is_out_of_memory
from d2obench.openmp_wait import bounded_spin
from d2obench.run.worker_process import DeadWorkerError, WorkerProcess

T = TypeVar("T")
WORKER = ("-P", "-m", "d2obench.run.worker")
UNKNOWN = "the worker knows no operation"
"""How an error begins where a worker, perhaps of an older version, is asked what it can't do."""


def describe(problem: BaseException) -> dict[str, str]:
    """An error as data: class name, what, why, remedy."""
    if isinstance(problem, D2OBenchError):
        return {"kind": type(problem).__name__, "what": problem.what, "why": problem.why, "remedy": problem.remedy}
    if is_out_of_memory(problem):
        return {"kind": "OutOfMemory", "what": "out of memory", "why": _first_line(problem), "remedy": ""}
    return {"kind": "WorkerError", "what": f"{type(problem).__name__}: {_first_line(problem)}", "why": "", "remedy": ""}


def revive(error: Mapping[str, str]) -> D2OBenchError:
    """The error that :func:`describe` wrote down; an unknown class becomes a WorkerError."""
    kind = getattr(errors, error.get("kind", ""), WorkerError)
    if not (isinstance(kind, type) and issubclass(kind, D2OBenchError)):
        kind = WorkerError
    return kind(error.get("what", "?"), why=error.get("why", ""), remedy=error.get("remedy", ""))


class WorkerClient:
    """One worker process; started at the first call, and again at the first call after it died.

    Args:
        python: the interpreter to run.
        env: variables laid over this process's own, for example another ``PYTHONPATH``.
        timeout_s: how long the worker may stay silent within one call before it counts as hung and is killed.
        threads: CPU threads for torch; 0 leaves torch's choice.
        command: arguments after ``python``; the two pipes' numbers are appended.
    """

    def __init__(
        self,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 1800.0,
        threads: int = 0,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.python, self.timeout_s, self.command = python, timeout_s, tuple(command)
        own = _own_code() if python == sys.executable else {}
        given = {**os.environ, **own, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **(env or {})}
        self.env = given | bounded_spin(given)
        self.generation = 0
        """How many processes were started so far: a new number means a cold worker."""
        self._process: WorkerProcess | None = None
        self._id = 0

    @property
    def pid(self) -> int | None:
        """The process id while one runs."""
        if self._process is not None and not self._process.alive:
            self.close()
        return self._process.pid if self._process else None

    @property
    def started(self) -> int:
        """The process id of the worker that was started, dead or alive; 0 without one. Any thread may ask."""
        process = self._process
        return process.pid if process else 0

    def call(
        self, op: str, args: Any = None, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Runs one operation in the worker and returns its result.

        Raises:
            OutOfMemory: on the device, or the kernel killed the worker for memory.
            DeadWorkerError: it crashed or was killed.
            WorkerError: it can't start, hung, or met an error of its own.
            D2OBenchError: whatever clear error the operation raised, of its own class.
        """
        process = self._running()
        self._id += 1
        process.listen()
        try:
            process.send(msgspec.json.encode({"id": self._id, "op": op, "args": args or {}}) + b"\n")
            while True:
                answer = self._answer(process, op, timeout_s or self.timeout_s)
                if answer.get("id") != self._id:
                    continue
                if "progress" in answer:
                    if progress:
                        done, total, words = answer["progress"]
                        progress(int(done), int(total), str(words))
                elif "error" in answer:
                    raise revive(answer["error"])
                else:
                    return answer["ok"]  # type: ignore[no-any-return]
        except KeyboardInterrupt:
            self.kill()
            raise

    def beside(self) -> WorkerClient:
        """Another worker like this one; its process starts at its first call."""
        other = WorkerClient(self.python, timeout_s=self.timeout_s, command=self.command)
        other.env = self.env
        return other

    def close(self) -> None:
        """Lets the worker end: closes its pipe, waits a moment, then kills it."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def kill(self) -> None:
        """Ends the worker at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _running(self) -> WorkerProcess:
        if self.pid is None or self._process is None:
            self._process = WorkerProcess([self.python, *self.command], self.env)
            self.generation += 1
        return self._process

    def _answer(self, process: WorkerProcess, op: str, timeout_s: float) -> dict[str, Any]:
        line = process.line(op, timeout_s)
        if line is None:
            self.kill()
            raise WorkerError(
                f"the worker gave no sign for {timeout_s:g} s during '{op}' and was ended",
                remedy="raise worker.timeout_s if the work may really take this long",
            )
        try:
            answer = msgspec.json.decode(line)
        except msgspec.DecodeError as problem:
            self.kill()
            raise WorkerError("the worker's answer can't be read", why=str(problem)) from None
        return answer if isinstance(answer, dict) else {}


def again(work: Callable[[], T]) -> T:
    """Calls ``work``, and once more where the worker died in the middle: a process may be killed by somebody else."""
    try:
        return work()
    except DeadWorkerError:
        return work()


def _own_code() -> dict[str, str]:
    """A PYTHONPATH under which the worker imports the same d2obench as this process, wherever it was started."""
    root = str(Path(errors.__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([root, known]) if known else root}


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or ["no message"])[0][:500]


Progress = Callable[[int, int, str], None]


class Client(Protocol):
    """One worker process; started at the first call, and again at the first call after it ended."""

    @property
    def generation(self) -> int:
        """How many processes were started so far: a new number means a cold worker."""

    @property
    def pid(self) -> int | None:
        """The process id while one runs, as far as is known; None means that the next call starts one."""

    def call(
        self, op: str, args: Any = None, *, progress: Progress | None = None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Runs one operation and returns its result; raises what :meth:`WorkerClient.call` raises."""

    def beside(self) -> Client:
        """Another worker like this one, on the same device; its process starts at its first call."""

    def close(self) -> None:
        """Lets the process end."""
