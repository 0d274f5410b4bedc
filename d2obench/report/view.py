"""What a report says, as plain data: tables of ready text, figures as tables of numbers, sentences.

The records are read and every figure is computed once, in ``d2obench.report.build``; a renderer turns a
:class:`Report` into its own format and computes nothing. The JSON format is this structure itself, so a published
report can be rendered again without the raw samples.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from d2obench.metric import Direction

Mark = Literal["", "best", "warn", "bad", "quiet"]
Kind = Literal[
    "tradeoff", "speedup", "throughput", "position", "timeline", "peak", "layers", "merges", "heatmap", "forest"
]
KINDS = get_args(Kind)
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


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One field of a table: ``text`` and the bounds ``lo``, ``hi`` of its 95 % interval as shown, ``sort`` as a number.

    ``half`` is the wider half of the interval, for views that have no room for both bounds.

    ``mark``: ``best`` of its group, ``warn`` (a flag), ``bad`` (a cell that gave no figure), ``quiet`` (nothing there).
    """

    text: str
    lo: str = ""
    hi: str = ""
    half: str = ""
    sort: float | None = None
    mark: Mark = ""
    note: str = ""

    @property
    def interval(self) -> str:
        """``lo … hi``, or nothing."""
        return f"{self.lo} … {self.hi}" if self.lo else ""


class Table(msgspec.Struct, frozen=True, omit_defaults=True):
    """``left_out`` rows are in the CSV only. ``groups`` holds the index of each row that begins a new group."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
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


class Tidy(msgspec.Struct, frozen=True):
    """One row of ``results.csv``: one figure of one cell, in base units, and ``shown`` as every view prints it."""

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


class Case(msgspec.Struct, frozen=True):
    """One cell as a test case: what JUnit and the GitHub summary list."""

    run: str
    id: str
    group: str
    status: str
    reason: str
    seconds: float
    text: str


class Report(msgspec.Struct, frozen=True):
    """A whole page; ``targets`` and ``tables`` (ratios, costs of parts) stand between headline and machine."""

    title: str
    subtitle: str
    verdict: tuple[str, ...]
    warnings: tuple[str, ...]
    headline: tuple[Table, ...]
    reading: tuple[str, ...]
    machine: tuple[Table, ...]
    figures: tuple[Figure, ...]
    cells: Table
    environment: tuple[Table, ...]
    suites: tuple[tuple[str, str], ...]
    again: tuple[str, ...]
    tidy: tuple[Tidy, ...]
    cases: tuple[Case, ...]
    schema: int = SCHEMA
    targets: tuple[Table, ...] = ()
    tables: tuple[Table, ...] = ()
