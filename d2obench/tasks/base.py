"""What a task is: typed parameters, an evaluation in the worker, and scores that can be made again from its items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from d2obench.record import Value

if TYPE_CHECKING:
    from d2obench.models import LoadedModel
    from d2obench.suite.definition import Cell, Quality

Report = Callable[[int, int], None]
"""``report(done, total)``, in items."""
Item = dict[str, Any]
"""One scored thing as it is recorded. ``id`` and ``document`` (what intervals are clustered by) are always there; keys
of ``d2obench.metric`` hold its figures: a number, or one number per position."""

Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class Evaluation:
    """What a task found on one cell: the figures of its row, the items behind them, and what only some views use."""

    values: dict[str, Value]
    items: list[Item]
    details: dict[str, Any] = field(default_factory=dict)


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every task. Fields are its parameters: ``recall(items=4)`` sets ``items``.

    A new task is one file with one subclass, a line in the registry (or an entry point of the group
    ``d2obench.tasks``), and a test. ``name`` is the word it was asked by.
    """

    shaped: ClassVar[bool] = False
    """Whether the shapes of a suite multiply it; its cells then carry ``prompt+gen``."""
    sense: ClassVar[bool] = True
    """Whether what the model says matters: such a task needs real weights and a tokenizer."""

    name: str = ""

    def evaluate(self, loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
        """Runs the task on one cell, inside the worker process.

        Args:
            loaded: a model that has sense, and its tokenizer.
            cell: policy, budget, shape and seed.
            quality: items at most, batch, files in place of hub data sets.
            report: told how many items are done.

        Raises:
            DataError: the data set is missing or malformed.
            UsageError: the shape does not fit the task or the model's context.
        """
        raise TypeError(f"{type(self).__name__} has no evaluate")

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """The figures of recorded items, worked out again without the model; pure."""
        from d2obench.tasks.values import values_of

        return values_of(items)


def first_line(cls: type[Task]) -> str:
    """What ``d2obench list tasks`` says of a task: the first line of its docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def parameters(cls: type[Task]) -> Mapping[str, Any]:
    """Names and defaults of a task's parameters."""
    fields = msgspec.structs.fields(cls)
    return {item.name: item.default for item in fields if item.name != "name"}
