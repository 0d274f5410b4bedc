"""Finds everything that is wrong with a suite before a model is loaded, and makes the plan of its run.

Policies, tasks, files and numbers are checked first, then models and devices, then what depends on both: shapes that
are longer than a model's context, and whether models can be distributed over devices as the table ``[models]`` says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import DataError, ModelError, SuiteError, UsageError
from d2obench.models import Dimensions, config_of, dtype_for, pick_device
from d2obench.models import check as check_model
from d2obench.models.saved import check_gguf
from d2obench.policies import PolicyChoice, parse_choice
from d2obench.run.isolated_workers import IsolatedWorkers
from d2obench.run.plan import Plan, cells
from d2obench.run.predict import count_gpus
from d2obench.run.worker_client import Client, again
from d2obench.suite.definition import SPEED, Quality, Suite, is_prompts
from d2obench.suite.grammar import parse_memory
from d2obench.tasks import parse_task
from d2obench.tasks.base import Cell
from d2obench.tasks.data import digest_of

FIRST = ("cuda", "cuda:0")
"""Names of the first GPU."""


def check(suite: Suite, client: Client, *, allow_busy: bool = False) -> Plan:
    """Checks a suite and makes its plan; models and devices are checked by the worker.

    Args:
        suite: as read.
        client: the worker; it loads no model for this.
        allow_busy: whether other processes may compute on the GPUs meanwhile.

    Raises:
        D2OBenchError: the first thing that is wrong, in one line.
    """
    check_suite(suite)
    facts = again(lambda: client.call("describe", {"models": suite.axes.model, "devices": suite.axes.device}))
    models = {name: Dimensions(**dimensions) for name, dimensions in facts["models"].items()}
    plan = _plan(suite, facts, models)
    for device in () if allow_busy else taken(suite, facts):
        again(partial(client.call, "refuse_busy", {"device": device, "own": [os.getpid()]}))
    return plan


def plan_here(suite: Suite, python: Path | None = None) -> Plan:
    """Checks a suite and makes its plan in this process, for ``--dry-run``.

    No worker is started, and torch is imported only where a model, a device or a parameter can't be read without it.

    Args:
        suite: as read.
        python: an interpreter that can import kvpress, for its cells.

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
    dtypes: Any = tuple(dict.fromkeys(dtype_for(name, *devices) for name in suite.axes.dtype))
    axes = msgspec.structs.replace(suite.axes, device=devices, dtype=dtypes)
    suite = msgspec.structs.replace(suite, axes=axes, quality=_digested(suite.quality))
    planned = cells(suite)
    return Plan(suite, tuple(planned), models, _too_long(planned, models), sharing(suite, facts))


def _device_here(name: str, gpus: int) -> str:
    """The real device that a name stands for."""
    if name == "cpu" or (name == "auto" and not gpus):
        return "cpu"
    if name in ("auto", "cuda") and gpus:
        return "cuda:0"
    return str(pick_device(name))


def check_suite(suite: Suite) -> None:
    """Checks policies, tasks, files and numbers; reads no model."""
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
        if is_prompts(name):
            if not any(task.prompted for task in tasks.values()):
                raise UsageError(
                    f"prompts are given in {path}",
                    why="no task of the suite uses them",
                    remedy="add --task longbench/…",
                )
        elif name not in names:
            raise UsageError(
                f"data is given for '{name}'", why="the suite does not run it", remedy=f"add --task {name}"
            )
        if not Path(path).expanduser().exists():
            raise DataError(f"the data for '{name}' is not there", why=f"no file {path}")
    scored = [cell for cell in cells(suite) if cell.task is not None and cell.task.sense] if quality else []
    if random := [cell.axes for cell in scored if cell.axes.model.startswith("shape:")]:
        raise ModelError(
            f"the task '{random[0].task}' can't use {random[0].model}",
            why="its weights are random",
            remedy="use a model with real weights, or --task speed",
        )


def _digested(quality: Quality) -> Quality:
    """The table ``[quality]`` with the digest of each data file, which must not differ from one that is known already.

    It is known where a run goes on that was stopped.
    """
    digests = {task: digest_of(path) for task, path in quality.data.items()}
    for task, digest in quality.digests.items():
        if digests.get(task) != digest:
            raise DataError(
                f"the data for '{task}' is not what the run began with",
                why=f"{quality.data.get(task, 'its file')} has changed",
                remedy="put the file back, or start a new run",
            )
    return msgspec.structs.replace(quality, digests=digests)


def _check_speed_only(suite: Suite, quality: Sequence[str]) -> None:
    """Raises where llama.cpp is asked for a quality task, or for a model without a GGUF file: it is only timed."""
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
    """The reason for each cell whose text is too long for the model's context; raises where that is every cell.

    A speed cell may be longer than the context if the model's positions can go on beyond it, since its text is not
    scored.
    """
    too_long = {}
    for cell in cells:
        if cell.shape is None:
            continue
        model = models[cell.axes.model]
        bound = model.bound if cell.timed else ""
        if cell.shape.prompt + cell.shape.gen > model.context and (bound or not cell.timed):
            reason = (
                f"the shape {cell.shape} is longer than the context of {cell.axes.model} ({model.context:,} tokens)"
            )
            too_long[cell.id] = f"{reason}, and {bound}" if bound else reason
    if too_long and len(too_long) == len(cells):
        raise UsageError(next(iter(too_long.values())), remedy="use a shorter shape, or a model with a longer context")
    return too_long


def check_placement(suite: Suite, facts: Mapping[str, Any], models: Mapping[str, Dimensions]) -> None:
    """Raises a UsageError or PolicyError where models can't be distributed as the suite's table ``[models]`` says.

    Args:
        suite: its names are checked already; its devices may still be ``auto``.
        facts: the answer of the worker: ``devices`` by name, and how many ``gpus`` it sees.
        models: dimensions by name.
    """
    placement, gpus = suite.models, int(facts.get("gpus", 0))
    if placement.single:
        return
    if placement.device_map != "none" and placement.tensor_parallel > 1:
        raise SuiteError(
            f"suite {suite.name}: models.device_map and models.tensor_parallel are two ways to the same end",
            remedy="use one of --device-map and --tensor-parallel",
        )
    for name in dict.fromkeys(facts["devices"].values()):
        _check_map(placement.device_map, name, gpus)
        _check_ranks(placement.tensor_parallel, name, gpus)
    for name, model in models.items():
        _check_model(name, model, placement.tensor_parallel)
    for policy in suite.axes.policy:
        _check_policy(parse_choice(policy), placement.tensor_parallel)
    if placement.device_map != "none" and "max" in suite.axes.batch:
        raise UsageError("--batch max can't be searched with --device-map", remedy="name a batch")


def sharing(suite: Suite, facts: Mapping[str, Any]) -> int:
    """How many devices share one model."""
    placement = suite.models
    return int(facts["gpus"]) if placement.device_map != "none" else placement.tensor_parallel


def taken(suite: Suite, facts: Mapping[str, Any]) -> list[str]:
    """The devices that a suite's models lie on, by their real names."""
    devices = list(dict.fromkeys(facts["devices"][name] for name in suite.axes.device))
    if suite.models.single or not any(name.startswith("cuda") for name in devices):
        return devices
    return [f"cuda:{index}" for index in range(sharing(suite, facts))]


def check_one(suite: Suite, command: str) -> None:
    """Raises a SuiteError where a suite distributes its models, for a ``command`` that measures on one device only."""
    if not suite.models.single:
        raise SuiteError(
            f"suite {suite.name}: {command} measures models on one device",
            remedy="leave out its table models, or use d2obench run",
        )


def _check_map(device_map: str, device: str, gpus: int) -> None:
    if device_map == "none":
        return
    option = f"--device-map {device_map}"
    if not device.startswith("cuda") or gpus < 2:
        raise UsageError(
            f"{option} hands a model's layers out to several GPUs",
            why=f"the device is {device}" if not device.startswith("cuda") else f"torch sees {gpus} GPU",
            remedy="leave it out",
        )
    if device not in FIRST:
        raise UsageError(f"{option} starts at the first GPU", why=f"the device is {device}", remedy="use --device cuda")


def _check_ranks(ranks: int, device: str, gpus: int) -> None:
    if ranks == 1:
        return
    option = f"--tensor-parallel {ranks}"
    if device.startswith("cuda") and gpus < ranks:
        raise UsageError(f"{option} needs as many GPUs", why=f"torch sees {gpus}", remedy="use fewer ranks")
    if device.startswith("cuda") and device not in FIRST:
        raise UsageError(f"{option} takes the first GPUs", why=f"the device is {device}", remedy="use --device cuda")
    if not device.startswith("cuda") and gpus:
        raise UsageError(f"{option} on {device} and on GPUs can't be one run", remedy=f"use --device {device} alone")


def _check_model(name: str, model: Dimensions, ranks: int) -> None:
    from d2obench.models.devices import check_split

    if ranks > 1 and (name.startswith("shape:") or name.lower().endswith(".gguf")):
        raise UsageError(
            f"--tensor-parallel {ranks} can't split {name}",
            why="transformers splits a model while it reads safetensors",
            remedy="use a folder or a hub model that has them, or embedded",
        )
    if ranks > 1:
        check_split(name, model.architecture, model.kv_heads, ranks)


def _check_policy(choice: PolicyChoice, ranks: int) -> None:
    from d2obench.cache.devices import check_shardable

    if choice.yardstick is not None and not choice.yardstick.several_devices:
        raise UsageError(
            f"{choice} runs on one device",
            why="it belongs to another library, which knows nothing of ranks or of a device map",
            remedy="leave out --tensor-parallel and --device-map, or the policy",
        )
    if choice.yardstick is None and ranks > 1:
        check_shardable(choice.policy)
