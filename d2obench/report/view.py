"""The content of a report as plain data: sentences, tables whose fields are text, and figures as tables of numbers.

The records are read and every figure is computed once, in :mod:`d2obench.report.build`. A renderer turns a
:class:`Report` into its own format and computes nothing. The format JSON is this structure itself, so that a published
report can be rendered again without the raw samples. The functions at the end turn a value into the text that every
format shows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from d2obench.metric import METRICS, Direction, Metric, show
from d2obench.record import Bounded, Value
from d2obench.stats.claims import Claim

Mark = Literal["", "best", "warn", "bad", "quiet"]
Kind = Literal[
    "overview",
    "tradeoff",
    "budgets",
    "speedup",
    "throughput",
    "position",
    "drift",
    "timeline",
    "peak",
    "layers",
    "merges",
    "diagnosis",
    "heatmap",
    "forest",
    "history",
]
KINDS = get_args(Kind)
FIRST: Kind = "overview"
"""The figure on the first screen."""
Outcome = Literal["passed", "failure", "error", "skipped"]
SCHEMA = 1
ENDINGS = {"oom": "out of memory", "skipped": "skipped", "failed": "failed", "incomparable": "incomparable"}
"""Status of a cell without figures → how it ended, in words."""
UNTESTED = -1
"""``Field.range_of`` of bounds that were recorded before their coverage was tested."""


class Column(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column: ``header`` and ``unit`` are shown, ``about`` is the definition. The column of an axis is not
    ``numeric``."""

    key: str
    header: str
    unit: str = ""
    direction: Direction = "none"
    about: str = ""
    numeric: bool = True

    @property
    def title(self) -> str:
        """``TPOT, ms ↓``: the header with its unit and the direction that is better."""
        arrow = {"lower": " ↓", "higher": " ↑", "none": ""}[self.direction]
        return f"{self.header}, {self.unit}{arrow}" if self.unit else f"{self.header}{arrow}"


UNEVEN = 2.0
"""Longer ÷ shorter half of an interval, beyond which it isn't written as ±."""


class Field(msgspec.Struct, frozen=True, omit_defaults=True):
    """One field of a table.

    Args:
        text: what is shown.
        lo, hi: its bounds as shown: the ends of the 95 % interval, or the lowest and highest of too few samples.
        half: the longer half of an interval, for views that have no room for both bounds; empty where the halves differ
            by more than UNEVEN.
        sort: the number by which a page sorts the column.
        mark: ``best`` of its group, ``warn`` for a flag, ``bad`` for a cell that gave no figure, ``quiet`` for nothing.
        note: an explanation, shown when the pointer rests on the field.
        range_of: number of samples if the bounds are a range; 0 for an interval; UNTESTED for bounds of an old record.
    """

    text: str
    lo: str = ""
    hi: str = ""
    half: str = ""
    sort: float | None = None
    mark: Mark = ""
    note: str = ""
    range_of: int = 0

    @property
    def interval(self) -> str:
        """``lo … hi``, ``lo … hi (range of 2)``, ``lo … hi (not tested)``, or nothing."""
        few = "" if not self.range_of else " (not tested)" if self.range_of < 0 else f" (range of {self.range_of})"
        return f"{self.lo} … {self.hi}{few}" if self.lo else ""


class Table(msgspec.Struct, frozen=True, omit_defaults=True):
    """A table; ``groups`` holds the index of each row that begins a new group, and ``left_out`` is the number of rows
    that only the CSV file has."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Field, ...], ...]
    groups: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: int = 0


class Figure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A figure as data: ``kind`` names the chart, ``rows`` are its points, ``options`` holds axis titles and the like.

    ``id`` is part of file names and begins with ``kind``.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,60}$")]
    kind: Kind
    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | bool | None, ...], ...]
    options: dict[str, Any] = {}

    def records(self) -> list[dict[str, Any]]:
        """The points as dictionaries by column, which is the form that a chart takes."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class CsvRow(msgspec.Struct, frozen=True):
    """One row of ``results.csv``: one figure of one cell, in base units, and ``shown`` as the tables print it.

    ``kind`` says what ``lo`` and ``hi`` are: a 95 % ``interval``, the ``range`` of too few samples, or ``exact``.
    """

    run: str
    cell: str
    task: str
    model: str
    dtype: str
    device: str
    policy: str
    budget: str
    shape: str
    batch: str
    seed: int
    status: str
    metric: str
    value: float | None
    unit: str
    lo: float | None
    hi: float | None
    n: int | None
    shown: str
    flags: str
    note: str
    decode_path: str = ""
    kind: Bounded = ""


class Case(msgspec.Struct, frozen=True):
    """A cell of a run, or a figure that a gate judged, as a test case for JUnit and GitHub.

    Args:
        run: the run or the gate.
        id: the cell, or the figure.
        group: the task, or the cell that the figure belongs to.
        status: a cell's status, or a verdict.
        reason: why the case did not pass.
        seconds: how long the cell took.
        text: its figures.
        outcome: ``failure`` if something became worse, ``error`` without a figure, ``skipped`` if it can't be decided.
    """

    run: str
    id: str
    group: str
    status: str
    reason: str
    seconds: float
    text: str
    outcome: Outcome = "passed"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole page, from top to bottom: of one run, of several runs side by side, or of a gate's verdicts.

    Args:
        title: of the page.
        subtitle: the purpose of the suite, or what was compared with what.
        verdict: what the figures say, in sentences, the most important first.
        warnings: what a reader must know before trusting a figure.
        headline: tables; everybody should see the first one.
        reading: how to read them.
        notes: further remarks, such as the flags of cells and what they mean.
        glossary: definitions of the figures in the tables; at most one table.
        claims: every statement about which figure is better, best or within its target, as data.
        targets: the targets of the suite; at most one table.
        tables: more tables: ratios, costs of parts, what a gate found in order.
        machine: the machine card and the roofline.
        figures: figures as data.
        cells: every planned cell and how it ended.
        environment: every recorded fact of the environment.
        suites: pairs of a run and its suite as TOML.
        again: commands that run it again, or the next steps.
        results: every figure of every cell, for CSV.
        cases: test cases for JUnit and GitHub.
        name: the beginning of the names of files.
        again_title: the heading above the commands.
    """

    title: str
    subtitle: str = ""
    verdict: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    headline: tuple[Table, ...] = ()
    reading: tuple[str, ...] = ()
    machine: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    cells: Table = msgspec.field(default_factory=lambda: Table("Cells", (), ()))
    environment: tuple[Table, ...] = ()
    suites: tuple[tuple[str, str], ...] = ()
    again: tuple[str, ...] = ()
    results: tuple[CsvRow, ...] = msgspec.field(name="tidy", default=())
    cases: tuple[Case, ...] = ()
    schema: int = SCHEMA
    targets: tuple[Table, ...] = ()
    tables: tuple[Table, ...] = ()
    name: str = "report"
    again_title: str = "Run it again"
    notes: tuple[str, ...] = ()
    glossary: tuple[Table, ...] = ()
    claims: tuple[Claim, ...] = ()


NOTHING = Field("–", mark="quiet")
"""The field of a figure that was not measured."""


def axis_column(name: str) -> Column:
    """The column of an axis, such as the policy."""
    return Column(name, name, numeric=False)


def value_column(metric: Metric, task: str = "") -> Column:
    """The column of a metric; its header names the task if several tasks share the metric."""
    header = f"{metric.header} · {task}" if task else metric.header
    return Column(f"{task}:{metric.key}" if task else metric.key, header, metric.unit, metric.direction, metric.about)


def show_value(metric: str, value: Value | None, mark: Mark = "") -> Field:
    """A value as a field; its bounds have as many digits as the value."""
    if value is None or value.value is None:
        return Field("–", mark="quiet", note=value.note if value else "")
    text, sort = signed(metric, value.value), value.value * METRICS[metric].scale
    if value.lo is None or value.hi is None or value.kind == "exact":
        return Field(text, sort=sort, mark=mark, note=value.note)
    shorter, longer = sorted((value.hi - value.value, value.value - value.lo))
    half = show(metric, longer) if value.kind == "interval" and longer <= UNEVEN * shorter else ""
    few = {"interval": 0, "range": value.n}.get(value.kind, UNTESTED)
    return Field(text, show(metric, value.lo), show(metric, value.hi), half, sort, mark, value.note, few)


def bounds_in_words(metric: str, value: Value) -> str:
    """``95 % interval 1.12 … 1.14`` or ``range of 2: 1.1 … 1.2``; empty if the value has no bounds.

    Bounds that were recorded before their coverage was tested are not called an interval.
    """
    key = metric.partition(":")[0]
    if value.lo is None or value.hi is None or value.kind == "exact":
        return ""
    ends = f"{show(key, value.lo)} … {show(key, value.hi)}"
    if value.kind == "interval":
        return f"95 % interval {ends}"
    return f"range of {value.n}: {ends}" if value.kind == "range" else f"bounds {ends}, coverage not tested"


def signed(metric: str, value: float | None) -> str:
    """A figure as shown; a difference carries its sign, also if it is positive."""
    difference = metric.endswith(("_diff", "_rival")) and METRICS[metric].kind == "sampled"
    return ("+" if difference and value is not None and value > 0 else "") + show(metric, value)


def printable(text: str, keep: str = "") -> str:
    """The text with a replacement sign for every control character and every character that changes the direction of
    text; escape sequences of a terminal begin with such a character.

    Every renderer passes what it shows through this function, and then through the escaping of its own format.
    """
    return "".join(char if char.isprintable() or char in keep else "�" for char in text)


def axis_title(metric: str) -> str:
    """``TPOT, ms``: an axis title from the metric table."""
    return f"{METRICS[metric].header}, {METRICS[metric].unit}" if METRICS[metric].unit else METRICS[metric].header
