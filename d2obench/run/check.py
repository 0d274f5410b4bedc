"""Everything that can be found wrong with a suite before anything heavy runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import DataError, ModelError, SuiteError, UsageError
from d2obench.models import Dimensions, config_of, pick_device
from d2obench.models import check as check_model
from d2obench.models.saved import check_gguf
from d2obench.policies import parse_choice
from d2obench.run.device_placement import check_placement, sharing, taken
from d2obench.run.isolated_workers import IsolatedWorkers
from d2obench.run.plan import Plan, cells
from d2obench.run.predict import count_gpus
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import SPEED, Quality, Suite
from d2obench.suite.grammar import parse_memory
from d2obench.tasks import parse_task
from d2obench.tasks.base import Cell
from d2obench.tasks.data import digest_of


def check(suite: Suite, client: Client, *, allow_busy: bool = False) -> Plan:
    """Checks policies, tasks and files first, then models and devices through the worker, then what needs both.

    Args:
        suite: as read.
        client: the worker; it loads no model for this.
        allow_busy: measure even where other processes compute on a GPU.

    Raises:
        D2OBenchError: one line for the first thing that is wrong.
    """
    check_suite(suite)
    facts = again(lambda: client.call("describe", {"models": suite.axes.model, "devices": suite.axes.device}))
    models = {name: Dimensions(**dimensions) for name, dimensions in facts["models"].items()}
    plan = _plan(suite, facts, models)
    for device in () if allow_busy else taken(suite, facts):
        again(partial(client.call, "refuse_busy", {"device": device, "own": [os.getpid()]}))
    return plan


def plan_here(suite: Suite, python: Path | None = None) -> Plan:
    """The plan of a suite on this machine, made for ``--dry-run`` in this process: no worker is started for it, and
    torch is not imported unless a model, a device or a parameter can't be read without it.

    Args:
        suite: as read.
        python: an interpreter for the cells of kvpress.

    Raises:
        D2OBenchError: as :func:`check`.
    """
    check_suite(suite)
    with closing(IsolatedWorkers(suite, python)) as isolated:
        isolated.check()
    for name in suite.axes.model:
        check_model(name)
    models = {name: config_of(name) for name in suite.axes.model}
    gpus = count_gpus()
    facts = {"devices": {name: _device_here(name, gpus) for name in suite.axes.device}, "gpus": gpus}
    return _plan(suite, facts, models)


def _plan(suite: Suite, facts: Mapping[str, Any], models: dict[str, Dimensions]) -> Plan:
    check_placement(suite, facts, models)
    devices = tuple(dict.fromkeys(facts["devices"][name] for name in suite.axes.device))
    suite = msgspec.structs.replace(
        suite, axes=msgspec.structs.replace(suite.axes, device=devices), quality=_digested(suite.quality)
    )
    found = cells(suite)
    return Plan(suite, tuple(found), models, _too_long(found, models), sharing(suite, facts))


def _device_here(name: str, gpus: int) -> str:
    """The real device that a name stands for."""
    if name == "cpu" or (name == "auto" and not gpus):
        return "cpu"
    if name in ("auto", "cuda") and gpus:
        return "cuda:0"
    return str(pick_device(name))


def check_suite(suite: Suite) -> None:
    """Policies, tasks, files and numbers; touches no model."""
    timing = suite.timing
    if timing.rounds > timing.max_rounds:
        raise SuiteError(
            f"suite {suite.name}: timing.rounds {timing.rounds} is above timing.max_rounds {timing.max_rounds}",
            remedy="raise timing.max_rounds",
        )
    if timing.memory_limit:
        parse_memory(timing.memory_limit, 1)
    for text in suite.axes.policy:
        choice = parse_choice(text)
        choice.check()
        if choice.yardstick is not None:
            choice.yardstick.installed()
    quality = [text for text in suite.axes.task if text != SPEED]
    _check_speed_only(suite, quality)
    tasks = {text: parse_task(text) for text in quality}
    names = {task.name for task in tasks.values()}
    for name, path in suite.quality.data.items():
        if name not in names:
            raise UsageError(
                f"data is given for '{name}'", why="the suite does not run it", remedy=f"add --task {name}"
            )
        if not Path(path).expanduser().exists():
            raise DataError(f"the data for '{name}' is not there", why=f"no file {path}")
    blind = [one for one in cells(suite) if one.task is not None and one.task.sense] if quality else []
    if random := [one.axes for one in blind if one.axes.model.startswith("shape:")]:
        raise ModelError(
            f"the task '{random[0].task}' can't use {random[0].model}",
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
    for policy in map(parse_choice, suite.axes.policy):
        if policy.yardstick is None or not policy.yardstick.speed_only:
            continue
        if quality:
            raise UsageError(
                f"the task '{quality[0]}' can't use {policy}",
                why="it is another engine, measured for speed only",
                remedy="add --task speed, or leave it out",
            )
        for name in suite.axes.model:
            check_gguf(name)


def _too_long(cells: Sequence[Cell], models: dict[str, Dimensions]) -> dict[str, str]:
    """Cells whose text does not fit the model's context, with the reason; a suite of nothing else can't run.

    A speed cell says nothing of quality: it may go beyond, where the model's positions can.
    """
    found = {}
    for cell in cells:
        if cell.shape is None:
            continue
        model = models[cell.axes.model]
        bound = model.bound if cell.timed else ""
        if cell.shape.prompt + cell.shape.gen > model.context and (bound or not cell.timed):
            reason = (
                f"the shape {cell.shape} is longer than the context of {cell.axes.model} ({model.context:,} tokens)"
            )
            found[cell.id] = f"{reason}, and {bound}" if bound else reason
    if found and len(found) == len(cells):
        raise UsageError(next(iter(found.values())), remedy="use a shorter shape, or a model with a longer context")
    return found
