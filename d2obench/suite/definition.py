"""A suite: strict TOML → :class:`Suite` → cells. Shipped ones live in the package ``d2obench.suites``.

Unknown keys and wrong types are one SuiteError that names file and key. Every axis can be set from outside
(``overrides``), in the words of ``d2obench.suite.grammar``; the result is resolved once, here, and trusted after.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import tomllib
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from d2obench.errors import SuiteError, UsageError
from d2obench.record import Axes, dump
from d2obench.suite.grammar import parse_budget, parse_numbers, parse_shape, parse_spec, split_list
from d2obench.suite.placement import Placement
from d2obench.suite.target import Target, Where

DTYPES = ("float32", "bfloat16", "float16")
SPEED = "speed"
NUMERIC_AXES = ("batch", "budget", "seed")
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class AxesTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[axes]``: the product a suite runs. ``shape`` and ``batch`` multiply only tasks that use them."""

    policy: tuple[str, ...]
    task: tuple[str, ...] = (SPEED,)
    budget: tuple[float | int, ...] = (0.2,)
    model: tuple[str, ...] = ("embedded",)
    shape: tuple[str, ...] = ()
    batch: tuple[int | str, ...] = (1,)
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    device: tuple[str, ...] = ("auto",)
    seed: tuple[int, ...] = (0,)


class Timing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[timing]``: how often timed cells are repeated.

    Rounds of all policies are interleaved ABBA; they stop after ``rounds`` when every TPOT interval is narrower than
    ``interval`` (relative half-width), and in any case after ``max_rounds`` or ``max_seconds`` a group.
    A disturbed round is kept and flagged and is not one of the ``rounds``, so that another is measured. A shape is
    warmed up by ``warmup`` requests at most, until two successive windows of steps are within ``warm_within``.
    ``decode`` is ``full``, ``sampled`` (steps at ``depths`` points of a long generation, integrated), or ``both``: each
    request is run in full and again sampled, and the row says how far the integral lies from the truth.
    """

    rounds: Positive = 5
    max_rounds: Positive = 8
    warmup: Annotated[int, msgspec.Meta(ge=0)] = 1
    warm_within: Annotated[float, msgspec.Meta(ge=0)] = 0.1
    interval: Annotated[float, msgspec.Meta(gt=0)] = 0.05
    max_seconds: Seconds = 600.0
    decode: Literal["full", "sampled", "both"] = "full"
    depths: Positive = 6
    steps: Positive = 8
    memory_limit: str = ""


class WorkerTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[worker]``: ``shared`` keeps one process with the model warm, ``fresh`` starts one for each cell.

    Fresh processes of cells that are timed together live side by side (see ``d2obench.run.runner``).
    """

    mode: Literal["shared", "fresh"] = "shared"
    timeout_s: Seconds = 1800.0
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0


class Quality(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[quality]``: items per task (0: all), how many are decoded together, and files in place of hub data sets.

    ``digests`` are the sha256 of those files as a run found them, by task; a run fills them in.
    """

    limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    batch: Positive = 8
    data: dict[str, str] = {}
    digests: dict[str, str] = {}


class GateTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[gate]``: how a change is judged (see ``d2obench.gate.rules``).

    ``looks`` are the numbers of interleaved rounds after which timed figures are judged, ``level`` the coverage of the
    interval at each look, ``metrics`` what is timed. ``tolerance`` overrides the metric table's, by metric.
    """

    looks: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (8, 16, 32)
    level: Annotated[float, msgspec.Meta(gt=0.5, lt=1)] = 0.98
    metrics: tuple[str, ...] = ("ttft_s", "tpot_s", "speedup")
    tolerance: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = {}


class Suite(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole suite file. ``exclude`` takes cells out of the product of ``axes``; ``targets`` are what is promised."""

    name: str
    about: str
    axes: AxesTable
    schema: Literal[1] = 1
    models: Placement = msgspec.field(default_factory=Placement)
    timing: Timing = msgspec.field(default_factory=Timing)
    worker: WorkerTable = msgspec.field(default_factory=WorkerTable)
    quality: Quality = msgspec.field(default_factory=Quality)
    gate: GateTable = msgspec.field(default_factory=GateTable)
    exclude: tuple[Where, ...] = ()
    targets: tuple[Target, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 of the resolved suite."""
        return hashlib.sha256(dump(self)).hexdigest()


class Cell(msgspec.Struct, frozen=True):
    """One point to run: its axes, a readable ``id`` and the content ``hash`` that resume goes by."""

    id: str
    hash: str
    axes: Axes


def shipped() -> list[str]:
    """Names of the suites that ship with the package."""
    folder = importlib.resources.files("d2obench.suites")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_suite(name: str, overrides: Mapping[str, str] | None = None) -> Suite:
    """Reads a shipped suite by name or a file by path and lays ``overrides`` over it.

    Args:
        name: ``quick``, or a path that ends in ``.toml``.
        overrides: dotted key → text as typed, for example ``{"axes.policy": "d2o,h2o", "timing.rounds": "3"}``.
    """
    text, source = _read(name)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise SuiteError(f"{source} is not valid TOML", why=str(problem)) from None
    for key, value in (overrides or {}).items():
        _set(table, key, value, source)
    try:
        suite = msgspec.convert(table, Suite)
    except msgspec.ValidationError as problem:
        raise SuiteError(
            f"{source}: {_plain(str(problem))}", remedy="see the suites that ship: d2obench list suites"
        ) from None
    suite = _checked(suite, source)
    if not any(key.startswith("axes.") for key in overrides or ()):  # other axes may leave targets without a cell
        _reached(suite, source)
    return suite


def cells(suite: Suite) -> list[Cell]:
    """Every cell of the suite, in the order they run: cells that are timed together stand together.

    A policy that knows no budget (``full``, ``hf-dynamic``) gives one cell however many budgets there are.
    """
    from d2obench.policies import takes_budget
    from d2obench.tasks import uses_shape

    axes, found = suite.axes, {}
    shapes = [str(shape) for text in axes.shape for shape in parse_shape(text)]
    batches = [batch for text in axes.batch for batch in _batches(text)]
    budgets = [str(parse_budget(budget)) for budget in axes.budget]
    tasks = [str(parse_spec(task, "task")) for task in axes.task]
    policies = [str(parse_spec(policy)) for policy in axes.policy]
    for model, dtype, device, task, seed in product(axes.model, axes.dtype, axes.device, tasks, axes.seed):
        shaped = uses_shape(task)
        if shaped and not shapes:
            raise SuiteError(f"the task '{task}' needs a shape", remedy="add --shape 512+64 or axes.shape")
        for shape, batch in product(shapes if shaped else [None], batches if task == SPEED else [None]):
            for policy in policies:
                for budget in budgets if takes_budget(policy) else [None]:
                    point = Axes(task, model, dtype, device, policy, budget, shape, batch, seed)
                    if not any(where.covers(point) for where in suite.exclude):
                        found[point] = _cell(point, suite)
    if not found:
        raise SuiteError(f"suite {suite.name} excludes every cell", remedy="name fewer cells in its key exclude")
    return list(found.values())


def _cell(point: Axes, suite: Suite) -> Cell:
    at = f"@{point.budget}" if point.budget else ""
    words = [point.task, point.model, point.dtype, point.device, point.policy + at]
    words += [point.shape] if point.shape else []
    words += [f"b{point.batch}"] if point.batch is not None else []
    settings: Any = suite.timing if point.task == SPEED else _settings(point.task, suite.quality)
    placed = [] if suite.models.single else [suite.models]
    content = hashlib.sha256(dump([point, settings, suite.worker.threads, *placed])).hexdigest()[:16]
    return Cell("/".join([*words, f"s{point.seed}"]), content, point)


def _settings(task: str, quality: Quality) -> list[Any]:
    """What a quality cell's figures depend on: of its data the content, where that is known, and not the place."""
    name = task.partition("(")[0]
    return [quality.limit, quality.batch, quality.digests.get(name, quality.data.get(name))]


def _batches(text: int | str) -> list[int | str]:
    return ["max"] if text == "max" else list(parse_numbers(str(text)))


def _read(name: str) -> tuple[str, str]:
    if name.endswith(".toml"):
        try:
            return Path(name).read_text("utf-8"), name
        except (OSError, UnicodeDecodeError) as problem:
            raise SuiteError(f"can't read the suite {name}", why=str(problem)) from None
    names = shipped()
    if name not in names:
        raise SuiteError(f"unknown suite '{name}'", remedy=f"use a path to a .toml or one of {', '.join(names)}")
    entry = importlib.resources.files("d2obench.suites") / f"{name}.toml"
    return entry.read_text("utf-8"), f"suite {name}"


def _set(table: dict[str, Any], key: str, text: str, source: str) -> None:
    *path, last = key.split(".")
    for word in path:
        table = table.setdefault(word, {})
        if not isinstance(table, dict):
            raise SuiteError(
                f"{source} has no table '{word}'", remedy="name keys as table.key, for example timing.rounds"
            )
    if path == ["axes"]:
        table[last] = [_typed(item) if last in NUMERIC_AXES else item for item in split_list(text)]
    else:
        table[last] = _typed(text)


def _typed(text: str) -> Any:
    try:
        found = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["x"] if len(found) == 1 else text


def _plain(message: str) -> str:
    """msgspec's words with its ``$.axes.policy`` path turned into ``key axes.policy``."""
    words, _, path = message.partition(" - at `")
    return f"key {path.rstrip('`').removeprefix('$.').removeprefix('$') or '(top level)'}: {words}" if path else words


def _checked(suite: Suite, source: str) -> Suite:
    """Every word of every axis is read once here, so that a wrong one is found before anything runs."""
    try:
        for text in suite.axes.shape:
            parse_shape(text)
        for batch in suite.axes.batch:
            _batches(batch)
        for budget in suite.axes.budget:
            parse_budget(budget)
        for policy in suite.axes.policy:
            parse_spec(policy)
        for task in suite.axes.task:
            parse_spec(task, "task")
        for where in (*suite.exclude, *suite.targets):
            where.axes  # noqa: B018 - reads the words
    except UsageError as problem:
        raise SuiteError(f"{source}: {problem.what}", why=problem.why, remedy=problem.remedy) from None
    empty = [
        key
        for key in ("policy", "task", "budget", "model", "batch", "dtype", "device", "seed")
        if not getattr(suite.axes, key)
    ]
    if empty:
        raise SuiteError(f"{source}: key axes.{empty[0]}: the list is empty", remedy="give it at least one value")
    for target in suite.targets:
        if fault := target.fault():
            raise SuiteError(f"{source}: key targets: {fault}", remedy="see d2obench list metrics")
    return suite


def _reached(suite: Suite, source: str) -> None:
    """A target or an exclusion that no cell can meet is a word misspelt."""
    every = cells(msgspec.structs.replace(suite, exclude=())) if suite.exclude else []
    lost = [f"exclude {where.axes}" for where in suite.exclude if not any(where.covers(one.axes) for one in every)]
    kept = cells(suite) if suite.targets else []
    lost += [f"targets {goal.axes}" for goal in suite.targets if not any(goal.covers(one.axes) for one in kept)]
    if lost:
        raise SuiteError(f"{source}: no cell of the suite is {lost[0]}", remedy="name values of its axes")
