"""The base class of tasks: typed parameters, an evaluation in the worker, and figures that are computed from its items.

A task gives its texts in batches, which do not depend on the policy, and runs one batch at a time under one policy. So
several cells can take a batch in turn, and its prompts are read once for all of them.

A new task is one file with one subclass of :class:`Task` (or of :class:`d2obench.tasks.generate.Generative`), a line in
the registry or an entry point of the group ``d2obench.tasks``, and a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import msgspec

from d2obench.metric import METRICS
from d2obench.policies import PolicyChoice
from d2obench.record import Axes, Value
from d2obench.suite.grammar import Budget, Shape

if TYPE_CHECKING:
    import torch

    from d2obench.cache import Session
    from d2obench.models import LoadedModel

Report = Callable[[int, int], None]
"""``report(done, total)``, both counted in items."""
Item = dict[str, Any]
"""One answer or text that was scored, as it is recorded. It always has an ``id`` and a ``document``, by which intervals
are clustered. Keys of ``d2obench.metric`` hold its figures: one number, or one number per position."""

Count = Annotated[int, msgspec.Meta(ge=1)]
Batch = int | Literal["max"]


@dataclass(frozen=True)
class Cell:
    """One point of a suite, with the value of every axis parsed.

    Axes are text only on the command line, in TOML, in records and in labels. ``d2obench.run.plan.cells`` makes the
    cells of a suite, :func:`d2obench.tasks.read_cell` makes a cell from the request that a worker gets.

    Args:
        id: readable and stable, made of the axes.
        hash: covers everything that the cell's figures depend on; a run that goes on keeps rows with the same hash.
        axes: as they are recorded.
        policy: one of our policies, or a yardstick.
        budget: what the policy may keep; None for one that keeps everything.
        shape: tokens of prompt and generation; None for a task with texts of its own.
        batch: sequences decoded together, or ``max`` for as many as fit; None for a quality task.
        task: the quality task; None for ``speed``, which the runner measures itself.
    """

    id: str
    hash: str
    axes: Axes
    policy: PolicyChoice
    budget: Budget | None
    shape: Shape | None
    batch: Batch | None
    task: Task | None

    @property
    def timed(self) -> bool:
        """Whether its figures are times and bytes of requests; otherwise a task scores its quality."""
        return self.task is None

    def entries(self, shape: Shape) -> int:
        """Entries that a layer of its cache may hold when a request of ``shape`` ends."""
        if self.budget is None:
            return shape.prompt + shape.gen
        if self.policy.protects_prompt:
            return shape.prompt + min(shape.gen, self.budget.of(shape.gen))
        return self.budget.of(shape.prompt)

    def sent(self) -> dict[str, Any]:
        """The cell as text, for a worker; :func:`d2obench.tasks.read_cell` reads it there."""
        return {"id": self.id, "hash": self.hash, "axes": msgspec.to_builtins(self.axes)}


class Quality(Protocol):
    """The part of a suite's table ``[quality]`` that a task uses.

    ``limit`` is the largest number of items (0: all of them), ``batch`` how many are decoded together, ``data`` names
    local files by task, and ``digests`` holds the sha256 of these files as the run found them.
    """

    @property
    def limit(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def data(self) -> Mapping[str, str]: ...
    @property
    def digests(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Evaluation:
    """The result of a task on one cell: figures, the items they are computed from, and details for some views."""

    values: dict[str, Value]
    items: list[Item]
    details: dict[str, Any] = field(default_factory=dict)


class Work(NamedTuple):
    """Roughly how much a task has to do: ``items`` prompts of ``prompt`` tokens, each with ``new`` decode steps."""

    items: int
    prompt: int
    new: int


class TextBatch(NamedTuple):
    """Texts that a task runs at once; they depend on everything but policy and budget.

    ``places`` are the places of their items among all items of the task.
    """

    places: Sequence[int]
    texts: Any


Prefill = Callable[["Session", Sequence[list[int]]], "torch.Tensor"]
"""Reads prompts into a session and returns the logits ``[B, V]`` after them: :func:`prefill`, or
``d2obench.cache.reading.Readings.prefill`` where several policies read the same prompts."""


def prefill(session: Session, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Reads prompts for one session alone."""
    return session.prefill(list(prompts))


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every task. Its fields are its parameters: ``recall(items=4)`` sets ``items``.

    ``name`` is the name it was asked for by.
    """

    shaped: ClassVar[bool] = False
    """Whether the task is run once for each shape (``prompt+gen``) of the suite."""
    sense: ClassVar[bool] = True
    """Whether the task scores text, so that it needs a model with real weights and a tokenizer."""
    prompted: ClassVar[bool] = False
    """Whether the task uses the prompts in files that the user names with ``--prompts``."""

    name: str = ""

    def batches(self, loaded: LoadedModel, cell: Cell, quality: Quality) -> list[TextBatch]:
        """The texts of the task in batches, in the order they are run.

        Args:
            loaded: the model and its tokenizer; with real weights where :attr:`sense` is true.
            cell: shape and seed; policy and budget must not matter.
            quality: the largest number of items, the batch, and files in place of hub data sets.

        Raises:
            DataError: the data set is missing or malformed.
            UsageError: the shape does not fit the task or the model's context.
        """
        raise TypeError(f"{type(self).__name__} has no batches")

    def run(self, loaded: LoadedModel, cell: Cell, batch: TextBatch, prefill: Prefill) -> list[Item]:
        """Runs one batch under the cell's policy and budget; returns an item for each of its places.

        Args:
            prefill: reads prompts into a session. All cells of a task read the same prompts in the same order, so that
                they can be read once for all of them.
        """
        raise TypeError(f"{type(self).__name__} has no run")

    def conclude(self, cell: Cell, quality: Quality, items: list[Item]) -> Evaluation:
        """The result of a cell from the items of all batches, in the order of their places."""
        return Evaluation(self.rescore(items), items)

    @property
    def in_batches(self) -> bool:
        """Whether the task consists of batches, which several cells can take in turn; a task that has an ``evaluate``
        of its own runs one cell after the other."""
        return type(self).evaluate is Task.evaluate

    def evaluate(self, loaded: LoadedModel, cell: Cell, quality: Quality, report: Report) -> Evaluation:
        """Runs the task on one cell, inside the worker process.

        Args:
            loaded: as for :meth:`batches`.
            cell: policy, budget, shape and seed.
            quality: as for :meth:`batches`.
            report: called with how many items are done.
        """
        batches = self.batches(loaded, cell, quality)
        items: dict[int, Item] = {}
        total = sum(len(batch.places) for batch in batches)
        for batch in batches:
            items |= zip(batch.places, self.run(loaded, cell, batch, prefill), strict=True)
            report(len(items), total)
        return self.conclude(cell, quality, [items[place] for place in range(total)])

    def rescore(self, items: list[Item]) -> dict[str, Value]:
        """The figures of recorded items, computed again without the model."""
        return values_of(items)

    def work(self, quality: Quality, shape: Shape | None, context: int) -> Work | None:
        """Roughly what one cell has to do, known before any data is read; used by ``--dry-run`` only.

        Args:
            quality: its ``limit`` bounds the items.
            shape: of the cell, where the task uses one.
            context: the model's positions; longer prompts are cut.

        Returns:
            None where it is unknown.
        """
        return None


def shape_of(cell: Cell) -> Shape:
    """The shape of a cell that must have one: a timed one, or one whose task is :attr:`Task.shaped`."""
    if cell.shape is None:
        raise TypeError(f"the cell {cell.id} has no shape")
    return cell.shape


def at_most(items: int, quality: Quality) -> int:
    """``items``, or the suite's limit where that is less."""
    return min(items, quality.limit or items)


def parameters(cls: type[Task]) -> Mapping[str, Any]:
    """Names and defaults of a task's parameters, its own before those of its base classes."""
    defaults = {item.name: item.default for item in msgspec.structs.fields(cls) if item.name != "name"}
    order = dict.fromkeys(name for base in cls.__mro__ for name in vars(base).get("__annotations__", ()))
    return {name: defaults[name] for name in order if name in defaults}


def values_of(items: Sequence[Item]) -> dict[str, Value]:
    """Every metric of the items, as a mean over documents with an interval or a range.

    An item without a metric, or with None for it, is left out of that metric only; ``n`` counts the documents.
    Perplexity is computed from ``nll``, and ``budget_effective`` from ``kept``: entries kept of an item's prompt ÷ its
    tokens.
    """
    from d2obench.stats.intervals import mean

    figures = {}
    for key, metric in METRICS.items():
        if metric.group != "quality" or metric.kind == "info" or key == "ppl":
            continue
        pairs = [(value, item["document"]) for item in items for value in _flat(item.get(key))]
        if not pairs:
            continue
        values, documents = [value for value, _ in pairs], [document for _, document in pairs]
        ends = {"%": (0.0, 1.0), "points": (-1.0, 1.0)}.get(metric.unit, (0.0, math.inf))
        figures[key] = mean(values, documents, ends=ends)
        if key == "nll":
            figures["ppl"] = _exp(figures[key])
    kept = [item["kept"] for item in items if item.get("kept") is not None]
    if kept:
        figures["budget_effective"] = Value(sum(kept) / len(kept))
    return {key: figures[key] for key in METRICS if key in figures}


def kept_of(session: Session) -> list[Item]:
    """For each sequence ``kept`` (entries kept right after compression ÷ tokens of its prompt, the mean over layers)
    and ``decode_path`` (what executes a decode step)."""
    size = session.footprint()
    return [
        {"kept": sum(layer[i] for layer in size.kept) / (len(size.kept) * tokens), "decode_path": session.decode_path}
        for i, tokens in enumerate(size.prompt_tokens)
    ]


def _exp(value: Value) -> Value:
    def exp(x: float | None) -> float | None:
        return None if x is None else math.exp(x) if x < 700 else math.inf

    return msgspec.structs.replace(value, value=exp(value.value), lo=exp(value.lo), hi=exp(value.hi))


def _flat(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(x) for x in value if x is not None] if isinstance(value, list | tuple) else [float(value)]
