"""Small runs with a scripted worker, for the tests of the runner."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from waiting import LIMIT_S

from d2obench.record import Axes, Run, read_run
from d2obench.run.plan import Plan
from d2obench.run.runner import LocalEngine, run_suite
from d2obench.run.worker_client import WorkerClient
from d2obench.suite.definition import AxesTable, Suite, Timing, WorkerTable
from d2obench.tasks import read_cell
from d2obench.tasks.base import Cell

FAKE = str(Path(__file__).with_name("fake_worker.py"))


class Silent:
    """A watcher that only remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.states: list[tuple[str, str]] = []
        self.events: list[tuple[str, str]] = []

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        self.states.append((cell, state))
        self.events.append((state, text))

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.events.append(("note", text))

    def expect(self, seconds: Mapping[str, float]) -> None:
        self.expected = dict(seconds)


def client(timeout_s: float = LIMIT_S, **fake: Any) -> WorkerClient:
    """A client of the scripted worker; see ``fake_worker`` for its settings."""
    env = {"FAKE": json.dumps(fake)}
    return WorkerClient(sys.executable, env, timeout_s=timeout_s, command=("-P", FAKE))


def cell(
    policy: str, budget: str | None = None, shape: str | None = "32+8", batch: Any = 2, task: str = "speed"
) -> Cell:
    """A cell of the model ``fake``; its hash is made from its axes."""
    shape, batch = (shape, batch) if task == "speed" else (None, None)
    axes = Axes(task, "fake", "float32", "cpu", policy, budget, shape, batch, 0)
    words = [str(word) for word in (task, policy, budget, shape, batch)]
    hash_ = "-".join(words).replace("+", "_")
    return read_cell({"id": "/".join(words), "hash": hash_, "axes": msgspec.to_builtins(axes)})


CELLS = (
    cell("full"),
    cell("h2o", "0.2"),
    cell("d2o", "0.2"),
    cell("full", task="recall"),
    cell("d2o", "0.2", task="recall"),
)


def checked(cells: Sequence[Cell] = CELLS, timing: Timing | None = None, device: str = "cpu", **worker: Any) -> Plan:
    """A suite of these cells as it comes out of the checks."""
    axes = AxesTable(policy=("full",), model=("fake",), device=(device,))
    timing = timing or Timing(rounds=3, max_rounds=3)
    return Plan(Suite("fake", "", axes, timing=timing, worker=WorkerTable(**worker)), tuple(cells), {}, {})


def run(
    folder: Path, work: Plan | None = None, *, watcher: Silent | None = None, timeout_s: float = LIMIT_S, **fake: Any
) -> Run:
    """Runs into ``folder``, or goes on with what is there."""
    folder.mkdir(exist_ok=True)
    resume = (folder / "run.json").exists()
    work = work or checked()
    with LocalEngine(work.suite, client(timeout_s, **fake)) as engine:
        run_suite(work, folder, engine, watcher or Silent(), resume=resume)
    return read_run(folder)
