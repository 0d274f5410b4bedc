"""The plan of a run: the cells of a suite, the groups that are measured together, and the shards of a large sweep.

Speed cells that differ only in policy and budget form a group: they are measured in turn, and their ratios are paired.
A quality cell is a group of its own, which a shard or a device of a cluster may take; where one worker runs them all,
those that differ only in policy and budget form a group, too, whose prompts are read once.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from d2obench.errors import SuiteError, UsageError
from d2obench.models import Dimensions
from d2obench.policies import PolicyChoice, parse_choice
from d2obench.record import Axes, dump
from d2obench.suite.definition import SPEED, Placement, Quality, Suite, is_prompts
from d2obench.suite.grammar import Budget, Shape
from d2obench.tasks import parse_task
from d2obench.tasks.base import Batch, Cell, Task
from d2obench.tasks.data import digest_of


@dataclass(frozen=True)
class Plan:
    """What a run measures: a suite that was checked, and its cells.

    Args:
        suite: its devices are real ones, such as ``cuda:0`` in place of ``auto``.
        cells: in the order they run.
        models: dimensions of every model, by name.
        too_long: why a cell does not fit its model's context, by cell id; such cells end as ``skipped``.
        devices: how many devices share one model.
        began: when the command began, by ``time.monotonic``; the suite's ``within`` counts from there.
    """

    suite: Suite
    cells: tuple[Cell, ...]
    models: dict[str, Dimensions]
    too_long: dict[str, str]
    devices: int = 1
    began: float = field(default_factory=time.monotonic)


def cells(suite: Suite) -> list[Cell]:
    """Every cell of a suite, in the order they run: cells that are timed together stand together.

    A policy without a budget (``full``, ``hf-dynamic``) gives one cell, however many budgets the suite has; shapes and
    batches multiply only the tasks that use them.

    Raises:
        SuiteError: a task lacks a shape, or the suite excludes every cell.
        UsageError, PolicyError: an unknown task or policy.
    """
    axes, planned = suite.axes, {}
    shapes, batches, budgets = axes.shapes, axes.batches, axes.budgets
    policies = [parse_choice(text) for text in axes.policy]
    tasks = [(name, None if name == SPEED else parse_task(name)) for name in map(str, axes.tasks)]
    budgets_of = {str(policy): budgets if policy.takes_budget else [None] for policy in policies}
    for model, dtype, device, (name, task), seed in product(axes.model, axes.dtype, axes.device, tasks, axes.seed):
        shaped = task is None or task.shaped
        if shaped and not shapes:
            raise SuiteError(f"the task '{name}' needs a shape", remedy="add --shape 512+64 or axes.shape")
        for shape, batch in product(shapes if shaped else [None], batches if task is None else [None]):
            for policy in policies:
                for budget in budgets_of[str(policy)]:
                    point = Axes(name, model, dtype, device, str(policy), _text(budget), _text(shape), batch, seed)
                    if not any(where.covers(point) for where in suite.exclude):
                        planned[point] = _cell(point, suite, policy, budget, shape, batch, task)
    if not planned:
        raise SuiteError(f"suite {suite.name} excludes every cell", remedy="name fewer cells in its key exclude")
    return list(planned.values())


def group(cells: Iterable[Cell], *, shared: bool = False) -> list[list[Cell]]:
    """The groups of cells that are measured together, in the order of the suite.

    Args:
        cells: of a plan.
        shared: whether quality cells that differ only in policy and budget form a group.
    """
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        a = cell.axes
        alike = (a.model, a.dtype, a.device, a.shape, a.batch, a.seed)
        key = alike if cell.timed else (a.task, *alike) if shared else cell.id
        groups.setdefault(key, []).append(cell)
    return list(groups.values())


def shares(suite: Suite) -> bool:
    """Whether the quality cells of a suite share prefills: not if each has a process of its own, nor if several ranks
    hold the model, which would have to fail alike."""
    return suite.quality.share and suite.worker.mode == "shared" and suite.models.tensor_parallel == 1


def abba(cells: Sequence[Cell], round_: int) -> list[Cell]:
    """The order of one round: forwards in even rounds, backwards in odd ones, so that a steady drift cancels."""
    return list(cells) if round_ % 2 == 0 else list(reversed(cells))


def larger(cell: Cell, than: Cell) -> bool:
    """Whether a cell differs from another one in shape and batch only, and neither is smaller than there."""
    same = ("task", "model", "dtype", "device", "policy", "budget")
    if any(getattr(cell.axes, key) != getattr(than.axes, key) for key in same):
        return False
    if cell.shape is None or than.shape is None or not (isinstance(cell.batch, int) and isinstance(than.batch, int)):
        return False
    bigger = cell.shape.prompt >= than.shape.prompt and cell.shape.gen >= than.shape.gen
    return bigger and cell.batch >= than.batch


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` → (2, 8).

    Raises:
        UsageError: it is not of that form, or the first number is not between 1 and the second.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"can't read the shard '{text}'", remedy="write it as 2/8: the second of eight")
    return number, count


def shard(plan: Plan, number: int, count: int) -> Plan:
    """Part ``number`` of ``count`` of a plan; groups are not divided.

    Raises:
        UsageError: there are fewer groups than that.
    """
    groups = group(plan.cells)[number - 1 :: count]
    if not groups:
        whole = len(group(plan.cells))
        raise UsageError(f"shard {number}/{count} is empty", why=f"the suite has {whole} groups of cells")
    return replace(plan, cells=tuple(cell for together in groups for cell in together))


def part(plan: Plan, planned: Collection[str]) -> Plan:
    """The cells of a plan that a run has planned: fewer than all of its suite, where the run is a shard."""
    cells = tuple(cell for cell in plan.cells if cell.id in planned)
    return replace(plan, cells=cells) if cells else plan


def _cell(
    point: Axes,
    suite: Suite,
    policy: PolicyChoice,
    budget: Budget | None,
    shape: Shape | None,
    batch: Batch | None,
    task: Task | None,
) -> Cell:
    at = f"@{point.budget}" if point.budget else ""
    parts = [point.task, point.model, point.dtype, point.device, point.policy + at]
    parts += [point.shape] if point.shape else []
    parts += [f"b{point.batch}"] if point.batch is not None else []
    settings: Any = suite.timing if task is None else _settings(point.task, suite.quality)
    placed = [] if suite.models == Placement() else [suite.models]
    within = [suite.within] if suite.within else []  # the number of rounds or items depends on it
    files = [digest_of(path) for path in policy.files]
    content = hashlib.sha256(dump([point, settings, suite.worker.threads, *placed, *within, *files])).hexdigest()[:16]
    return Cell("/".join([*parts, f"s{point.seed}"]), content, point, policy, budget, shape, batch, task)


def _settings(task: str, quality: Quality) -> list[Any]:
    """Settings that a quality cell's figures depend on; of files that is the digest, where it is known."""
    name = task.partition("(")[0]
    prompts = {key: quality.digests.get(key, path) for key, path in quality.data.items() if is_prompts(key)}
    data = quality.digests.get(name, quality.data.get(name))
    return [quality.limit, quality.batch, data, *([prompts] if prompts else [])]


def _text(value: Budget | Shape | None) -> str | None:
    return None if value is None else str(value)
