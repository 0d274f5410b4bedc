"""A suite: strict TOML → :class:`Suite`. The suites that ship live in the package ``d2obench.suites``.

An unknown key or a wrong type is one SuiteError that names the file and the key. Every axis can be set from outside
(``overrides``), written as ``d2obench.suite.grammar`` reads it. ``d2obench.run.plan`` makes the cells of a suite,
because the policies and the tasks decide which axes apply to a cell.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from d2obench.errors import SuiteError, UsageError
from d2obench.metric import METRICS, show
from d2obench.record import dump
from d2obench.suite.grammar import (
    Budget,
    Shape,
    Spec,
    parse_batch,
    parse_bound,
    parse_budget,
    parse_duration,
    parse_shape,
    parse_spec,
    split_list,
)

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
    dtype: tuple[Literal["auto", "float32", "bfloat16", "float16"], ...] = ("auto",)
    device: tuple[str, ...] = ("auto",)
    seed: tuple[int, ...] = (0,)

    @property
    def policies(self) -> list[Spec]:
        """The policies, read by the grammar."""
        return [parse_spec(text) for text in self.policy]

    @property
    def tasks(self) -> list[Spec]:
        """The tasks, read by the grammar."""
        return [parse_spec(text, "task") for text in self.task]

    @property
    def budgets(self) -> list[Budget]:
        """The budgets."""
        return [parse_budget(budget) for budget in self.budget]

    @property
    def shapes(self) -> list[Shape]:
        """The shapes, with every range written out."""
        return [shape for text in self.shape for shape in parse_shape(text)]

    @property
    def batches(self) -> list[int | Literal["max"]]:
        """The batches, with every range written out."""
        return [batch for text in self.batch for batch in parse_batch(text)]


class Placement(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """``[models]`` of a suite. How models are loaded; by default on the cell's device, with our kernels.

    Args:
        device_map: accelerate's way to hand out whole layers to the GPUs; ``none`` for one device.
        tensor_parallel: processes ("ranks"), one a device, that hold a share of every layer's heads each.
        kernels: ``d2obench`` lets our kernels compute a model's linear layers, norms and rotary positions where they
            serve; ``library`` runs them exactly as transformers has them.
    """

    device_map: Literal["none", "auto", "balanced", "sequential"] = "none"
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1)] = 1
    kernels: Literal["d2obench", "library"] = "d2obench"

    @property
    def single(self) -> bool:
        """Whether one device holds it all."""
        return self.device_map == "none" and self.tensor_parallel == 1


class Timing(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[timing]``: how often timed cells are repeated.

    Decode steps are measured in windows (``d2obench.measure.samples``): the caches of a group decode in turn, in each
    worker process about ``windows`` windows of each cache, which last ``window_s`` seconds or longer. TTFT and peaks of
    memory are measured in whole requests, one a round. Decode steps are taken from them, too, where a cell has no
    windows: because ``windows`` is 0, or for the reason that its row gives.

    Rounds of all policies are interleaved (ABBA). They end after ``rounds`` rounds without a disturbance, if the TPOT
    intervals of all cells without windows are narrower than ``interval`` (relative half-width), and in any case after
    ``max_rounds`` rounds or ``max_seconds`` seconds of a group. Windows and rounds are divided among ``processes``
    fresh worker processes. A cell is warmed up by ``warmup`` requests at most, until the medians of two successive
    groups of steps are within ``warm_within`` of each other.

    ``decode`` is ``full``, ``sampled`` (steps at ``depths`` points of a long generation, integrated), or ``both``: each
    request is run in full and once more sampled, and the row compares the two times.
    """

    rounds: Positive = 4
    max_rounds: Positive = 8
    windows: Annotated[int, msgspec.Meta(ge=0)] = 32
    window_s: Seconds = 0.1
    processes: Positive = 2
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

    Fresh processes of cells that are timed together exist at the same time (see ``d2obench.run.runner``).
    """

    mode: Literal["shared", "fresh"] = "shared"
    timeout_s: Seconds = 1800.0
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0


class Quality(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[quality]``: items per task (0: all), how many are decoded together, and files in place of hub data sets.

    ``data`` also names files of prompts, under ``prompts``, ``prompts-2`` and so on (``--prompts``). With ``share``,
    cells that differ only in policy and budget read each prompt once together; their figures are the same without.
    ``digests`` are the sha256 of all these files as a run found them; a run fills them in.
    """

    limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    batch: Positive = 8
    data: dict[str, str] = {}
    digests: dict[str, str] = {}
    share: bool = True


class GateTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """``[gate]``: how a change is judged (see ``d2obench.gate.rules``).

    ``looks`` are the numbers of interleaved rounds after which timed figures are judged, ``level`` the coverage of the
    interval at each look, ``metrics`` what is timed. ``tolerance`` overrides the metric table's, by metric.

    ``budget`` bounds the head's own figures, whatever the base has: metric → ``"≤ 60 ms"``. ``environment`` says what
    each side is imported from: its checkout (``none``), or its wheel, installed on top of the environment that runs the
    gate (``shared``) or in an environment of its own (``own``); ``auto`` is ``none`` for d2obench's own repository and
    ``shared`` for any other (see ``d2obench.gate.environments``).
    """

    looks: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (8, 16, 32)
    level: Annotated[float, msgspec.Meta(gt=0.5, lt=1)] = 0.98
    metrics: tuple[str, ...] = ("ttft_s", "tpot_s", "speedup")
    tolerance: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = {}
    budget: dict[str, str] = {}
    environment: Literal["auto", "none", "shared", "own"] = "auto"

    @property
    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        """``budget`` in recorded units: metric → (at least, at most).

        Raises:
            UsageError: there is no such metric, or a bound can't be read.
        """
        found = {}
        for name, text in self.budget.items():
            if name not in METRICS:
                raise UsageError(f"no metric is called '{name}'", remedy="see d2obench list metrics")
            base = METRICS[name].base
            found[name] = parse_bound(text, base, METRICS[name].unit)
        return found


class Where(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """Cells by their axes; an axis that is not named may be anything."""

    task: str | None = None
    model: str | None = None
    policy: str | None = None
    budget: float | int | None = None
    shape: str | None = None
    batch: int | str | None = None

    @property
    def axes(self) -> dict[str, str]:
        """The axes that are named, spelt as cells spell them.

        Raises:
            UsageError: a word that can't be read.
        """
        spell: dict[str, Any] = {
            "task": lambda text: str(parse_spec(text, "task")),
            "policy": lambda text: str(parse_spec(text)),
            "budget": lambda value: str(parse_budget(value)),
            "shape": lambda text: str(parse_shape(text)[0]),
        }
        named = {key: getattr(self, key) for key in Where.__struct_fields__}
        return {key: spell.get(key, str)(value) for key, value in named.items() if value is not None}

    def covers(self, axes: object) -> bool:
        """Whether ``axes`` (an ``Axes``, or anything with the same names) is one of these cells."""
        return all(str(getattr(axes, key)) == value for key, value in self.axes.items())


class Target(Where, frozen=True, kw_only=True):
    """A bound that a figure of some cells must keep: a table ``[[targets]]`` of a suite.

    .. code-block:: toml

        [[targets]]
        metric = "to_streaming"      # any key of d2obench list metrics
        policy = "h2o"               # and, where it matters: budget, shape, batch, model, task
        shape = "2048+64"
        at_least = 0.97              # and / or at_most, in the metric's recorded unit

    ``d2obench.stats.claims.outcome`` decides whether a figure keeps its bounds.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """``≥ 0.97 ×``, ``≤ 1.08 ×``, or ``0.97 … 1.03 ×``, as the metric is shown."""
        low, high = (None if end is None else show(self.metric, end) for end in (self.at_least, self.at_most))
        words = f"{low} … {high}" if low and high else f"≥ {low}" if low else f"≤ {high}"
        return f"{words} {METRICS[self.metric].unit}".rstrip()

    def margin(self, value: float) -> float:
        """How far a figure is inside the nearest bound, relative to that bound; negative outside."""
        margins = []
        if self.at_least is not None:
            margins.append(value / self.at_least - 1 if self.at_least else value)
        if self.at_most is not None:
            margins.append(1 - value / self.at_most if self.at_most else -value)
        return min(margins)

    def fault(self) -> str:
        """What is wrong with the target itself, in words; empty where nothing is."""
        if self.metric not in METRICS:
            return f"no metric is called '{self.metric}'"
        if self.at_least is None and self.at_most is None:
            return f"'{self.metric}' has no bound: give at_least or at_most"
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            return f"'{self.metric}' has at_least above at_most"
        return ""


class Suite(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole suite file.

    ``exclude`` takes cells out of the product of ``axes``; ``targets`` are bounds that figures must keep. ``within`` is
    the time that a run may take, such as ``3m`` (see ``d2obench.run.schedule``); empty for as long as it takes.
    """

    name: str
    about: str
    axes: AxesTable
    schema: Literal[1] = 1
    models: Placement = msgspec.field(default_factory=Placement)
    timing: Timing = msgspec.field(default_factory=Timing)
    worker: WorkerTable = msgspec.field(default_factory=WorkerTable)
    quality: Quality = msgspec.field(default_factory=Quality)
    gate: GateTable = msgspec.field(default_factory=GateTable)
    within: str = ""
    exclude: tuple[Where, ...] = ()
    targets: tuple[Target, ...] = ()

    @property
    def within_s(self) -> float | None:
        """Seconds that a run may take; None for as long as it takes."""
        return parse_duration(self.within) if self.within else None

    @property
    def digest(self) -> str:
        """sha256 of the resolved suite."""
        return hashlib.sha256(dump(self)).hexdigest()


def is_prompts(name: str) -> bool:
    """Whether a name in ``quality.data`` is that of a file of prompts, and not that of a task."""
    return name == "prompts" or name.startswith("prompts-")


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


def gate_table(overrides: Mapping[str, str]) -> GateTable:
    """A table ``[gate]`` without a suite, with ``overrides`` such as ``{"gate.looks": "[8]"}`` laid over its defaults.

    Raises:
        SuiteError: a key of another table, an unknown key, or a wrong value.
    """
    table: dict[str, Any] = {"gate": {}}
    for key, value in overrides.items():
        if not key.startswith("gate."):
            raise SuiteError(
                f"a gate without a suite has no key '{key}'", remedy="set keys of [gate] only, or add --suite"
            )
        _set(table, key, value, "the command line")
    try:
        found = msgspec.convert(table["gate"], GateTable)
        found.bounds  # noqa: B018 - reading is the check
    except msgspec.ValidationError as problem:
        raise SuiteError(f"the table [gate]: {_plain(str(problem))}", remedy="see the suites that ship") from None
    return found


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
        table = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["x"] if len(table) == 1 else text


def _plain(message: str) -> str:
    """msgspec's words with its ``$.axes.policy`` path turned into ``key axes.policy``."""
    words, _, path = message.partition(" - at `")
    return f"key {path.rstrip('`').removeprefix('$.').removeprefix('$') or '(top level)'}: {words}" if path else words


def _checked(suite: Suite, source: str) -> Suite:
    """Reads every axis, so that a wrong value is found before anything runs."""
    try:
        for axis in ("shapes", "batches", "budgets", "policies", "tasks"):
            getattr(suite.axes, axis)
        for where in (*suite.exclude, *suite.targets):
            where.axes  # noqa: B018 - reading is the check
        suite.within_s  # noqa: B018
        suite.gate.bounds  # noqa: B018
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
    """Refuses a target or an exclusion that names a value which no axis has: a word misspelt."""
    axes = suite.axes
    values = {
        "task": axes.tasks,
        "model": axes.model,
        "policy": axes.policies,
        "budget": axes.budgets,
        "shape": axes.shapes,
        "batch": axes.batches,
    }
    spelt = {axis: set(map(str, every)) for axis, every in values.items()}
    for key, every in (("exclude", suite.exclude), ("targets", suite.targets)):
        for where in every:
            if any(value not in spelt[axis] for axis, value in where.axes.items()):
                raise SuiteError(
                    f"{source}: no cell of the suite is {key} {where.axes}", remedy="name values of its axes"
                )
