"""The headline table: one row per point a user can choose, one column per figure that some row has.

Axes that do not vary are left out of the columns and said once in the title. Each task is represented by one figure
of quality; all the others stand in a second table. With more than ``MAX_TASKS`` tasks the first table leaves quality
to the second.
"""

from __future__ import annotations

from collections.abc import Sequence

from d2obench.metric import METRICS, show
from d2obench.record import CellRecord
from d2obench.report.fields import NOTHING, SHORT, WORDS, axis, axis_column, column, field, fixed, varying
from d2obench.report.quality import front, primary, tasks_of
from d2obench.report.rows import Entry, Key, Row, grouped, join, largest
from d2obench.report.view import Column, Table
from d2obench.report.view import Entry as Field
from d2obench.suite.definition import SPEED

MAX_TASKS, MAX_ROWS, MAX_WHY = 4, 240, 140
ELSEWHERE = ("mbu",)
"""Headline metrics that the roofline table shows instead."""
Where = tuple[str, str]


def headline(found: Sequence[Entry], rows: Sequence[Row]) -> list[Table]:
    """The headline tables, none where there is no row."""
    tasks = tasks_of(rows)
    stands = [(task, primary(rows, task)) for task in tasks]
    every = [(task, metric) for task in tasks for metric in _metrics(rows, task) if METRICS[metric].group == "quality"]
    speed = [(SPEED, metric) for metric in _metrics(rows, SPEED) if metric not in ELSEWHERE]
    few = len(tasks) <= MAX_TASKS
    budget = [where for where in speed if METRICS[where[1]].group == "budget"]
    first = [*budget, *(stands if few else ()), *(where for where in speed if where not in budget)]
    known = [where for where in first if any(row.value(*where) for row in rows) or where[0] == SPEED]
    whole = few and any(where in known for where in stands)
    tables = [_table("Quality, memory and speed" if whole else "Memory and speed", rows, known)] if known else []
    rest = [where for where in every if not few or where not in stands]
    if rest:
        quality = join(entry for entry in found if entry.record.axes.task != SPEED)
        shown = _by_metric(
            [where for where in every if where[1] in {metric for _, metric in (stands if not few else rest)}]
        )
        tables.append(_table("Quality" if few else "Quality by task", quality, shown))
    bare = [row for row in rows if not any(entry.record.status == "ok" for entry in row.cells)]
    if not tables and bare:
        tables.append(_table("Cells without figures", bare, []))
    return tables


def _metrics(rows: Sequence[Row], task: str) -> list[str]:
    """The headline metrics some cell of the task has, in the order of the metric table."""
    found = [entry.values.items() for row in rows if (entry := row.of(task))]
    there = {key for values in found for key, value in values if value.value is not None}
    return [key for key, metric in METRICS.items() if metric.headline and key in there]


def _by_metric(wheres: Sequence[Where]) -> list[Where]:
    order = list(METRICS)
    return sorted(wheres, key=lambda where: order.index(where[1]))


def _table(title: str, rows: Sequence[Row], wheres: Sequence[Where]) -> Table:
    names = varying(list(rows))
    shared = {metric for _, metric in wheres if sum(other == metric for _, other in wheres) > 1}
    columns = [axis_column(name) for name in names]
    columns += [column(METRICS[metric], task if metric in shared else "") for task, metric in wheres]
    tasks = tasks_of(rows)
    best, stands = _best(rows, wheres), front(rows, tasks[0]) if tasks else set()
    body, groups = [], []
    shown = largest(rows, MAX_ROWS)
    for number, row in enumerate(shown):
        if not number or row.key.group != shown[number - 1].key.group:
            groups.append(number)
        fields = [
            Field(f"{row.key.policy} ◆") if name == "policy" and row.key in stands else axis(row.key, name)
            for name in names
        ]
        fields += [_figure(row, task, metric, (row.key, task, metric) in best) for task, metric in wheres]
        body.append((*fields, _remarks(row)))
    columns.append(Column("remarks", "remarks", numeric=False))
    if not any(fields[-1].text for fields in body):
        columns, body = columns[:-1], [fields[:-1] for fields in body]
    said = fixed(rows[0].key, names)
    left_out = max(0, len(rows) - MAX_ROWS)
    return Table(f"{title}: {said}" if said else title, tuple(columns), tuple(body), tuple(groups), left_out=left_out)


def _figure(row: Row, task: str, metric: str, best: bool) -> Field:
    value = row.value(task, metric)
    if value is not None:
        return field(metric, value, "best" if best else "")
    entry = row.of(task)
    if entry is not None and entry.record.status != "ok":
        return Field(SHORT[entry.record.status], mark="bad")
    return NOTHING


def _remarks(row: Row) -> Field:
    """Flags, and the tasks that gave no figures; why, where that is not the rule of the game."""
    flags = list(dict.fromkeys(flag for entry in row.cells for flag in entry.record.flags))
    ended = [entry.record for entry in row.cells if entry.record.status != "ok"]
    bad = [f"{record.axes.task}: {WORDS[record.status]}{_why(record)}" for record in ended]
    return Field("; ".join([*flags, *bad]), mark="bad" if bad else "warn" if flags else "")


def _why(record: CellRecord) -> str:
    """The reason of a failure, cut short: the table of cells has all of it."""
    if record.status in ("oom", "skipped") or not record.reason:
        return ""
    return f" ({record.reason if len(record.reason) <= MAX_WHY else record.reason[: MAX_WHY - 1] + '…'})"


def _best(rows: Sequence[Row], wheres: Sequence[Where]) -> set[tuple[Key, str, str]]:
    """The best figure of each column in each group; that full loses no quality is no news, and only figures of one
    engine and environment are held against each other."""
    found = set()
    for group in grouped(rows):
        for task, metric in wheres:
            direction = METRICS[metric].direction
            own = [row for row in group if not row.foreign]
            judged = [row for row in own if METRICS[metric].group != "quality" or row.key.policy != "full"]
            values = {row.key: value.value for row in judged if (value := row.value(task, metric))}
            known = {key: value for key, value in values.items() if value is not None}
            if direction == "none" or len(known) < 2:
                continue
            top = (min if direction == "lower" else max)(known.values())
            winners = [key for key, value in known.items() if show(metric, value) == show(metric, top)]
            if len(winners) < len(known):
                found |= {(key, task, metric) for key in winners}
    return found
