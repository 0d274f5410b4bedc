"""Device placement: whether the models of a suite can lie where its table ``models`` says, before any is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2obench.errors import SuiteError, UsageError
from d2obench.models import Dimensions
from d2obench.policies import PolicyChoice, parse_choice
from d2obench.suite.definition import Suite

FIRST = ("cuda", "cuda:0")
"""Names of the first GPU."""


def check_placement(suite: Suite, facts: Mapping[str, Any], models: Mapping[str, Dimensions]) -> None:
    """Raises a UsageError or PolicyError for the first thing that is impossible.

    Args:
        suite: its names are checked already; its devices may still be ``auto``.
        facts: what the worker says: ``devices`` by name, and how many ``gpus`` it sees.
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
    """The devices a suite's models lie on, by their real names."""
    found = list(dict.fromkeys(facts["devices"][name] for name in suite.axes.device))
    if suite.models.single or not any(name.startswith("cuda") for name in found):
        return found
    return [f"cuda:{index}" for index in range(sharing(suite, facts))]


def check_one(suite: Suite, command: str) -> None:
    """A SuiteError where ``command`` would measure a model on one device that a suite wants elsewhere."""
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
