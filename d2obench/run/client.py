"""What the runner needs of a worker, wherever its process runs: on this machine, or on a node of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

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
