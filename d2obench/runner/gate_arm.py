"""One side of an A/B gate: a checkout, and a long-lived worker process that imports d2obench from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import WorkerError
from d2obench.measure.environment import COMPARED
from d2obench.runner.protocol import WORKER, WorkerClient
from d2obench.suite import Cell, Suite

_PROBE = "import d2obench.runner.worker as w, d2obench.engine, d2obench.policies, d2obench.models; print(w.__file__)"
_PROBE_S = 300.0


class Arm:
    """A side of the comparison.

    Args:
        name: ``base`` or ``head``.
        root: the checkout whose ``d2obench`` is run.
        suite: resolved; gives timeouts, threads and warm-up.
        python: the interpreter; each side may have its own environment.
        command: what the worker process runs after ``python``.
    """

    def __init__(
        self, name: str, root: Path, suite: Suite, python: str = sys.executable, command: Sequence[str] = WORKER
    ) -> None:
        self.name, self.root, self.python, self._suite = name, root, python, suite
        known = os.environ.get("PYTHONPATH", "")
        self._env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), known)))}
        worker = suite.worker
        self.client = WorkerClient(
            python, self._env, timeout_s=worker.timeout_s, threads=worker.threads, command=command
        )
        self._warm: dict[str, int] = {}
        self.counts: dict[str, dict[str, float]] = {}
        """What one decode step of each measured cell does, counted, by metric; by cell id."""

    def check(self) -> None:
        """Imports this side's code in a process of its own.

        Raises:
            WorkerError: it can't be imported; its log goes to stderr first. Or another copy of d2obench is found.
        """
        try:
            done = subprocess.run(
                [self.python, "-P", "-c", _PROBE],
                env={**os.environ, **self._env},
                capture_output=True,
                text=True,
                timeout=_PROBE_S,
                check=False,
                cwd=self.root,
            )
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise WorkerError(f"the {self.name} can't be started with {self.python}", why=str(problem)) from None
        if done.returncode:
            print(f"--- log of the {self.name} ({self.root})\n{done.stderr.rstrip()}\n---", file=sys.stderr)
            lines = done.stderr.strip().splitlines()
            raise WorkerError(
                f"the {self.name} does not build",
                why=lines[-1][:500] if lines else f"exit code {done.returncode}",
                remedy="its log stands above; choose another revision, or give its environment with --base-python",
            )
        found = Path(done.stdout.strip().splitlines()[-1])
        if not found.resolve().is_relative_to(self.root.resolve()):
            raise WorkerError(
                f"the {self.name} would run {found.parent.parent}",
                why=f"its own checkout {self.root} holds no d2obench",
            )

    def surroundings(self, devices: Iterable[str]) -> dict[str, Any]:
        """What must be equal on both sides: interpreter, libraries, and the machine behind each device."""
        hello = self.client.call("hello")
        found = {key: hello.get(key) for key in ("python", "torch", "transformers")}
        named = self.client.call("describe", {"devices": [*devices], "models": []})["devices"]
        for device in named.values():
            facts = self.client.call("environment", {"device": device})
            found |= {f"{device} {key}": facts.get(key) for key in COMPARED}
        return found

    def measure(self, cell: Cell) -> dict[str, Any]:
        """One round of a speed cell, warmed up first where this process has not seen the cell: a RequestTrace.

        Under ``model`` the trace also holds what the worker says of the model.
        """
        timing = self._suite.timing
        request = {
            "axes": msgspec.to_builtins(cell.axes),
            "batch": cell.axes.batch,
            "sampled": [timing.depths, timing.steps] if timing.decode == "sampled" else None,
        }
        if self._warm.get(cell.id) != self.client.generation:
            counted = cell.id not in self.counts
            if counted:  # a whole request, so it warms up like one
                self.counts[cell.id] = self.client.call("count", request)
            for _ in range(max(1, timing.warmup) - counted):
                self.client.call("measure", {**request, "warm_up": True})
            self._warm[cell.id] = self.client.generation
        found = self.client.call("measure", request)
        return {**found["trace"], "model": found["model"]}

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """A quality cell: ``values``, ``items``, ``details``, ``flags``."""
        quality = msgspec.to_builtins(self._suite.quality)
        return self.client.call("evaluate", {"cell": msgspec.to_builtins(cell), "quality": quality})

    def restart(self) -> None:
        """A cold process at the next call."""
        self.client.close()

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.client.close()
        else:
            self.client.kill()
