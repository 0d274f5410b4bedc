"""Isolated workers: processes for cells that can't be measured by the common worker, and Python environments for them.

llama.cpp loads weights of its own, so it gets a process of its own. kvpress needs an older transformers than d2obench,
so it gets a process in another Python environment: a plain ``venv`` in the cache folder with pinned packages. That
interpreter imports d2obench from a folder with a link to this package alone (:func:`code_only`), so that it can't
import any other package of this environment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from d2obench import errors
from d2obench.errors import UsageError, WorkerError
from d2obench.models.embedded import cache_folder
from d2obench.policies import parse_choice
from d2obench.policies.yardsticks import Yardstick
from d2obench.run.worker_client import WorkerClient, again
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

PINS = {
    "kvpress": (
        "kvpress==0.5.5", "transformers==5.2.0", "gguf>=0.17", "msgspec>=0.20", "nvidia-ml-py>=12", "psutil>=6",
    ),
}  # fmt: skip
"""The packages of each environment; torch is added in the version that is installed here."""
MARKER = "environment.json"


def requirements(name: str) -> list[str]:
    """The packages that :func:`install` installs with pip.

    Raises:
        UsageError: no environment of that name is known.
    """
    if name not in PINS:
        raise UsageError(f"no bridge is called '{name}'", remedy=f"use {', '.join(PINS)}")
    try:
        torch = [f"torch=={version('torch').partition('+')[0]}"]
    except PackageNotFoundError:
        torch = ["torch"]
    return [*PINS[name], *torch]


def folder(name: str) -> Path:
    """Where a managed environment lies."""
    return cache_folder() / "environments" / name


def interpreter(name: str) -> Path | None:
    """The interpreter of a managed environment; None where there is none, or its packages have other versions."""
    place = folder(name)
    try:
        packages = msgspec.json.decode((place / MARKER).read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError):
        return None
    python = place / "bin" / "python"
    return python if packages == requirements(name) and python.exists() else None


def install(name: str, say: Callable[[str], None]) -> Path:
    """Makes a managed environment, in place of one that is there; the output of pip goes to the terminal.

    Raises:
        UsageError: an unknown name.
        WorkerError: venv or pip failed; the environment is removed again.
    """
    wanted, place = requirements(name), folder(name)
    say(f"downloads with pip into {place}:")
    say(f"  {', '.join(wanted)}, and what they depend on (about 1.5 GB on a CPU, more with CUDA)")
    shutil.rmtree(place, ignore_errors=True)
    python = place / "bin" / "python"
    done = False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for command in ([sys.executable, "-m", "venv", str(place)], [str(python), "-m", "pip", "install", *wanted]):
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (place / MARKER).write_bytes(msgspec.json.encode(wanted))
        done = True
    except (OSError, subprocess.CalledProcessError) as problem:
        raise WorkerError(
            f"the environment of {name} could not be made",
            why=str(problem)[:300],
            remedy="see what pip says above; or make one yourself and give its interpreter as --python PATH",
        ) from None
    finally:
        if not done:
            shutil.rmtree(place, ignore_errors=True)
    return python


def code_only() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for another interpreter's PYTHONPATH, with a link to this package and nothing else."""
    made = tempfile.TemporaryDirectory(prefix="d2obench-code-")
    package = Path(errors.__file__).resolve().parent
    Path(made.name, package.name).symlink_to(package, target_is_directory=True)
    return made


class IsolatedWorkers:
    """The isolated workers of one suite: one for each library or engine that can't be used in the common worker.

    Each starts at its first call. On a CPU the common worker and the isolated ones exist at the same time, and all but
    one wait; on a GPU :class:`d2obench.run.runner.GroupRunner` ends the one that waits.

    Args:
        suite: its policies say which workers are needed.
        python: an interpreter in place of those of the managed environments.

    Raises:
        UsageError: an environment is missing, or ``python`` is given and nothing needs it.
    """

    def __init__(self, suite: Suite, python: Path | None = None) -> None:
        needed = isolated(suite)
        self._code = code_only() if any(yardstick.environment for yardstick in needed.values()) else None
        if python is not None and self._code is None:
            raise UsageError("--python is for kvpress", why="no policy here needs another interpreter")
        if needed and not suite.models.single:
            raise UsageError(
                f"{next(iter(needed))} can't use a model over several devices", remedy="give no --device-map with it"
            )
        self._clients: dict[str, WorkerClient] = {}
        self._policies: dict[str, list[str]] = {}
        for policy, yardstick in needed.items():
            if yardstick.environment:
                self._policies.setdefault(yardstick.name, []).append(policy)
            if yardstick.name not in self._clients:
                self._clients[yardstick.name] = self._open(yardstick, suite, python)

    def of(self, cell: Cell) -> WorkerClient | None:
        """The worker of a cell; None where the common one measures it."""
        yardstick = cell.policy.yardstick
        return self._clients[yardstick.name] if yardstick is not None and yardstick.isolated else None

    def check(self) -> dict[str, dict[str, Any]]:
        """Starts every environment once and reads its policies there.

        Returns:
            The versions in each environment, by its name.

        Raises:
            UsageError, PolicyError: an environment lacks what a policy needs, or the policy can't be read.
        """
        versions: dict[str, dict[str, Any]] = {}
        for name, policies in self._policies.items():
            versions[name] = again(partial(self._clients[name].call, "prepare", {"policies": policies}))["versions"]
        return versions

    def stop(self) -> None:
        """Ends the worker processes; a later call starts them again."""
        for client in self._clients.values():
            client.close()

    def close(self) -> None:
        """Ends the worker processes for good."""
        self.stop()
        if self._code is not None:
            self._code.cleanup()

    def _open(self, yardstick: Yardstick, suite: Suite, python: Path | None) -> WorkerClient:
        timeout_s, threads = suite.worker.timeout_s, suite.worker.threads
        if not yardstick.environment:
            return WorkerClient(timeout_s=timeout_s, threads=threads)
        chosen = python or interpreter(yardstick.environment)
        if chosen is None:
            raise UsageError(
                f"{yardstick.name} needs a Python environment of its own",
                why="it can't share ours: it wants an older transformers",
                remedy=f"run d2obench bridges install {yardstick.environment}, "
                "or give --python an interpreter that can import it, torch, msgspec, psutil and pynvml",
            )
        assert self._code is not None
        return WorkerClient(
            str(Path(chosen).absolute()), {"PYTHONPATH": self._code.name}, timeout_s=timeout_s, threads=threads
        )


def isolated(suite: Suite) -> dict[str, Yardstick]:
    """The policies of a suite that need an isolated worker: as they are written → parsed."""
    yardsticks = {text: parse_choice(text).yardstick for text in suite.axes.policy}
    return {text: yardstick for text, yardstick in yardsticks.items() if yardstick is not None and yardstick.isolated}
