"""What a report says, as plain data: tables of ready text, figures as tables of numbers, sentences.

The records are read and every figure is computed once, in ``d2obench.report.build``; a renderer turns a
:class:`Report` into its own format and computes nothing. The JSON format is this structure itself, so a published
report can be rendered again without the raw samples.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from d2obench.metric import Direction
from d2obench.record import Bounded
from d2obench.stats.claims import Claim

Mark = Literal["", "best", "warn", "bad", "quiet"]
Kind = Literal[
    "overview",
    "tradeoff",
    "speedup",
    "throughput",
    "position",
    "timeline",
    "peak",
    "layers",
    "merges",
    "heatmap",
    "forest",
]
KINDS = get_args(Kind)
FIRST: Kind = "overview"
"""The figure that stands on the first screen."""
Outcome = Literal["passed", "failure", "error", "skipped"]
SCHEMA = 1


class Column(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column: ``header`` and ``unit`` are shown, ``about`` is the definition; an axis column is not ``numeric``."""

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


class Field(msgspec.Struct, frozen=True, omit_defaults=True):
    """One field of a table: ``text`` and its bounds ``lo`` and ``hi`` as shown, ``sort`` as a number.

    The bounds are those of the 95 % interval, or where ``range_of`` samples are too few for one the lowest and
    highest. It is −1 where a record from before intervals were tested does not say what its bounds are.
    ``half`` is the wider half of an interval, for views that have no room for both bounds.

    ``mark``: ``best`` of its group, ``warn`` (a flag), ``bad`` (a cell that gave no figure), ``quiet`` (nothing there).
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
    """``left_out`` rows are in the CSV only. ``groups`` holds the index of each row that begins a new group."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Field, ...], ...]
    groups: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: int = 0


class Figure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A picture as its data: ``kind`` names the chart, ``rows`` the points, ``options`` axis titles and the like.

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
        """The rows as dicts, as a chart wants them."""
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
    """A cell of a run, or a row of a gate, as a test case: what JUnit and GitHub list.

    Args:
        run: the run or the gate.
        id: the cell, or the figure that a gate judged.
        group: the task, or the cell whose figure it is.
        status: a cell's status, or a verdict.
        reason: why it is not well.
        seconds: it took.
        text: its figures.
        outcome: ``failure`` something became worse, ``error`` there is no figure, ``skipped`` it can't be told.
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
    """A whole page, from top to bottom; of a run or several, or of a gate's verdicts.

    Args:
        title: of the page.
        subtitle: what the suite is for, or what was compared with what.
        verdict: what the figures say, in sentences; the most important first.
        warnings: what a reader must know before he believes a figure.
        headline: tables; the first is the one that everybody should see.
        reading: how to read them.
        notes: what else a reader should know, such as flags of cells.
        glossary: what each figure of the tables means; at most one table.
        claims: what the sentences say, as data.
        targets: the suite's targets; at most one table.
        tables: more tables: ratios, costs of parts, what a gate found in order.
        machine: the machine card and the roofline.
        figures: pictures as data.
        cells: every planned cell with how it ended.
        environment: every fact of it.
        suites: run and its suite as TOML.
        again: commands: how to run it again, or what to do next.
        results: every figure of every cell, for CSV.
        cases: for JUnit and GitHub.
        name: begins the names of the files.
        again_title: stands above the commands.
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


def printable(text: str, keep: str = "") -> str:
    """Control characters, ANSI among them, and those that turn the direction of text become a replacement sign.

    Every renderer passes what it shows through this, and then through the escaping of its own format.
    """
    return "".join(char if char.isprintable() or char in keep else "�" for char in text)
