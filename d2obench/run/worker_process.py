"""A process with two pipes for lines, and a log of everything it prints. What the lines mean is not known here."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError

MAX_LINE = 256 * 2**20
LOG_TAIL = 2000


class DeadWorkerError(WorkerError):
    """The process ended in the middle of an operation; the next call starts a new one."""


class WorkerProcess:
    """A running process.

    Args:
        command: what to run; the numbers of its two pipes (requests, answers) are appended.
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
            self._forget()
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
        """From here on the log's words are about a new operation."""
        self._log_start = self._logged()

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
        """The next line; None where none came in time. It must be ended then.

        Raises:
            DeadWorkerError, OutOfMemory: it died, ``during`` says in the middle of what.
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
        self._forget()

    def _died(self, when: str) -> D2OBenchError:
        """What to raise: OutOfMemory where the kernel ended it for memory, else how it ended and its last words."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill_group()
            code = -signal.SIGKILL
        said = self._last_words()
        self._forget()
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return OutOfMemory("out of memory", why=f"the system ended the worker {when}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return DeadWorkerError(f"the worker {how} {when}", why=said)

    def _last_words(self) -> str:
        """The last line it logged in this operation: after a traceback, the exception's own line."""
        start = max(self._log_start, self._logged() - LOG_TAIL)
        text = os.pread(self._log.fileno(), LOG_TAIL, start).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""

    def _logged(self) -> int:
        """Bytes logged so far; asked by size, since the process writes at the file's shared position."""
        return os.fstat(self._log.fileno()).st_size

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _forget(self) -> None:
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
