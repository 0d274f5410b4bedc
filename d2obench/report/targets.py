"""A suite's targets beside the run's figures, and every ratio inside a run in one table.

A target that several cells meet has a row for each; one that no cell gave a figure for says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from d2obench.metric import METRICS
from d2obench.record import Run, Value
from d2obench.report.fields import SHORT, axis, axis_column, column, field, varying
from d2obench.report.headline import MAX_ROWS
from d2obench.report.rows import Entry, Key, Row, largest
from d2obench.report.view import Column, Mark, Table
from d2obench.report.view import Entry as Field
from d2obench.suite.definition import SPEED
from d2obench.suite.target import Target

RATIOS = (
    "speedup", "speedup_e2e", "speedup_memory", "to_streaming", "to_library", "prefill_cost", "prefill_peak_cost",
    "sampled_error", "mbu", "loop_overhead",
)  # fmt: skip
ENOUGH = 2
"""Ratios that make a table; fewer stand in the headline."""
NOT_MEASURED = "not measured"
MARKS: dict[str, Mark] = {"met": "best", "missed": "bad", "no verdict": "warn", NOT_MEASURED: "quiet"}


def targets(runs: Sequence[tuple[str, Run]], found: Sequence[Entry]) -> tuple[Table, ...]:
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


def ratios(rows: Sequence[Row]) -> tuple[Table, ...]:
    """Every timed row's ratios to the other caches of its run; none where there are hardly any."""
    timed = [row for row in rows if row.speed is not None and row.speed.record.status == "ok"]
    known = [key for key in RATIOS if any(_there(row.value(SPEED, key)) for row in timed)]
    if sum(METRICS[key].kind == "ratio" for key in known) < ENOUGH:
        return ()
    names, shown = varying(timed), largest(timed, MAX_ROWS)
    columns = [*map(axis_column, names), *(column(METRICS[key]) for key in known)]
    columns.append(Column("remarks", "remarks", numeric=False))
    body = [
        (
            *(axis(row.key, name) for name in names),
            *(field(key, row.value(SPEED, key)) for key in known),
            Field("; ".join(flags := row.speed.record.flags if row.speed else ()), mark="warn" if flags else ""),
        )
        for row in shown
    ]
    if not any(fields[-1].text for fields in body):
        columns, body = columns[:-1], [fields[:-1] for fields in body]
    groups = [i for i, row in enumerate(shown) if not i or row.key.group != shown[i - 1].key.group]
    left_out = max(0, len(timed) - MAX_ROWS)
    return (Table("Ratios inside the run", tuple(columns), tuple(body), tuple(groups), left_out=left_out),)


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


def _rows(name: str, goal: Target, found: Sequence[Entry]) -> Iterator[tuple[Field, ...]]:
    metric = METRICS[goal.metric]
    what = Field(metric.header, note=metric.about)
    cells = [entry for entry in found if entry.name == name and goal.covers(entry.record.axes)]
    timed = [entry for entry in cells if _there(entry.values.get(goal.metric))]
    for entry in timed:
        value = entry.values[goal.metric]
        assert value.value is not None
        outcome, margin = goal.outcome(value), 100 * goal.margin(value.value)
        yield (
            Field(name),
            what,
            Field("; ".join([_cell(entry.key), *entry.record.flags, *([value.note] if value.note else [])])),
            field(goal.metric, value),
            Field(goal.bound),
            Field(f"{margin:+.1f}", sort=round(margin, 1)),
            Field(outcome, mark=MARKS[outcome]),
        )
    if not timed:
        words = [SHORT[entry.record.status] for entry in cells if entry.record.status != "ok"]
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
