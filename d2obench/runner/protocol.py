"""A worker process and the words spoken with it: one JSON object a line, over two pipes of their own.

The worker's stdout and stderr are a log, so that nothing a library prints can corrupt an answer. A request is
``{"id", "op", "args"}``; an answer has the same id and one of ``"ok"`` (the result), ``"error"`` (see
:func:`describe`) or ``"progress"`` (``[done, total, words]``, any number of them before the last answer). There is one
request at a time. A worker ends when its end of the pipe closes, so it never outlives its parent.

A crash, a kill and a hang are WorkerError; memory that ended, on the device or in the machine, is OutOfMemory.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from d2obench import errors
from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.measure.memory import is_out_of_memory

T = TypeVar("T")
Progress = Callable[[int, int, str], None]
WORKER = ("-P", "-m", "d2obench.runner.worker")
MAX_ANSWER = 256 * 2**20
LOG_TAIL = 2000


class DeadWorkerError(WorkerError):
    """The process ended in the middle of an operation; the next call starts a new one."""


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
        self.env = {**os.environ, **own, **({"OMP_NUM_THREADS": str(threads)} if threads else {}), **(env or {})}
        self.generation = 0
        """How many processes were started so far: a new number means a cold worker."""
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._log_start = 0
        self._to = self._from = -1
        self._buffer = bytearray()
        self._id = 0
        self._oom_kills = 0

    @property
    def pid(self) -> int | None:
        """The process id while one runs."""
        if self._process is not None and self._process.poll() is not None:
            self._close_pipes()
            self._forget()
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
        if self.pid is None:
            self._start()
        self._id += 1
        self._log_start = self._logged()
        try:
            self._send(msgspec.json.encode({"id": self._id, "op": op, "args": args or {}}) + b"\n")
            while True:
                answer = self._receive(op, timeout_s or self.timeout_s)
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

    def close(self) -> None:
        """Lets the worker end: closes its pipe, waits a moment, then kills it."""
        if self._process is None:
            return
        self._close_pipes()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._kill_group()
        self._forget()

    def kill(self) -> None:
        """Ends the worker at once."""
        if self._process is not None:
            self._kill_group()
            self._close_pipes()
            self._forget()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._oom_kills = _oom_kills()
        try:
            self._process = subprocess.Popen(
                [self.python, *self.command, str(down_read), str(up_write)],
                env=self.env,
                pass_fds=(down_read, up_write),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C at the terminal is the parent's to handle
            )
        except OSError as problem:
            os.close(down_write)
            os.close(up_read)
            raise WorkerError(
                f"can't start a worker with {self.python}", why=problem.strerror or str(problem)
            ) from None
        finally:
            os.close(down_read)
            os.close(up_write)
        self._to, self._from = down_write, up_read
        self._buffer.clear()
        self.generation += 1

    def _send(self, line: bytes) -> None:
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._to, view) :]
        except BrokenPipeError:
            raise self._died("before it could be asked anything") from None

    def _receive(self, op: str, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise WorkerError(
                    f"the worker gave no sign for {timeout_s:g} s during '{op}' and was ended",
                    remedy="raise worker.timeout_s if the work may really take this long",
                )
            chunk = os.read(self._from, 2**16)
            if not chunk or len(self._buffer) > MAX_ANSWER:
                raise self._died(f"during '{op}'")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            answer = msgspec.json.decode(line)
        except msgspec.DecodeError as problem:
            self.kill()
            raise WorkerError("the worker's answer can't be read", why=str(problem)) from None
        return answer if isinstance(answer, dict) else {}

    def _died(self, when: str) -> D2OBenchError:
        assert self._process is not None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill_group()
            code = -signal.SIGKILL
        said = self._last_words()
        self._close_pipes()
        self._forget()
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return OutOfMemory("out of memory", why=f"the system ended the worker {when}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return DeadWorkerError(f"the worker {how} {when}", why=said)

    def _last_words(self) -> str:
        """The last line the worker logged in this call: after a traceback, the exception's own line."""
        if self._log is None:
            return ""
        start = max(self._log_start, self._logged() - LOG_TAIL)
        text = os.pread(self._log.fileno(), LOG_TAIL, start).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""

    def _logged(self) -> int:
        """Bytes logged so far; asked by size, since the worker writes at the file's shared position."""
        return os.fstat(self._log.fileno()).st_size if self._log else 0

    def _kill_group(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the worker leads its own session: its children end too
        self._process.wait()

    def _close_pipes(self) -> None:
        for pipe in (self._to, self._from):
            if pipe >= 0:
                os.close(pipe)
        self._to = self._from = -1

    def _forget(self) -> None:
        if self._log is not None:
            self._log.close()
        self._process = self._log = None
        self._buffer.clear()


def again(work: Callable[[], T]) -> T:
    """``work()``, and once more where the worker died in the middle of it: a stray kill is not the cell's fault."""
    try:
        return work()
    except DeadWorkerError:
        return work()


def _own_code() -> dict[str, str]:
    """A PYTHONPATH under which the worker imports the same d2obench as this process, wherever it was started."""
    root = str(Path(errors.__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([root, known]) if known else root}


def _oom_kills() -> int:
    """How many processes the kernel has ended for memory since boot; 0 where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or ["no message"])[0][:500]
