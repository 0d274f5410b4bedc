"""Everything about a suite that can be found wrong before anything heavy runs, in one place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import DataError, ModelError, SuiteError, UsageError
from d2obench.models.gguf_file import check_gguf
from d2obench.policies import other, parse_policy
from d2obench.run.device_placement import check_placement, sharing, taken
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import SPEED, Cell, Quality, Suite, cells
from d2obench.suite.grammar import parse_memory, parse_shape
from d2obench.tasks import parse_task
from d2obench.tasks.data import digest_of


@dataclass(frozen=True)
class Checked:
    """A suite that can run: devices are real ones, and every model's dimensions are known.

    Args:
        suite: resolved.
        cells: of it, in order.
        models: name → :class:`d2obench.models.Dimensions` as a dict.
        too_long: ids of cells that don't fit their model's context → why; they end as ``skipped``.
        devices: how many share one model.
    """

    suite: Suite
    cells: tuple[Cell, ...]
    models: dict[str, dict[str, Any]]
    too_long: dict[str, str]
    devices: int = 1


def check(suite: Suite, client: Client, *, allow_busy: bool = False) -> Checked:
    """Checks words first, then models and devices through the worker, then what needs both.

    Args:
        suite: as read.
        client: the worker; it loads no model for this.
        allow_busy: measure even where other processes compute on a GPU.

    Raises:
        D2OBenchError: one line for the first thing that is wrong.
    """
    check_words(suite)
    facts = again(lambda: client.call("describe", {"models": suite.axes.model, "devices": suite.axes.device}))
    check_placement(suite, facts)
    devices = tuple(dict.fromkeys(facts["devices"][name] for name in suite.axes.device))
    for device in taken(suite, facts) if not allow_busy else ():
        again(partial(client.call, "refuse_busy", {"device": device, "own": [os.getpid()]}))
    suite = msgspec.structs.replace(
        suite, axes=msgspec.structs.replace(suite.axes, device=devices), quality=_digested(suite.quality)
    )
    found = cells(suite)
    return Checked(suite, tuple(found), facts["models"], _too_long(found, facts["models"]), sharing(suite, facts))


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
        found = other(policy)
        if found is None:
            parse_policy(policy)
        else:
            found.installed()
    quality = [task for task in suite.axes.task if task != SPEED]
    _check_speed_only(suite, quality)
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
    scored = [cell.axes for cell in cells(suite) if cell.axes.task != SPEED] if quality else []
    if blind := [axes for axes in scored if axes.model.startswith("shape:") and parse_task(axes.task).sense]:
        raise ModelError(
            f"the task '{blind[0].task}' can't use {blind[0].model}",
            why="its weights are random",
            remedy="use a model with real weights, or --task speed",
        )


def _digested(quality: Quality) -> Quality:
    """With the digest of each file of data; where a run goes on, it must be the one the run began with."""
    found = {task: digest_of(path) for task, path in quality.data.items()}
    for task, digest in quality.digests.items():
        if found.get(task) != digest:
            raise DataError(
                f"the data for '{task}' is not what the run began with",
                why=f"{quality.data.get(task, 'its file')} has changed",
                remedy="put the file back, or start a new run",
            )
    return msgspec.structs.replace(quality, digests=found)


def _check_speed_only(suite: Suite, quality: Sequence[str]) -> None:
    """Another engine is timed on a CPU; it gives no distributions to score."""
    for policy in suite.axes.policy:
        found = other(policy)
        if found is None or not found.speed_only:
            continue
        if quality:
            raise UsageError(
                f"the task '{quality[0]}' can't use {policy}",
                why="it is another engine, measured for speed only",
                remedy="add --task speed, or leave it out",
            )
        for name in suite.axes.model:
            check_gguf(name)


def _too_long(cells: Sequence[Cell], models: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Cells whose text does not fit the model's context, with the reason; a suite of nothing else can't run.

    A speed cell says nothing of quality: it may go beyond, where the model's positions can.
    """
    found = {}
    for cell in cells:
        if cell.axes.shape is None:
            continue
        (shape,) = parse_shape(cell.axes.shape)
        model = models[cell.axes.model]
        context, bound = model["context"], model.get("bound", "") if cell.axes.task == SPEED else ""
        if shape.prompt + shape.gen > context and (bound or cell.axes.task != SPEED):
            words = f"the shape {shape} is longer than the context of {cell.axes.model} ({context:,} tokens)"
            found[cell.id] = f"{words}, and {bound}" if bound else words
    if found and len(found) == len(cells):
        raise UsageError(next(iter(found.values())), remedy="use a shorter shape, or a model with a longer context")
    return found
