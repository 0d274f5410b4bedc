"""The tables of a report: the headline, the suite's targets, the ratios inside a run, and the costs of parts.

A table has one row for each point that a user can choose and one column for each figure that at least one row has. An
axis that does not vary has no column; the title names it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from d2obench.metric import METRICS, Metric, show
from d2obench.record import CellRecord, Value
from d2obench.report.evidence import NOT_MEASURED, Judged, Where, doubtful, front, impossible, winners
from d2obench.report.rows import (
    Key,
    Result,
    Row,
    grouped,
    join,
    largest,
    primary,
    short_name,
    tasks_of,
    unseen,
    volume,
)
from d2obench.report.view import ENDINGS, NOTHING, Column, Field, Mark, Table, axis_column, show_value, value_column
from d2obench.stats.claims import Claim
from d2obench.suite.definition import SPEED

AXES = ("run", "model", "dtype", "device", "seed", "shape", "batch", "policy", "budget")
SHORT_ENDINGS = ENDINGS | {"oom": "OOM"}
"""Status of a cell without figures → a word that fits a field of a table."""
UNLIKE = "≠"
"""Follows the name of a run that was made in another environment than the first run of a report."""
MAX_TASKS, MAX_ROWS, MAX_WHY = 4, 240, 140
"""Tasks with a column in the headline table, rows of a table, and characters of the reason why a cell failed."""
ELSEWHERE = ("mbu",)
"""Headline metrics that are shown in the roofline table instead."""
RATIO_COLUMNS = (
    "speedup", "speedup_e2e", "speedup_memory", "to_streaming", "to_library", "prefill_cost", "prefill_peak_cost",
    "sampled_error", "mbu", "loop_overhead",
)  # fmt: skip
ENOUGH_RATIOS = 2
"""The smallest number of ratios for which there is a table of ratios; with fewer, the headline table has them."""
PARTS = (
    ("step_share", "Cost of the parts of a decode step", ("tpot_s", "ranges_overhead")),
    ("prefill_share", "Cost of the parts of prefill and compression", ("ttft_s",)),
)
"""For each table of parts: the metric whose parts are the columns, the title, and the columns in front of them."""
PARTS_ORDER = (
    "attention", "scores", "allocation", "similarity", "eviction", "merge", "rest of the policy", "projections", "MLP",
    "lm head", "rest of the model", "loop",
)  # fmt: skip
PARTS_NOTE = (
    "Each share is the time of a part itself, without the parts inside it, divided by the whole. The shares of a row "
    "add up to nearly 100 %, because each is a median. TPOT is that of steps without time stamps. A kernel that "
    "computes several parts at once counts as the part that calls it, and steps with time stamps use no CUDA graph."
)
FIRST_COLUMNS = ("kv_bytes", "ttft_s", "decode_tok_s", "speedup")
FIRST_TASKS, MAX_FIRST_ROWS = 2, 24
"""Tasks with a column in the first table, and its rows."""
OUTCOMES: dict[str, Mark] = {"met": "best", "missed": "bad", "no verdict": "warn", NOT_MEASURED: "quiet"}
"""Outcome of a target → the mark of its field."""
TARGETS_NOTE = (
    "A target is met if the whole interval lies inside its bound and missed if all of it lies outside; otherwise there "
    "is no verdict. For the verdict the interval is wider than the one shown: all verdicts of a run are right together "
    "with 95 %, and a time allows for what differs between processes. A range gives no verdict."
)


def first(rows: Sequence[Row]) -> list[Table]:
    """The table that everybody should see, with at most nine columns and MAX_FIRST_ROWS rows and three digits a figure.

    The axes that vary, other than policy and budget, share one column. The largest setting comes first; if there are
    too many rows, smaller settings are left out. The list is empty if no row has any of the table's figures.
    """
    tasks = [(task, primary(rows, task)) for task in tasks_of(rows)[:FIRST_TASKS]]
    wheres = [*tasks, *((SPEED, metric) for metric in FIRST_COLUMNS)]
    wheres = [where for where in wheres if any(_known(row.value(*where)) for row in rows)]
    if not wheres:
        return []
    names = [name for name in varying(rows) if name not in ("policy", "budget")]
    shown = _largest_settings(rows, MAX_FIRST_ROWS)
    star = front(rows, tasks[0][0])[0] if tasks else set()
    leaders, _ = winners(rows, wheres)
    columns = [Column("setting", "setting", numeric=False)] if names else []
    columns += [axis_column("policy"), axis_column("budget")]
    columns += [
        _first_column(METRICS[metric], task if len(tasks) > 1 or unseen(task) else "") for task, metric in wheres
    ]
    body, groups = [], []
    for number, row in enumerate(shown):
        if not number or row.key.group != shown[number - 1].key.group:
            groups.append(number)
        axes = [Field(setting(row.key, names))] if names else []
        axes += [show_axis(row.key, "policy", row.key in star), show_axis(row.key, "budget")]
        figures = [_first_figure(row, rows, *where, (row.key, *where) in leaders) for where in wheres]
        body.append((*axes, *figures))
    fixed = _fixed(rows[0].key, [*names, "policy", "budget"])
    title = _title(wheres)
    left_out = len(rows) - len(shown)
    same = {row.key.group for row in shown} & {row.key.group for row in rows if row not in shown}
    others = "other budgets" if same else "smaller settings"
    notes = (f"{left_out} rows of {others} stand in the tables below and in results.csv.",) if left_out else ()
    return [Table(f"{title}: {fixed}" if fixed else title, tuple(columns), tuple(body), tuple(groups), notes)]


def _title(wheres: Sequence[Where]) -> str:
    """What the figures ``wheres`` of a table are about."""
    timed, quality = (any((task == SPEED) == speed for task, _ in wheres) for speed in (True, False))
    return "Quality, memory and speed" if timed and quality else "Memory and speed" if timed else "Quality"


def _first_column(metric: Metric, task: str) -> Column:
    """The column of a metric with a short header, which names the task if several tasks have a column."""
    if metric.key == "speedup":
        return Column("speedup", "× full", "", metric.direction, metric.about)
    column = value_column(metric, short_name(task) if task and metric.group == "quality" else "")
    return msgspec.structs.replace(column, key=metric.key)


def setting(key: Key, names: Sequence[str]) -> str:
    """The axes ``names`` of a row as the text of one field, for example ``1024+64, batch 4``."""
    values = [(name, getattr(key, name)) for name in names]
    words = [
        f"{name} {value}" if name in ("batch", "seed") else str(value) for name, value in values if value is not None
    ]
    return ", ".join(words)


def _largest_settings(rows: Sequence[Row], most: int) -> list[Row]:
    """Rows of as many whole settings as fit into ``most`` rows: settings with figures of speed first, then the largest.

    If the first setting alone does not fit, its rows at the smallest budget, which the sentences are about, come.
    """
    kept: list[Row] = []

    def order(group: Sequence[Row]) -> tuple[bool, int]:
        return not any(row.speed and row.speed.record.status == "ok" for row in group), -volume(group[0].key)

    for group in sorted(grouped(rows), key=order):
        if kept and len(kept) + len(group) > most:
            break
        if len(group) > most:
            asked = [float(row.key.budget) for row in group if row.key.budget]
            least = min(asked, default=0.0)
            group = [row for row in group if not row.key.budget or float(row.key.budget) == least]
        kept += group[:most]
    return kept


def _first_figure(row: Row, rows: Sequence[Row], task: str, metric: str, leads: bool) -> Field:
    """A figure in three digits. A speed-up that is impossible, or that was measured on a busy machine, is not shown."""
    value = row.value(task, metric)
    if metric == "speedup" and value is not None:
        if doubtful(row, metric, rows):
            note = "The machine was busy while this was measured, so there is no verdict on speed."
            return Field("no verdict", mark="warn", note=note)
        if impossible(row):
            note = f"{show(metric, value.value)} × was measured, which is more than the bytes of a step allow."
            return Field("impossible", mark="bad", note=note)
    if value is None or value.value is None:
        return _figure(row, task, metric, leads)
    field = show_value(metric, value, "best" if leads else "")
    spread = 0.0 if value.lo is None or value.hi is None else max(value.hi - value.value, value.value - value.lo)
    digits = _digits(max(abs(value.value), spread) * METRICS[metric].scale)

    def short(number: float | None) -> str:
        return "" if number is None else f"{number * METRICS[metric].scale:,.{digits}f}"

    sign = "+" if field.text.startswith("+") else ""
    half = short(spread) if field.half else ""
    bounds = (short(value.lo), short(value.hi)) if field.lo else ("", "")
    return Field(sign + short(value.value), *bounds, half, field.sort, field.mark, field.note, field.range_of)


def _digits(value: float) -> int:
    """Number of digits after the point so that a figure has three digits in all; none for hundreds."""
    if not value:
        return 2
    return max(0, min(4, 2 - math.floor(math.log10(abs(value)))))


def headline(found: Sequence[Result], rows: Sequence[Row]) -> list[Table]:
    """The headline tables; none if there is no row.

    Each task is represented by one figure of quality, and its other figures are in a second table. With more than
    MAX_TASKS tasks, all figures of quality are in the second table.
    """
    tasks = tasks_of(rows)
    stands = [(task, primary(rows, task)) for task in tasks]
    every = [(task, metric) for task in tasks for metric in _metrics(rows, task) if METRICS[metric].group == "quality"]
    speed = [(SPEED, metric) for metric in _metrics(rows, SPEED) if metric not in ELSEWHERE]
    few = len(tasks) <= MAX_TASKS
    budget = [where for where in speed if METRICS[where[1]].group == "budget"]
    first = [*budget, *(stands if few else ()), *(where for where in speed if where not in budget)]
    known = [where for where in first if any(row.value(*where) for row in rows) or where[0] == SPEED]
    tables = [_headline(_title(known), rows, known)] if known else []
    rest = [where for where in every if not few or where not in stands]
    if rest:
        quality = join(result for result in found if result.record.axes.task != SPEED)
        metrics = {metric for _, metric in (rest if few else stands)}
        shown = sorted((where for where in every if where[1] in metrics), key=lambda where: _ORDER[where[1]])
        tables.append(_headline("Quality in detail" if few else "Quality by task", quality, shown))
    bare = [row for row in rows if not any(result.record.status == "ok" for result in row.cells)]
    if not tables and bare:
        tables.append(_headline("Cells without figures", bare, []))
    return tables


def best_claims(found: Sequence[Result], rows: Sequence[Row]) -> list[Claim]:
    """The bold figures of the tables as claims."""
    quality = join(result for result in found if result.record.axes.task != SPEED)
    speed = [(SPEED, metric) for metric in _metrics(rows, SPEED)]
    others = [(task, metric) for task in tasks_of(rows) for metric in _metrics(rows, task)]
    return [*winners(rows, [*speed, *others])[1], *winners(quality, others)[1]]


def ratios(rows: Sequence[Row]) -> list[Table]:
    """The ratios of every timed row to other caches of its run; no table if there are fewer than ENOUGH_RATIOS."""
    timed = [row for row in rows if row.speed is not None and row.speed.record.status == "ok"]
    known = [key for key in RATIO_COLUMNS if any(_known(row.value(SPEED, key)) for row in timed)]
    if sum(METRICS[key].kind == "ratio" for key in known) < ENOUGH_RATIOS:
        return []

    def figures(row: Row) -> list[Field]:
        flags = row.speed.record.flags if row.speed else ()
        remarks = Field("; ".join(flags), mark="warn" if flags else "")
        return [*(show_value(key, row.value(SPEED, key)) for key in known), remarks]

    columns = [*(value_column(METRICS[key]) for key in known), Column("remarks", "remarks", numeric=False)]
    return [table_of("Ratios inside the run", timed, columns, figures)]


def targets(judged: Sequence[Judged]) -> tuple[Table, ...]:
    """The table of all targets beside the figures of the run; no table if no suite states any.

    A target that several cells have to meet has a row for each of them; one that no cell has a figure for says so.
    """
    rows = [_target_row(one) for one in judged]
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
    return (Table("Targets of the suite", tuple(columns), tuple(rows), notes=(TARGETS_NOTE,)),)


def _target_row(one: Judged) -> tuple[Field, ...]:
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
        Field("; ".join([result.key.described, *result.record.flags, *note])),
        show_value(goal.metric, one.value),
        Field(goal.bound),
        Field(f"{margin:+.1f}", sort=round(margin, 1)),
        Field(one.outcome, mark=OUTCOMES[one.outcome]),
    )


def parts(found: Sequence[Result]) -> list[Table]:
    """The cost of each part of prefill and of a decode step; no table if no cell measured parts."""
    return [table for key, title, before in PARTS for table in _parts(found, key, title, before)]


def _parts(found: Sequence[Result], key: str, title: str, before: Sequence[str]) -> list[Table]:
    rows = [Row(result.key, [result]) for result in found if any(name.startswith(f"{key}:") for name in result.values)]
    if not rows:
        return []
    known = {name.partition(":")[2] for row in rows for name in row.cells[0].values if name.startswith(f"{key}:")}
    names = [*(name for name in PARTS_ORDER if name in known), *sorted(known - {*PARTS_ORDER})]
    columns = [value_column(METRICS[metric]) for metric in before]
    columns += [Column(f"{key}:{name}", name, METRICS[key].unit, about=METRICS[key].about) for name in names]

    def figures(row: Row) -> list[Field]:
        values = row.cells[0].values
        return [
            *(show_value(metric, values.get(metric)) for metric in before),
            *(show_value(key, values.get(f"{key}:{name}")) for name in names),
        ]

    return [table_of(title, rows, columns, figures, notes=(PARTS_NOTE,))]


def table_of(
    title: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    figures: Callable[[Row], Sequence[Field]],
    *,
    notes: tuple[str, ...] = (),
    star: frozenset[Key] = frozenset(),
    name_fixed: bool = False,
) -> Table:
    """A table of rows: columns of the axes that vary, then ``columns``, whose fields ``figures`` returns.

    Args:
        title: of the table.
        rows: at most MAX_ROWS of them are shown; if there are more, those of the largest settings.
        columns: of the figures. A last column of remarks is left out if no row has any.
        figures: returns the fields of a row, one for each of ``columns``.
        notes: sentences below the table.
        star: rows that are marked as Pareto-optimal.
        name_fixed: whether the title names the axes that do not vary.
    """
    names, shown = varying(rows), largest(rows, MAX_ROWS)
    body, groups = [], []
    for number, row in enumerate(shown):
        if not number or row.key.group != shown[number - 1].key.group:
            groups.append(number)
        axes = [show_axis(row.key, name, row.key in star) for name in names]
        body.append((*axes, *figures(row)))
    heads = [*(axis_column(name) for name in names), *columns]
    if heads[-1].key == "remarks" and not any(fields[-1].text for fields in body):
        heads, body = heads[:-1], [fields[:-1] for fields in body]
    fixed = _fixed(rows[0].key, names) if name_fixed else ""
    left_out = len(rows) - len(shown)
    return Table(f"{title}: {fixed}" if fixed else title, tuple(heads), tuple(body), tuple(groups), notes, left_out)


def varying(rows: Sequence[Row]) -> list[str]:
    """The axes that have a column: the policy, and every axis that varies."""
    return [name for name in AXES if name == "policy" or len({getattr(row.key, name) for row in rows}) > 1]


def show_axis(key: Key, name: str, star: bool = False) -> Field:
    """One axis of a row as a field; ``star`` marks the policy of a Pareto-optimal row."""
    value = getattr(key, name)
    if value is None:
        return NOTHING
    if name == "policy" and star:
        return Field(f"{value} ◆")
    if name == "run" and str(value).endswith(UNLIKE):
        return Field(str(value), mark="warn", note="made in another environment than the first run")
    return Field(str(value), sort=_number(value))


def _headline(title: str, rows: Sequence[Row], wheres: Sequence[Where]) -> Table:
    shared = {metric for _, metric in wheres if sum(other == metric for _, other in wheres) > 1}
    columns = [
        value_column(METRICS[metric], task if metric in shared or unseen(task) else "") for task, metric in wheres
    ]
    tasks, (leaders, _) = tasks_of(rows), winners(rows, wheres)

    def figures(row: Row) -> list[Field]:
        values = [_figure(row, task, metric, (row.key, task, metric) in leaders) for task, metric in wheres]
        return [*values, _remarks(row)]

    star = frozenset(front(rows, tasks[0])[0]) if tasks else frozenset[Key]()
    columns.append(Column("remarks", "remarks", numeric=False))
    return table_of(title, rows, columns, figures, star=star, name_fixed=True)


def _metrics(rows: Sequence[Row], task: str) -> list[str]:
    """The headline metrics that at least one cell of the task has, in the order of the metric table."""
    found = [result.values.items() for row in rows if (result := row.of(task))]
    there = {key for values in found for key, value in values if value.value is not None}
    return [key for key, metric in METRICS.items() if metric.headline and key in there]


def _figure(row: Row, task: str, metric: str, best: bool) -> Field:
    value = row.value(task, metric)
    if value is not None:
        return show_value(metric, value, "best" if best else "")
    result = row.of(task)
    if result is not None and result.record.status != "ok":
        return Field(SHORT_ENDINGS[result.record.status], mark="bad")
    return NOTHING


def _remarks(row: Row) -> Field:
    """The flags of a row, and each task that gave no figures with the reason."""
    flags = list(dict.fromkeys(flag for result in row.cells for flag in result.record.flags))
    ended = [result.record for result in row.cells if result.record.status != "ok"]
    bad = [f"{record.axes.task}: {ENDINGS[record.status]}{_why(record)}" for record in ended]
    return Field("; ".join([*flags, *bad]), mark="bad" if bad else "warn" if flags else "")


def _why(record: CellRecord) -> str:
    """The beginning of the reason why a cell failed; the table of cells has all of it. Running out of memory and being
    skipped need no reason."""
    if record.status in ("oom", "skipped") or not record.reason:
        return ""
    return f" ({record.reason if len(record.reason) <= MAX_WHY else record.reason[: MAX_WHY - 1] + '…'})"


def _fixed(key: Key, columns: Sequence[str]) -> str:
    """The axes that have no column, as words of a title."""
    words = []
    for name in AXES:
        value = getattr(key, name)
        if name not in (*columns, "run", "seed") and value is not None:
            words.append(f"{name} {value}" if name in ("batch", "budget") else str(value))
    return ", ".join(words)


def _known(value: Value | None) -> bool:
    return value is not None and value.value is not None


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


_ORDER = {key: place for place, key in enumerate(METRICS)}
