"""Joins the cells of different tasks into rows: one row for each point that a user can choose.

A speed cell has a shape and a batch; a quality cell often has neither. A quality cell belongs to every row of a speed
cell whose other axes are equal. If there is no such row, it has a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from d2obench.errors import UsageError
from d2obench.record import Axes, CellRecord, Run, Value
from d2obench.suite.definition import SPEED
from d2obench.suite.grammar import parse_shape, parse_spec

Scalar = str | int | None
STANDS = ("kl", "score_diff", "score", "gold_bpb_diff", "ppl", "nll")
"""Metrics that can represent a task, the preferred one first: a difference to the full cache before a plain value."""
KEEPS_MORE = "keeps more than asked"
"""The flag of a policy that holds more than its budget."""


class Key(NamedTuple):
    """The axes of a row; an axis that does not apply is None."""

    run: str
    model: str
    dtype: str
    device: str
    seed: int
    shape: str | None
    batch: int | str | None
    policy: str
    budget: str | None

    @property
    def label(self) -> str:
        """``d2o@0.2``, or ``full``."""
        return f"{self.policy}@{self.budget}" if self.budget else self.policy

    @property
    def group(self) -> Key:
        """The key without policy and budget. Rows whose groups are equal may be compared."""
        return self._replace(policy="", budget=None)

    @property
    def setting(self) -> str:
        """The shape and the batch in words: ``1024+64, batch 4``."""
        words = [self.shape or "", f"batch {self.batch}" if self.batch is not None else ""]
        return ", ".join(word for word in words if word)

    @property
    def described(self) -> str:
        """Label and setting: ``d2o@0.2, 1024+64, batch 4``."""
        return f"{self.label}, {self.setting}" if self.setting else self.label


@dataclass
class Row:
    """One point that a user can choose, and the cells that measured it."""

    key: Key
    cells: list[Result] = field(default_factory=list)

    def value(self, task: str, metric: str) -> Value | None:
        """A figure of one task; None if the row has no such figure."""
        for result in self.cells:
            if result.record.axes.task == task and metric in result.values:
                return result.values[metric]
        return None

    def of(self, task: str) -> Result | None:
        """The cell of one task; None if the row has none."""
        return next((result for result in self.cells if result.record.axes.task == task), None)

    @property
    def foreign(self) -> bool:
        """Whether another engine or another environment made any of its figures; such a row is shown but wins
        nothing."""
        models = (result.record.details.get("model") for result in self.cells)
        return any(isinstance(model, dict) and bool(model.get("flags")) for model in models)

    @property
    def speed(self) -> Result | None:
        """The speed cell, if there is one."""
        return self.of(SPEED)


@dataclass
class Result:
    """A cell of a run; ``values`` holds its own figures and those derived by comparing it with other cells."""

    run: Run
    name: str
    record: CellRecord
    values: dict[str, Value]

    @property
    def key(self) -> Key:
        """The cell's own axes as a row key."""
        axes = self.record.axes
        return Key(
            self.name, axes.model, axes.dtype, axes.device, axes.seed, axes.shape, axes.batch, axes.policy, axes.budget
        )


def join(results: Iterable[Result]) -> list[Row]:
    """The rows in the order in which the values of each axis first appeared in the run, so that comparable rows stand
    together."""
    results = list(results)
    homes: dict[tuple[Scalar, ...], list[Row]] = {}
    for result in sorted(results, key=_specific):
        shape, batch = result.record.axes.shape, result.record.axes.batch
        point = homes.setdefault(_point(result.key), [])
        found = [row for row in point if shape in (None, row.key.shape) and batch in (None, row.key.batch)]
        if not found:
            found = [Row(result.key)]
            point.extend(found)
        for row in found:
            row.cells.append(result)
    return sorted((row for point in homes.values() for row in point), key=_order(results))


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows in groups that may be compared."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key.group, []).append(row)
    return list(groups.values())


def largest(rows: Sequence[Row], most: int) -> list[Row]:
    """At most ``most`` rows, in their order; if there are more, those of the largest settings."""
    if len(rows) <= most:
        return list(rows)
    kept: list[int] = []
    for group in sorted(grouped(rows), key=lambda group: -volume(group[0].key)):
        kept += [id(row) for row in group][: most - len(kept)]
    return [row for row in rows if id(row) in set(kept)]


def yardstick(axes: Axes) -> tuple[Scalar, ...]:
    """A key that is equal for cells that differ only in policy and budget."""
    return (axes.task, axes.model, axes.dtype, axes.device, axes.seed, axes.shape, axes.batch)


def volume(key: Key) -> int:
    """The size of a setting: tokens of prompt and generation, times sequences."""
    try:
        shape = parse_shape(key.shape or "")[0]
    except UsageError:
        return 0
    return (shape.prompt + shape.gen) * (key.batch if isinstance(key.batch, int) else 1)


def _point(key: Key) -> tuple[Scalar, ...]:
    return (key.run, key.model, key.dtype, key.device, key.seed, key.policy, key.budget)


def _specific(result: Result) -> int:
    """Sort key that puts the cells with the most axes first, because they make the rows that other cells join."""
    axes = result.record.axes
    return (axes.task != SPEED) + 2 * (axes.batch is None) + 4 * (axes.shape is None)


def _order(results: list[Result]) -> Callable[[Row], list[int]]:
    """Sort key of rows: each axis in the order in which its values first appear."""
    seen: list[dict[Scalar, int]] = [{} for _ in Key._fields]
    for result in results:
        for place, value in zip(seen, result.key, strict=True):
            place.setdefault(value, len(place))
    return lambda row: [place[value] for place, value in zip(seen, row.key, strict=True)]


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The quality tasks of the rows, each once, in the order in which they were run."""
    found = dict.fromkeys(result.record.axes.task for row in rows for result in row.cells)
    return [task for task in found if task != SPEED]


def unseen(task: str) -> bool:
    """Whether the questions of a quality task were read after the context had been compressed."""
    try:
        return task != SPEED and parse_spec(task, "task").parts[0].params.get("query") == "unseen"
    except UsageError:  # a record of another version
        return False


def short_name(task: str) -> str:
    """The name of a task without its parameters, and whether its questions were unseen."""
    return task.partition("(")[0] + (", question unseen" if unseen(task) else "")


def primary(rows: Iterable[Row], task: str) -> str:
    """The metric that represents a task: the first of STANDS that any row has."""
    rows = list(rows)
    return next((metric for metric in STANDS if any(row.value(task, metric) for row in rows)), "score")


def loss(row: Row, task: str, metric: str) -> float | None:
    """A figure of quality; a difference to the full cache is 0 for the full cache itself."""
    value = row.value(task, metric)
    if value is not None and value.value is not None:
        return value.value
    result = row.of(task)
    same = result is not None and result.record.status == "ok" and row.key.policy == "full"
    return 0.0 if same and (metric.endswith("_diff") or metric == "kl") else None


def kv_bytes(row: Row) -> float | None:
    """KV bytes of the row's speed cell."""
    value = row.value(SPEED, "kv_bytes")
    return value.value if value else None


def held(row: Row, task: str) -> float:
    """The share of the prompt that a row holds at its budget: what was asked for, or more if it keeps more."""
    result, effective = row.of(task), row.value(task, "budget_effective")
    share = effective.value if effective and effective.value is not None else 1.0
    asked = float(row.key.budget or 1.0)
    over = result is not None and KEEPS_MORE in result.record.flags
    return share if over or asked > 1 else asked
