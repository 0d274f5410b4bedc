"""Workers of their own for cells that can't share ours: another interpreter, or another engine with weights of its own.

Each is started at its first call. On a CPU it waits beside the common worker while that one measures, and the other way
round, as the sides of a gate do; :class:`d2obench.run.bench.Bench` sees to GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2obench.errors import UsageError
from d2obench.policies import other
from d2obench.policies.others import Other
from d2obench.run import environments
from d2obench.run.protocol import WorkerClient, again
from d2obench.suite.definition import Suite


class Apart:
    """The workers apart of one suite.

    Args:
        suite: whose policies may need them.
        python: an interpreter in place of the managed environments'.

    Raises:
        UsageError: an environment is missing, or ``python`` is given and nothing needs it.
    """

    def __init__(self, suite: Suite, python: Path | None = None) -> None:
        needed = {policy: found for policy in suite.axes.policy if (found := other(policy)) is not None and found.apart}
        self._code = environments.code_only() if any(one.environment for one in needed.values()) else None
        if python is not None and self._code is None:
            raise UsageError("--python is for kvpress", why="no policy here needs another interpreter")
        if needed and not suite.models.single:
            raise UsageError(
                f"{next(iter(needed))} can't use a model over several devices", remedy="give no --device-map with it"
            )
        self._clients: dict[str, WorkerClient] = {}
        self._policies: dict[str, list[str]] = {}
        for policy, found in needed.items():
            if found.environment:
                self._policies.setdefault(found.name, []).append(policy)
            if found.name not in self._clients:
                self._clients[found.name] = self._open(found, suite, python)

    def of(self, policy: str) -> WorkerClient | None:
        """The worker of a policy's cells; None where the common one measures them."""
        found = other(policy)
        return self._clients[found.name] if found is not None and found.apart else None

    def check(self) -> dict[str, dict[str, Any]]:
        """Starts every environment once, reads its policies there, and gives the versions in it, by environment.

        Raises:
            UsageError, PolicyError: it lacks what a policy needs, or the policy can't be read.
        """
        found = {}
        for name, policies in self._policies.items():
            versions: dict[str, Any] = again(self._asking(self._clients[name], policies))["versions"]
            found[name] = versions
        return found

    def close(self) -> None:
        """Ends the workers."""
        for client in self._clients.values():
            client.close()

    def remove(self) -> None:
        """Ends the workers for good."""
        self.close()
        if self._code is not None:
            self._code.cleanup()

    @staticmethod
    def _asking(client: WorkerClient, policies: Sequence[str]) -> Any:
        return lambda: client.call("prepare", {"policies": list(policies)})

    def _open(self, found: Other, suite: Suite, python: Path | None) -> WorkerClient:
        timeout_s, threads = suite.worker.timeout_s, suite.worker.threads
        if not found.environment:
            return WorkerClient(timeout_s=timeout_s, threads=threads)
        chosen = python or environments.interpreter(found.environment)
        if chosen is None:
            raise UsageError(
                f"{found.name} needs a Python environment of its own",
                why="it can't share ours: it wants an older transformers",
                remedy=f"run d2obench bridges install {found.environment}, "
                "or give --python an interpreter that can import it, torch, msgspec, psutil and pynvml",
            )
        assert self._code is not None
        return WorkerClient(
            str(Path(chosen).absolute()), {"PYTHONPATH": self._code.name}, timeout_s=timeout_s, threads=threads
        )
