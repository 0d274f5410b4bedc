"""One side of a gate: a checkout, and a worker process that imports d2obench from it.

:func:`both` lets the two sides work at the same time as long as nothing is timed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import msgspec

from d2obench.errors import D2OBenchError, WorkerError
from d2obench.measure.environment import COMPARED
from d2obench.run.speed import warm_up
from d2obench.run.worker_client import UNKNOWN, WORKER, WorkerClient
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

_PROBE = "import d2obench.run.worker as w, d2obench.cache, d2obench.policies, d2obench.models; print(w.__file__)"
_PROBE_S = 300.0
PATIENCE_S = 30.0
"""Seconds that threads are given to notice that their processes have ended."""
T = TypeVar("T")


class Arm:
    """A side of the comparison.

    Args:
        name: ``base`` or ``head``.
        root: the folder whose ``d2obench`` is run.
        suite: the resolved suite, for timeouts, threads and warm-up.
        python: the interpreter; each side may have an environment of its own.
        command: the arguments of ``python`` that start the worker.
        paths: the folders in front of its path; only ``root`` by default.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        suite: Suite,
        python: str = sys.executable,
        command: Sequence[str] = WORKER,
        paths: Sequence[Path] = (),
    ) -> None:
        self.name, self.root, self.python, self._suite = name, root, python, suite
        known = os.environ.get("PYTHONPATH", "")
        self._env = {"PYTHONPATH": os.pathsep.join(filter(None, (*map(str, paths or (root,)), known)))}
        worker = suite.worker
        self.client = WorkerClient(
            python, self._env, timeout_s=worker.timeout_s, threads=worker.threads, command=command
        )
        self._warm: dict[str, int] = {}
        self._probe: subprocess.Popen[str] | None = None
        self._ended = False
        self.counts: dict[str, dict[str, float]] = {}
        """Cell id → metric → count: what one decode step of each measured cell does."""

    def check(self) -> None:
        """Imports this side's code in a separate process, to see that it works.

        Raises:
            WorkerError: the code can't be imported, in which case the log is printed to stderr, or the interpreter
                would import another copy of d2obench.
        """
        code, said, log = self._imported()
        if code:
            print(f"--- log of the {self.name} ({self.root})\n{log.rstrip()}\n---", file=sys.stderr)
            lines = log.strip().splitlines()
            raise WorkerError(
                f"the {self.name} does not build",
                why=lines[-1][:500] if lines else f"exit code {code}",
                remedy="its log stands above; choose another revision, or give its environment with --base-python",
            )
        found = Path(said.strip().splitlines()[-1])
        if not found.resolve().is_relative_to(self.root.resolve()):
            raise WorkerError(
                f"the {self.name} would run {found.parent.parent}",
                why=f"its own checkout {self.root} holds no d2obench",
            )

    def surroundings(self, devices: Iterable[str]) -> dict[str, Any]:
        """The facts that have to be equal on both sides: interpreter, libraries, and the machine of each device.

        A revision reports only the facts that its own code knows. How attention is computed is left out, because that
        is something that a commit may change.
        """
        hello = self.client.call("hello")
        found: dict[str, Any] = {key: hello[key] for key in ("python", "torch", "transformers") if key in hello}
        named = self.client.call("describe", {"devices": [*devices], "models": []})["devices"]
        for device in named.values():
            facts = self.client.call("environment", {"device": device})
            found |= {f"{device} {key}": facts[key] for key in COMPARED if key in facts and key != "attention"}
        return found

    def noise(self, device: str, seconds: float) -> dict[int, float]:
        """The smallest change that can be told from noise on ``device`` now, by number of rounds; empty if this side's
        revision can't measure it."""
        try:
            found = self.client.call("noise", {"device": device, "seconds": seconds})
        except WorkerError as problem:
            if UNKNOWN not in problem.what:
                raise
            return {}
        return {int(rounds): float(change) for rounds, change in found["detectable"].items()}

    def count(self, cells: Iterable[Cell]) -> None:
        """Counts what a decode step does, for every cell not yet counted. It stops at the first failure: the same error
        will occur, and be reported, when the cell is measured."""
        for cell in cells:
            if cell.id not in self.counts:
                try:
                    self.counts[cell.id] = self.client.call("count", self._request(cell))
                except D2OBenchError:
                    return

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Measures one round of a speed cell, after warming up if this process has not measured the cell before.

        Returns: the fields of a RequestTrace, and under ``model`` what the worker reports about the model.
        """
        request = self._request(cell)
        if self._warm.get(cell.id) != self.client.generation:
            if cell.id not in self.counts:
                self.counts[cell.id] = self.client.call("count", request)
            self._warm_up(request)
            self._warm[cell.id] = self.client.generation
        found = self.client.call("measure", request)
        return {**found["trace"], "model": found["model"]}

    def _request(self, cell: Cell) -> dict[str, Any]:
        timing = self._suite.timing
        return {
            "axes": msgspec.to_builtins(cell.axes),
            "batch": cell.axes.batch,
            "sampled": [timing.depths, timing.steps] if timing.decode == "sampled" else None,
        }

    def _warm_up(self, request: dict[str, Any]) -> None:
        """Warms up until the times of steps settle. Old revisions can't do that; they get a fixed number of short
        requests."""
        most = max(1, self._suite.timing.warmup)
        try:
            warm_up(self.client, request, self._suite.timing, most)
        except WorkerError as problem:
            if UNKNOWN not in problem.what:
                raise
            for _ in range(most):
                self.client.call("measure", {**request, "warm_up": True})

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """Evaluates a quality cell. Returns its ``values``, ``items``, ``details`` and ``flags``."""
        quality = msgspec.to_builtins(self._suite.quality)
        del quality["share"]  # concerns several cells, and old revisions don't know it
        return self.client.call("evaluate", {"cell": cell.sent(), "quality": quality})

    def restart(self) -> None:
        """Replaces the worker by a fresh process, in which nothing is warmed up."""
        self.client.close()
        self.client.call("hello")

    def end(self) -> None:
        """Ends this side's processes at once and prevents new ones; calls that wait for them fail. Any thread may call
        it."""
        self._ended = True
        if self._probe is not None:
            self._probe.kill()
        if self.client.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.client.started, signal.SIGKILL)

    def _imported(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the process that imports this side's code."""
        pipe, env = subprocess.PIPE, {**os.environ, **self._env}
        try:
            with subprocess.Popen(
                [self.python, "-P", "-c", _PROBE], env=env, stdout=pipe, stderr=pipe, text=True, cwd=self.root
            ) as self._probe:
                try:
                    said, log = self._probe.communicate(timeout=_PROBE_S)
                finally:
                    self._probe.kill()
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise WorkerError(f"the {self.name} can't be started with {self.python}", why=str(problem)) from None
        if self._ended:
            raise WorkerError(f"the {self.name} was stopped")
        return self._probe.returncode, said, log

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.client.close()
        else:
            self.client.kill()


def both(arms: Mapping[str, Arm], work: Callable[[Arm], T], *, at_once: bool = True) -> dict[str, T]:
    """Calls ``work`` for every arm and returns the results by the arm's name.

    The arms work at the same time, so this is only for counts and scores: times would depend on the other arm.

    Args:
        arms: the arms by name.
        work: what to do with an arm; it must use nothing but that arm.
        at_once: False lets the arms work one after the other, for example if they would share a device's memory.

    Raises:
        Exception: what the first arm that failed raised. KeyboardInterrupt ends the processes before it is passed on.
    """
    if not at_once:
        return {name: work(arm) for name, arm in arms.items()}
    found: dict[str, T] = {}
    failed: dict[str, Exception] = {}

    def one(name: str, arm: Arm) -> None:
        try:
            found[name] = work(arm)
        except Exception as problem:
            failed[name] = problem

    threads = [Thread(target=one, args=item, daemon=True) for item in arms.items()]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        until = time.monotonic() + PATIENCE_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
            for arm in arms.values():  # repeatedly, because an arm may be starting a process at this moment
                arm.end()
            time.sleep(0.05)
        raise
    for name in arms:
        if name in failed:
            raise failed[name]
    return {name: found[name] for name in arms}
