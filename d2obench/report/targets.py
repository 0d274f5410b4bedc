"""A suite's targets beside the run's figures.

A target that several cells meet has a row for each; one that no cell gave a figure for says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from d2obench.metric import METRICS
from d2obench.record import Run, Value
from d2obench.report import evidence
from d2obench.report.rows import Key, Result, Row
from d2obench.report.tables import NOTHING, SHORT_ENDINGS, show_value
from d2obench.report.view import Column, Field, Mark, Table
from d2obench.stats import claims
from d2obench.stats.claims import Claim
from d2obench.suite.definition import Target

NOT_MEASURED: Final = "not measured"
WORDS = {"no verdict": "without a verdict"}
MARKS: dict[str, Mark] = {"met": "best", "missed": "bad", "no verdict": "warn", NOT_MEASURED: "quiet"}


class Judged(NamedTuple):
    """One target of the run ``name`` and one cell's figure, or the cells that gave none.

    ``comparisons`` counts the verdicts of the run, for all of which the interval was widened.
    """

    name: str
    goal: Target
    cells: tuple[Result, ...]
    value: Value | None
    outcome: str
    comparisons: int


def targets(judged: Sequence[Judged]) -> tuple[Table, ...]:
    """The table of every run's targets; none where no suite states any."""
    rows = [_row(one) for one in judged]
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
    if len({one.name for one in judged}) == 1:
        columns, rows = columns[1:], [row[1:] for row in rows]
    note = (
        "A target is met where the whole interval lies inside its bound, missed where all of it lies outside, and else "
        "there is no verdict. For the verdict the interval is wider than the one shown: all verdicts of a run are"
        " right together with 95 %, and a time allows for what differs between processes. A range gives no verdict."
    )
    return (Table("Targets of the suite", tuple(columns), tuple(rows), notes=(note,)),)


def sentence(tables: Sequence[Table]) -> tuple[str, ...]:
    """``Targets: 5 met, 1 missed (decode, ÷ streaming of d2o@0.2).``"""
    rows = [row for table in tables for row in table.rows]
    if not rows:
        return ()
    counts = Counter(row[-1].text for row in rows)
    outcomes = [f"{counts[word]} {WORDS.get(word, word)}" + _named(rows, word) for word in MARKS if counts[word]]
    return (f"Targets of the suite: {', '.join(outcomes)}.",)


def of_suite(suite: Mapping[str, Any]) -> list[Target]:
    """The targets of a suite as a record keeps it; what this version can't read is passed over."""
    try:
        goals = msgspec.convert(suite.get("targets", []), list[Target])
    except msgspec.ValidationError:
        return []
    return [goal for goal in goals if not goal.fault()]


def judge(runs: Sequence[tuple[str, Run]], found: Sequence[Result]) -> list[Judged]:
    """Every run's targets with the cells they are asked of."""
    return [one for name, run in runs for one in _judge(name, of_suite(run.info.suite), found)]


def _judge(name: str, goals: Sequence[Target], found: Sequence[Result]) -> list[Judged]:
    """The targets of one run; all verdicts are right together with 95 %."""
    asked = [
        (goal, [result for result in found if result.name == name and goal.covers(result.record.axes)])
        for goal in goals
    ]
    count = sum(_there(result.values.get(goal.metric)) for goal, cells in asked for result in cells)
    judged = []
    for goal, cells in asked:
        timed = [result for result in cells if _there(result.values.get(goal.metric))]
        for result in timed:
            row = Row(result.key, [result])
            value = result.values[goal.metric]
            outcome = claims.outcome(
                goal.metric, value, goal.at_least, goal.at_most, count, processes=evidence.processes(row)
            )
            doubtful = claims.timed(goal.metric) and (evidence.busy(row) or evidence.impossible(row))
            judged.append(Judged(name, goal, (result,), value, "no verdict" if doubtful else outcome, count))
        if not timed:
            judged.append(Judged(name, goal, tuple(cells), None, NOT_MEASURED, count))
    return judged


def sayings(judged: Iterable[Judged]) -> list[Claim]:
    """``met`` and ``missed`` as data."""
    found = []
    for one in judged:
        if one.value is not None and one.outcome in ("met", "missed"):
            goal, (cell,), timed = one.goal, one.cells, claims.timed(one.goal.metric)
            count = evidence.processes(Row(cell.key, [cell]))
            wide = claims.widened(one.value, one.comparisons, timed=timed, processes=count)
            found.append(
                Claim(
                    "met" if one.outcome == "met" else "missed", cell.record.id, goal.metric, goal.at_least,
                    goal.at_most, lo=wide.lo, hi=wide.hi, comparisons=one.comparisons, processes=count if timed else 0,
                )
            )  # fmt: skip
    return found


def _row(one: Judged) -> tuple[Field, ...]:
    goal, metric = one.goal, METRICS[one.goal.metric]
    what = Field(metric.header, note=metric.about)
    if one.value is None or one.value.value is None:
        failed = [result.record for result in one.cells if result.record.status != "ok"]
        why = Field(SHORT_ENDINGS[failed[0].status], mark="bad", note=failed[0].reason) if failed else NOTHING
        where = Field(", ".join(goal.axes.values()) or "any cell")
        return Field(one.name), what, where, why, Field(goal.bound), NOTHING, Field(NOT_MEASURED, mark="quiet")
    result, margin = one.cells[0], 100 * goal.margin(one.value.value)
    note = [one.value.note] if one.value.note else []
    return (
        Field(one.name),
        what,
        Field("; ".join([_cell(result.key), *result.record.flags, *note])),
        show_value(goal.metric, one.value),
        Field(goal.bound),
        Field(f"{margin:+.1f}", sort=round(margin, 1)),
        Field(one.outcome, mark=MARKS[one.outcome]),
    )


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
