"""Everything about a suite that can be found wrong before anything heavy runs, in one place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import DataError, ModelError, SuiteError, UsageError
from d2obench.policies import YARDSTICKS, parse_policy
from d2obench.runner.protocol import WorkerClient
from d2obench.spec import parse_memory, parse_shape
from d2obench.suite import SPEED, Cell, Suite, cells
from d2obench.tasks import parse_task


@dataclass(frozen=True)
class Checked:
    """A suite that can run: devices are real ones, and every model's dimensions are known.

    Args:
        suite: resolved.
        cells: of it, in order.
        models: name → :class:`d2obench.models.Dimensions` as a dict.
        too_long: ids of cells that don't fit their model's context → why; they end as ``skipped``.
    """

    suite: Suite
    cells: tuple[Cell, ...]
    models: dict[str, dict[str, Any]]
    too_long: dict[str, str]


def check(suite: Suite, client: WorkerClient, *, allow_busy: bool = False) -> Checked:
    """Checks words first, then models and devices through the worker, then what needs both.

    Args:
        suite: as read.
        client: the worker; it loads no model for this.
        allow_busy: measure even where other processes compute on a GPU.

    Raises:
        D2OBenchError: one line for the first thing that is wrong.
    """
    check_words(suite)
    facts = client.call("describe", {"models": suite.axes.model, "devices": suite.axes.device})
    devices = tuple(dict.fromkeys(facts["devices"][name] for name in suite.axes.device))
    for device in devices if not allow_busy else ():
        client.call("refuse_busy", {"device": device, "own": [os.getpid()]})
    suite = msgspec.structs.replace(suite, axes=msgspec.structs.replace(suite.axes, device=devices))
    found = cells(suite)
    return Checked(suite, tuple(found), facts["models"], _too_long(found, facts["models"]))


def check_words(suite: Suite) -> None:
    """Policies, tasks, files and numbers; touches no model."""
    timing = suite.timing
    if timing.rounds > timing.max_rounds:
        raise SuiteError(
            f"suite {suite.name}: timing.rounds {timing.rounds} is above timing.max_rounds {timing.max_rounds}",
            remedy="raise timing.max_rounds",
        )
    if timing.memory_limit:
        parse_memory(timing.memory_limit, 1)
    for policy in suite.axes.policy:
        if policy not in YARDSTICKS:
            parse_policy(policy)
    quality = [task for task in suite.axes.task if task != SPEED]
    for task in quality:
        parse_task(task)
    names = {task.partition("(")[0] for task in quality}
    for task, path in suite.quality.data.items():
        if task not in names:
            raise UsageError(
                f"data is given for '{task}'", why="the suite does not run it", remedy=f"add --task {task}"
            )
        if not Path(path).expanduser().exists():
            raise DataError(f"the data for '{task}' is not there", why=f"no file {path}")
    if quality and (shapes := [model for model in suite.axes.model if model.startswith("shape:")]):
        raise ModelError(
            f"the task '{quality[0]}' can't use {shapes[0]}",
            why="its weights are random",
            remedy="use a model with real weights, or --task speed",
        )


def _too_long(cells: Sequence[Cell], models: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Cells whose text does not fit the model's context, with the reason; a suite of nothing else can't run."""
    found = {}
    for cell in cells:
        if cell.axes.shape is None:
            continue
        (shape,) = parse_shape(cell.axes.shape)
        context = models[cell.axes.model]["context"]
        if shape.prompt + shape.gen > context:
            found[cell.id] = f"the shape {shape} is longer than the context of {cell.axes.model} ({context:,} tokens)"
    if found and len(found) == len(cells):
        raise UsageError(next(iter(found.values())), remedy="use a shorter shape, or a model with a longer context")
    return found
