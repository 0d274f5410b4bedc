"""A suite's targets beside the run's figures.

A target that several cells meet has a row for each; one that no cell gave a figure for says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from d2obench.metric import METRICS
from d2obench.record import Run, Value
from d2obench.report.rows import Key, Result
from d2obench.report.tables import SHORT_ENDINGS, show_value
from d2obench.report.view import Column, Field, Mark, Table
from d2obench.suite.target import Target

NOT_MEASURED = "not measured"
MARKS: dict[str, Mark] = {"met": "best", "missed": "bad", "no verdict": "warn", NOT_MEASURED: "quiet"}


def targets(runs: Sequence[tuple[str, Run]], found: Sequence[Result]) -> tuple[Table, ...]:
    """The table of every run's targets; none where no suite states any."""
    rows = [row for name, run in runs for goal in of_suite(run.info.suite) for row in _rows(name, goal, found)]
    if not rows:
        return ()
    columns = [
        Column("run", "run", numeric=False),
        Column("metric", "figure", numeric=False),
        Column("cell", "of", numeric=False),
        Column("measured", "measured"),
        Column("bound", "target", numeric=False),
        Column("margin", "margin", "%", about="how far inside its bound the figure lies; negative: short of it"),
        Column("outcome", "verdict", numeric=False),
    ]
    if len(runs) == 1:
        columns, rows = columns[1:], [row[1:] for row in rows]
    note = (
        "A target is met where the whole 95 % interval lies inside its bound, missed where all of it lies outside, "
        "and else there is no verdict."
    )
    return (Table("Targets of the suite", tuple(columns), tuple(rows), notes=(note,)),)


def sentence(tables: Sequence[Table]) -> tuple[str, ...]:
    """``Targets: 5 met, 1 missed (decode, ÷ streaming of d2o@0.2).``"""
    rows = [row for table in tables for row in table.rows]
    if not rows:
        return ()
    counts = Counter(row[-1].text for row in rows)
    said = [f"{counts[word]} {word}" + _named(rows, word) for word in MARKS if counts[word]]
    return (f"Targets of the suite: {', '.join(said)}.",)


def of_suite(suite: Mapping[str, Any]) -> list[Target]:
    """The targets of a suite as a record keeps it; what this version can't read is passed over."""
    try:
        goals = msgspec.convert(suite.get("targets", []), list[Target])
    except msgspec.ValidationError:
        return []
    return [goal for goal in goals if not goal.fault()]


def _rows(name: str, goal: Target, found: Sequence[Result]) -> Iterator[tuple[Field, ...]]:
    metric = METRICS[goal.metric]
    what = Field(metric.header, note=metric.about)
    cells = [result for result in found if result.name == name and goal.covers(result.record.axes)]
    timed = [result for result in cells if _there(result.values.get(goal.metric))]
    for result in timed:
        value = result.values[goal.metric]
        assert value.value is not None
        outcome, margin = goal.outcome(value), 100 * goal.margin(value.value)
        yield (
            Field(name),
            what,
            Field("; ".join([_cell(result.key), *result.record.flags, *([value.note] if value.note else [])])),
            show_value(goal.metric, value),
            Field(goal.bound),
            Field(f"{margin:+.1f}", sort=round(margin, 1)),
            Field(outcome, mark=MARKS[outcome]),
        )
    if not timed:
        words = [SHORT_ENDINGS[result.record.status] for result in cells if result.record.status != "ok"]
        why = Field(words[0], mark="bad", note=cells[0].record.reason) if words else Field("–", mark="quiet")
        where = Field(", ".join(goal.axes.values()) or "any cell")
        end = Field(NOT_MEASURED, mark="quiet")
        yield Field(name), what, where, why, Field(goal.bound), Field("–", mark="quiet"), end


def _named(rows: Sequence[tuple[Field, ...]], word: str) -> str:
    """What was missed, by name."""
    if word != "missed":
        return ""
    names = [f"{row[-6].text} of {row[-5].text.partition(';')[0]}" for row in rows if row[-1].text == word]
    return f" ({'; '.join(names[:4])}{' and more' if len(names) > 4 else ''})"


def _cell(key: Key) -> str:
    return f"{key.label}, {key.setting}" if key.setting else key.label


def _there(value: Value | None) -> bool:
    return value is not None and value.value is not None
