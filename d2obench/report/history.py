"""A history as a :class:`~d2obench.report.view.Report`: a table with a row for each series, and a figure for each
figure of each cell, in which machines and versions have lines of their own and change points are marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from d2obench.gate.history import History, Series, can_find_changes, series
from d2obench.metric import METRICS
from d2obench.record import Value
from d2obench.report.view import Column, Field, Figure, Report, Table, show_value

MAX_FIGURES, MAX_ROWS = 60, 2000
COLUMNS = (
    Column("suite", "suite", numeric=False),
    Column("cell", "cell", numeric=False),
    Column("metric", "figure", numeric=False),
    Column("machine", "machine", numeric=False),
    Column("versions", "versions", numeric=False),
    Column("n", "entries"),
    Column("last", "last"),
    Column("level", "level", about="median of the entries since the last change point"),
    Column("change", "last change", numeric=False, about="level ÷ the level before − 1, and the commit that began it"),
)
POINTS = ("series", "number", "when", "commit", "value", "lo", "hi", "begins")


def view(history: History, *, cell: str = "", metric: str = "", name: str = "history") -> Report:
    """The page of a history; ``cell`` and ``metric`` choose those whose name contains the text, or is it."""
    every = [one for one in series(history.entries) if cell in one.cell and (not metric or one.metric == metric)]
    changed = sum(bool(one.changes) for one in every)
    warnings = list(history.warnings)
    if not can_find_changes():
        warnings.append("change points of noisy figures are not marked: pip install 'd2obench[history]'")
    figures = _figures(every)
    left = len({_place(one) for one in every}) - len(figures)
    if left > 0:
        warnings.append(f"{left} more figures are in the table only; choose some with --cell or --metric")
    table = Table("Figures over time", COLUMNS, tuple(map(_row, every[:MAX_ROWS])), left_out=len(every[MAX_ROWS:]))
    return Report(
        title="History",
        subtitle=f"{len(history.entries)} entries, {len(every)} series",
        verdict=(f"{changed} of {len(every)} series changed their level.",)
        if every
        else ("There is nothing to show.",),
        warnings=tuple(warnings),
        headline=(table,) if every else (),
        figures=tuple(figures),
        name=name,
    )


def _row(one: Series) -> tuple[Field, ...]:
    header = METRICS[one.metric].header
    last = one.points[-1]
    levels = _levels(one)
    level = Field(show_value(one.metric, Value(median(levels[-1]))).text)
    change = Field("–", mark="quiet")
    if one.changes:
        before, after = median(levels[-2]), median(levels[-1])
        began = one.points[one.changes[-1]].entry
        words = f"{after / before - 1:+.1%} " if before else ""
        worse = (after - before) * {"lower": 1, "higher": -1, "none": 0}[METRICS[one.metric].direction]
        change = Field(
            f"{words}at {began.commit[:12]}, {began.when[:10]}",
            mark="bad" if worse > 0 else "best" if worse < 0 else "",
        )
    return (
        Field(one.suite, note=one.settings), Field(one.cell), Field(header), Field(one.machine), Field(one.versions),
        Field(str(len(one.points)), sort=len(one.points)), show_value(one.metric, last.value), level, change,
    )  # fmt: skip


def _levels(one: Series) -> list[list[float]]:
    """The values between change points, in order."""
    values = [float(point.value.value or 0.0) for point in one.points]
    ends = [0, *one.changes, len(values)]
    return [values[a:b] for a, b in pairwise(ends)]


def _place(one: Series) -> tuple[str, str, str]:
    return one.suite, one.cell, one.metric


def _figures(every: Sequence[Series]) -> list[Figure]:
    groups: dict[tuple[str, str, str], list[Series]] = {}
    for one in every:
        groups.setdefault(_place(one), []).append(one)
    made = []
    for number, ((suite, cell, key), group) in enumerate(list(groups.items())[:MAX_FIGURES], 1):
        metric = METRICS[key]
        order = {
            entry: i for i, entry in enumerate(sorted({(p.entry.when, p.entry.id) for s in group for p in s.points}))
        }
        rows = tuple(
            (
                f"{one.machine}; {one.versions}", order[point.entry.when, point.entry.id], point.entry.when,
                point.entry.commit[:12], *_scaled(point.value, metric.scale), i in one.changes,
            )
            for one in group
            for i, point in enumerate(one.points)
        )  # fmt: skip
        unit = f", {metric.unit}" if metric.unit else ""
        arrow = {"lower": " ↓", "higher": " ↑", "none": ""}[metric.direction]
        about = (
            "Point: one entry; line: its interval; dashed: a change point. A line for each machine and its versions."
        )
        made.append(
            Figure(f"history-{number}", "history", f"{metric.header} of {cell} ({suite})", about, POINTS, rows,
                   {"x": "entry, the oldest first", "y": f"{metric.header}{unit}{arrow}", "longest": 120})
        )  # fmt: skip
    return made


def _scaled(value: Value, scale: float) -> tuple[float | None, float | None, float | None]:
    """The value and the ends of its interval as shown; a range of few samples is no interval."""
    ends = (value.lo, value.hi) if value.kind == "interval" else (None, None)
    found = [None if one is None else round(one * scale, 6) for one in (value.value, *ends)]
    return found[0], found[1], found[2]
