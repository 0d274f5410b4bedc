"""Starts a worker process and talks to it: one JSON object a line, over two pipes.

A request is ``{"id", "op", "args"}``. An answer has the same id and one of ``"ok"`` (the result), ``"error"`` (see
:func:`describe`) or ``"progress"`` (``[done, total, words]``, any number of them before the last answer). An answer
with ``"last": true`` is the last one of its process: something happened on its GPU that no later operation can be
trusted after. There is one request at a time. What the worker prints goes to a log, so that no library can corrupt an
answer. A worker ends when its end of the pipe closes, so it never outlives its parent.

A crash, a kill and a hang raise WorkerError; too little memory, on the device or in the machine, raises OutOfMemory.
After a fault of the GPU (DeviceFaultError) the next process does without the part of the GPU path that failed, for the
cell that met it: it repeats the cell without CUDA graphs, or without our kernels.
:class:`WorkerClient` speaks the protocol; :class:`WorkerProcess` below it knows only lines of bytes.
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
from typing import Any, Protocol, TypeVar

import msgspec

from d2obench import errors
from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError, is_device_fault, is_out_of_memory
from d2obench.run.openmp_wait import bounded_spin

T = TypeVar("T")
Progress = Callable[[int, int, str], None]
"""``progress(done, total, words)``: how far an operation is."""
WORKER = ("-P", "-m", "d2obench.run.worker")
UNKNOWN = "the worker knows no operation"
"""How the error for an unknown operation begins; a gate asks a worker of an older revision, which may lack some."""
MAX_LINE = 256 * 2**20
LOG_TAIL = 2000


class DeadWorkerError(WorkerError):
    """The process ended in the middle of an operation; the next call starts a new one."""


class DeviceFaultError(DeadWorkerError):
    """Something failed on a GPU, so that the process had to end; ``part`` of the GPU path
    (:data:`d2obench.compiler.SWITCHES`) is what the cell does without from now on."""

    part = "kernels"


WITHOUT = "D2OBENCH_WITHOUT"
"""Environment variable of a worker, JSON: cell (:func:`cell_of`) → part of the GPU path → why it does without it."""
EVERY = "*"
"""Stands for every cell in :data:`WITHOUT`: what has failed in two cells is not tried in others."""


class Client(Protocol):
    """What the runner needs of a worker's client, such as :class:`WorkerClient`, here or on a node of a cluster."""

    @property
    def generation(self) -> int:
        """How many processes were started so far: a new number means that nothing is warmed up or loaded."""

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


def describe(problem: BaseException) -> dict[str, str]:
    """An error as data: class name, what, why, remedy."""
    if isinstance(problem, D2OBenchError):
        part = {"part": problem.part} if isinstance(problem, DeviceFaultError) else {}
        named = {"what": problem.what, "why": problem.why, "remedy": problem.remedy}
        return {"kind": type(problem).__name__, **named, **part}
    if is_device_fault(problem):
        return {"kind": "DeviceFaultError", "what": "the GPU failed", "why": _first_line(problem), "remedy": ""}
    if is_out_of_memory(problem):
        return {"kind": "OutOfMemory", "what": "out of memory", "why": _first_line(problem), "remedy": ""}
    return {"kind": "WorkerError", "what": f"{type(problem).__name__}: {_first_line(problem)}", "why": "", "remedy": ""}


def revive(error: Mapping[str, str]) -> D2OBenchError:
    """The error that :func:`describe` wrote down; an unknown class becomes a WorkerError."""
    own: dict[str, type[D2OBenchError]] = {kind.__name__: kind for kind in (DeadWorkerError, DeviceFaultError)}
    name = error.get("kind", "")
    kind = own.get(name) or getattr(errors, name, WorkerError)
    if not (isinstance(kind, type) and issubclass(kind, D2OBenchError)):
        kind = WorkerError
    made = kind(error.get("what", "?"), why=error.get("why", ""), remedy=error.get("remedy", ""))
    if isinstance(made, DeviceFaultError):
        made.part = error.get("part", made.part)
    return made


def cell_of(args: Any) -> str:
    """The cell that an operation is for, by the axes in its arguments; empty for an operation on no cell or several."""
    cell = args.get("cell") if isinstance(args, Mapping) else None
    axes = cell.get("axes") if isinstance(cell, Mapping) else args.get("axes") if isinstance(args, Mapping) else None
    return msgspec.json.encode(axes, order="sorted").decode() if axes else ""


def without(args: Any, known: str) -> dict[str, str]:
    """The parts of the GPU path that an operation does without, and why; ``known`` is the value of :data:`WITHOUT`."""
    parts: dict[str, dict[str, str]] = msgspec.json.decode(known or "{}")
    return {**parts.get(EVERY, {}), **parts.get(cell_of(args), {})}


class WorkerClient:
    """One worker process; started at the first call, and again at the first call after it died.

    Args:
        python: the interpreter to run.
        env: variables laid over this process's own, for example another ``PYTHONPATH``.
        timeout_s: how long the worker may stay silent within one call before it counts as hung and is killed.
        threads: CPU threads for torch; 0 leaves the number to torch.
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
        """How many processes were started so far: a new number means that nothing is warmed up or loaded."""
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
            DeviceFaultError: a GPU failed; another call for the same cell does without what failed.
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
                    continue
                if answer.get("last"):
                    self.close()
                if "error" not in answer:
                    return answer["ok"]  # type: ignore[no-any-return]
                problem = revive(answer["error"])
                if isinstance(problem, DeviceFaultError):
                    self._do_without(args, problem)
                raise problem
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

    def _do_without(self, args: Any, problem: DeviceFaultError) -> None:
        """Tells the processes to come what the cell of an operation does without."""
        parts: dict[str, dict[str, str]] = msgspec.json.decode(self.env.get(WITHOUT, "{}"))
        if cell := cell_of(args):
            reason = f"{problem.what} in an earlier process ({problem.why})"
            others = any(problem.part in of for name, of in parts.items() if name != cell)
            parts.setdefault(EVERY if others else cell, {})[problem.part] = reason
            self.env = {**self.env, WITHOUT: msgspec.json.encode(parts).decode()}

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
    """Calls ``work``, and once more where its worker died, since a process may be killed for reasons of the machine."""
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


class WorkerProcess:
    """A running process with a pipe for requests, a pipe for answers and a log of everything it prints.

    Args:
        command: what to run; the numbers of the two pipes are appended.
        env: its whole environment.

    Raises:
        WorkerError: it can't be started.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        down_read, self._to = os.pipe()
        self._from, up_write = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._log_start = 0
        self._buffer = bytearray()
        self._oom_kills = _oom_kills()
        try:
            self._process = subprocess.Popen(
                [*command, str(down_read), str(up_write)],
                env=env,
                pass_fds=(down_read, up_write),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C at the terminal is the parent's to handle
            )
        except OSError as problem:
            self._release()
            raise WorkerError(f"can't start a worker with {command[0]}", why=problem.strerror or str(problem)) from None
        finally:
            os.close(down_read)
            os.close(up_write)

    @property
    def pid(self) -> int:
        """Its process id, dead or alive."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def listen(self) -> None:
        """A new operation begins: an error names only what is logged from here on."""
        self._log_start = self._logged_bytes()

    def send(self, line: bytes) -> None:
        """Writes a whole line.

        Raises:
            DeadWorkerError, OutOfMemory: it is dead, see :meth:`_died`.
        """
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._to, view) :]
        except BrokenPipeError:
            raise self._died("before it could be asked anything") from None

    def line(self, during: str, timeout_s: float) -> bytes | None:
        """The next line of the answers; None where none came in time, and then the process must be ended.

        Raises:
            DeadWorkerError, OutOfMemory: the process died; ``during`` names the operation for the message.
        """
        deadline = time.monotonic() + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            chunk = os.read(self._from, 2**16)
            if not chunk or len(self._buffer) > MAX_LINE:
                raise self._died(f"during '{during}'")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def close(self, wait_s: float = 2.0) -> None:
        """Lets it end: closes its pipes, waits a moment, then kills it."""
        self._close_pipes()
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._kill_group()
        self._log.close()

    def kill(self) -> None:
        """Ends it at once, and its children: it leads a session of its own."""
        self._kill_group()
        self._release()

    def _died(self, when: str) -> D2OBenchError:
        """The error to raise: OutOfMemory where the kernel killed it for memory, otherwise how it ended and what it
        logged last."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill_group()
            code = -signal.SIGKILL
        last_line = self._last_line()
        self._release()
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return OutOfMemory("out of memory", why=f"the system ended the worker {when}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return DeadWorkerError(f"the worker {how} {when}", why=last_line)

    def _last_line(self) -> str:
        """The last line it logged in this operation: after a traceback, the exception's own line."""
        start = max(self._log_start, self._logged_bytes() - LOG_TAIL)
        text = os.pread(self._log.fileno(), LOG_TAIL, start).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""

    def _logged_bytes(self) -> int:
        """Bytes logged so far, by the file's size: its position is the one at which the process writes."""
        return os.fstat(self._log.fileno()).st_size

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _release(self) -> None:
        self._close_pipes()
        self._log.close()

    def _close_pipes(self) -> None:
        for pipe in (self._to, self._from):
            if pipe >= 0:
                os.close(pipe)
        self._to = self._from = -1


def _oom_kills() -> int:
    """How many processes the kernel has ended for memory since boot; 0 where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
