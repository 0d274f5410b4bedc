"""The tables of figures: the headline, the ratios inside a run, the costs of parts. Here values become text.

A table has one row for each point that a user can choose and one column for each figure that some row has. Axes that
do not vary are left out of the columns and named once in the title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from d2obench.metric import METRICS, Metric, show
from d2obench.record import CellRecord, Value
from d2obench.report.evidence import Where, busy, front, impossible, winners
from d2obench.report.rows import Key, Result, Row, grouped, join, largest, primary, tasks_of, volume
from d2obench.report.view import Column, Field, Mark, Table
from d2obench.stats.claims import Claim
from d2obench.suite.definition import SPEED

AXES = ("run", "model", "dtype", "device", "seed", "shape", "batch", "policy", "budget")
ENDINGS = {"oom": "out of memory", "skipped": "skipped", "failed": "failed", "incomparable": "incomparable"}
"""How a cell without figures ended, in words."""
SHORT_ENDINGS = ENDINGS | {"oom": "OOM"}
UNLIKE = "≠"
"""Stands behind the name of a run that was made in another environment than the first."""
UNTESTED = -1
"""``Field.range_of`` of bounds that were recorded before their coverage was tested."""
NOTHING = Field("–", mark="quiet")
MAX_TASKS, MAX_ROWS, MAX_WHY = 4, 240, 140
ELSEWHERE = ("mbu",)
"""Headline metrics that the roofline table shows instead."""
RATIO_COLUMNS = (
    "speedup", "speedup_e2e", "speedup_memory", "to_streaming", "to_library", "prefill_cost", "prefill_peak_cost",
    "sampled_error", "mbu", "loop_overhead",
)  # fmt: skip
ENOUGH_RATIOS = 2
"""So many ratios make a table of their own; fewer stand in the headline."""
PARTS = (
    ("step_share", "Cost of the parts of a decode step", ("tpot_s", "ranges_overhead")),
    ("prefill_share", "Cost of the parts of prefill and compression", ("ttft_s",)),
)
"""The metric whose parts are columns, the title, and what stands before them."""
PARTS_ORDER = (
    "attention", "scores", "allocation", "similarity", "eviction", "merge", "rest of the policy", "projections", "MLP",
    "lm head", "rest of the model", "loop",
)  # fmt: skip
PARTS_NOTE = (
    "Each share is the time of a part itself, without the parts inside it, divided by the whole. The shares of a row "
    "add up to 100 %, their medians nearly. TPOT is that of steps without time stamps. A kernel that does several "
    "parts at once counts for the one it stands in, and steps with time stamps run without a CUDA graph."
)
FIRST_COLUMNS = ("kv_bytes", "ttft_s", "decode_tok_s", "speedup")
FIRST_TASKS, MAX_FIRST_ROWS = 2, 24


def first(rows: Sequence[Row]) -> list[Table]:
    """The table that everybody should see: at most nine columns and MAX_FIRST_ROWS rows, in three digits a figure.

    Of axes beside policy and budget those that vary share one column. The largest setting comes first; where there are
    too many rows, the smaller settings are left out. None where no row has any of its figures.
    """
    tasks = [(task, primary(rows, task)) for task in tasks_of(rows)[:FIRST_TASKS]]
    wheres = [*tasks, *((SPEED, metric) for metric in FIRST_COLUMNS)]
    wheres = [where for where in wheres if any(_known(row.value(*where)) for row in rows)]
    if not wheres:
        return []
    names = [name for name in varying(rows) if name not in ("policy", "budget")]
    shown = _largest_settings(rows, MAX_FIRST_ROWS)
    star = front(rows, tasks[0][0]) if tasks else set()
    leaders, _ = winners(rows, wheres)
    columns = [Column("setting", "setting", numeric=False)] if names else []
    columns += [axis_column("policy"), axis_column("budget")]
    columns += [_first_column(METRICS[metric], task if len(tasks) > 1 else "") for task, metric in wheres]
    body, groups = [], []
    for number, row in enumerate(shown):
        if not number or row.key.group != shown[number - 1].key.group:
            groups.append(number)
        axes = [Field(setting(row.key, names))] if names else []
        axes += [show_axis(row.key, "policy", row.key in star), show_axis(row.key, "budget")]
        figures = [_first_figure(row, task, metric, (row.key, task, metric) in leaders) for task, metric in wheres]
        body.append((*axes, *figures))
    fixed = _fixed(rows[0].key, [*names, "policy", "budget"])
    title = "Quality, memory and speed" if tasks else "Memory and speed"
    left_out = len(rows) - len(shown)
    notes = (f"{left_out} rows of smaller settings stand in the tables below and in results.csv.",) if left_out else ()
    return [Table(f"{title}: {fixed}" if fixed else title, tuple(columns), tuple(body), tuple(groups), notes)]


def _first_column(metric: Metric, task: str) -> Column:
    """The column of a metric, named after its task where there are several, and in short words."""
    if metric.key == "speedup":
        return Column("speedup", "× full", "", metric.direction, metric.about)
    column = value_column(metric, task.partition("(")[0] if metric.group == "quality" else "")
    return msgspec.structs.replace(column, key=metric.key)


def setting(key: Key, names: Sequence[str]) -> str:
    """The axes ``names`` of a row in one field: ``1024+64, batch 4``."""
    values = [(name, getattr(key, name)) for name in names]
    words = [
        f"{name} {value}" if name in ("batch", "seed") else str(value) for name, value in values if value is not None
    ]
    return ", ".join(words)


def _largest_settings(rows: Sequence[Row], most: int) -> list[Row]:
    """Whole settings as long as they fit, those that gave figures of speed first, then the largest.

    The first is shown in any case, as far as it fits.
    """
    kept: list[Row] = []

    def order(group: Sequence[Row]) -> tuple[bool, int]:
        return not any(row.speed and row.speed.record.status == "ok" for row in group), -volume(group[0].key)

    for group in sorted(grouped(rows), key=order):
        if kept and len(kept) + len(group) > most:
            break
        kept += group[:most]
    return kept


def _first_figure(row: Row, task: str, metric: str, leads: bool) -> Field:
    """A figure in three digits; a speed-up that can't be, or was measured on a busy machine, is no figure."""
    value = row.value(task, metric)
    if metric == "speedup" and value is not None:
        if busy(row):
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
    """Digits after the point that leave three digits in all, none for hundreds."""
    if not value:
        return 2
    return max(0, min(4, 2 - math.floor(math.log10(abs(value)))))


def headline(found: Sequence[Result], rows: Sequence[Row]) -> list[Table]:
    """The headline tables, none where there is no row.

    Each task is represented by one figure of quality; all the others stand in a second table. With more than
    ``MAX_TASKS`` tasks the first table leaves quality to the second.
    """
    tasks = tasks_of(rows)
    stands = [(task, primary(rows, task)) for task in tasks]
    every = [(task, metric) for task in tasks for metric in _metrics(rows, task) if METRICS[metric].group == "quality"]
    speed = [(SPEED, metric) for metric in _metrics(rows, SPEED) if metric not in ELSEWHERE]
    few = len(tasks) <= MAX_TASKS
    budget = [where for where in speed if METRICS[where[1]].group == "budget"]
    first = [*budget, *(stands if few else ()), *(where for where in speed if where not in budget)]
    known = [where for where in first if any(row.value(*where) for row in rows) or where[0] == SPEED]
    whole = few and any(where in known for where in stands)
    tables = [_headline("Quality, memory and speed" if whole else "Memory and speed", rows, known)] if known else []
    rest = [where for where in every if not few or where not in stands]
    if rest:
        quality = join(result for result in found if result.record.axes.task != SPEED)
        metrics = {metric for _, metric in (rest if few else stands)}
        shown = sorted((where for where in every if where[1] in metrics), key=lambda where: _ORDER[where[1]])
        tables.append(_headline("Quality" if few else "Quality by task", quality, shown))
    bare = [row for row in rows if not any(result.record.status == "ok" for result in row.cells)]
    if not tables and bare:
        tables.append(_headline("Cells without figures", bare, []))
    return tables


def best_claims(found: Sequence[Result], rows: Sequence[Row]) -> list[Claim]:
    """What the bold figures of the tables say, as data."""
    quality = join(result for result in found if result.record.axes.task != SPEED)
    speed = [(SPEED, metric) for metric in _metrics(rows, SPEED)]
    others = [(task, metric) for task in tasks_of(rows) for metric in _metrics(rows, task)]
    return [*winners(rows, speed)[1], *winners(quality, others)[1]]


def ratios(rows: Sequence[Row]) -> list[Table]:
    """Every timed row's ratios to the other caches of its run; none where there are hardly any."""
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


def parts(found: Sequence[Result]) -> list[Table]:
    """What each part of prefill and of a decode step costs; none where no cell measured parts."""
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
    """A table of rows: the axes that vary, then ``columns``, filled by ``figures``.

    Args:
        title: stands above it.
        rows: at most MAX_ROWS are shown, those of the largest settings where there are more.
        columns: of the figures; a last one of remarks is left out where no row has any.
        figures: the fields of a row, one for each column.
        notes: stand below it.
        star: rows that are Pareto-optimal.
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
    """The axes that are worth a column: the policy, and those that vary."""
    return [name for name in AXES if name == "policy" or len({getattr(row.key, name) for row in rows}) > 1]


def axis_column(name: str) -> Column:
    """The column of an axis."""
    return Column(name, name, numeric=False)


def value_column(metric: Metric, task: str = "") -> Column:
    """The column of a metric; the task is named where several share the metric."""
    header = f"{metric.header} · {task}" if task else metric.header
    return Column(f"{task}:{metric.key}" if task else metric.key, header, metric.unit, metric.direction, metric.about)


def show_axis(key: Key, name: str, star: bool = False) -> Field:
    """One axis of a row; ``star`` marks the policy of a Pareto-optimal one."""
    value = getattr(key, name)
    if value is None:
        return NOTHING
    if name == "policy" and star:
        return Field(f"{value} ◆")
    if name == "run" and str(value).endswith(UNLIKE):
        return Field(str(value), mark="warn", note="made in another environment than the first run")
    return Field(str(value), sort=_number(value))


def show_value(metric: str, value: Value | None, mark: Mark = "") -> Field:
    """A value as a field, its bounds rounded as the value is."""
    if value is None or value.value is None:
        return Field("–", mark="quiet", note=value.note if value else "")
    text, sort = signed(metric, value.value), value.value * METRICS[metric].scale
    if value.lo is None or value.hi is None or value.kind == "exact":
        return Field(text, sort=sort, mark=mark, note=value.note)
    half = show(metric, max(value.hi - value.value, value.value - value.lo)) if value.kind == "interval" else ""
    few = {"interval": 0, "range": value.n}.get(value.kind, UNTESTED)
    return Field(text, show(metric, value.lo), show(metric, value.hi), half, sort, mark, value.note, few)


def bounds_in_words(metric: str, value: Value) -> str:
    """``95 % interval 1.12 … 1.14``, ``range of 2: 1.1 … 1.2``; empty where there are no bounds.

    Bounds that were recorded before their coverage was tested are no interval.
    """
    key = metric.partition(":")[0]
    if value.lo is None or value.hi is None or value.kind == "exact":
        return ""
    ends = f"{show(key, value.lo)} … {show(key, value.hi)}"
    if value.kind == "interval":
        return f"95 % interval {ends}"
    return f"range of {value.n}: {ends}" if value.kind == "range" else f"bounds {ends}, coverage not tested"


def signed(metric: str, value: float | None) -> str:
    """A figure as shown; a difference carries its sign."""
    difference = metric.endswith(("_diff", "_rival")) and METRICS[metric].kind == "sampled"
    return ("+" if difference and value is not None and value > 0 else "") + show(metric, value)


def _headline(title: str, rows: Sequence[Row], wheres: Sequence[Where]) -> Table:
    shared = {metric for _, metric in wheres if sum(other == metric for _, other in wheres) > 1}
    columns = [value_column(METRICS[metric], task if metric in shared else "") for task, metric in wheres]
    tasks, (leaders, _) = tasks_of(rows), winners(rows, wheres)

    def figures(row: Row) -> list[Field]:
        values = [_figure(row, task, metric, (row.key, task, metric) in leaders) for task, metric in wheres]
        return [*values, _remarks(row)]

    star = frozenset(front(rows, tasks[0])) if tasks else frozenset[Key]()
    columns.append(Column("remarks", "remarks", numeric=False))
    return table_of(title, rows, columns, figures, star=star, name_fixed=True)


def _metrics(rows: Sequence[Row], task: str) -> list[str]:
    """The headline metrics some cell of the task has, in the order of the metric table."""
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
    """Flags, and the tasks that gave no figures with the reason."""
    flags = list(dict.fromkeys(flag for result in row.cells for flag in result.record.flags))
    ended = [result.record for result in row.cells if result.record.status != "ok"]
    bad = [f"{record.axes.task}: {ENDINGS[record.status]}{_why(record)}" for record in ended]
    return Field("; ".join([*flags, *bad]), mark="bad" if bad else "warn" if flags else "")


def _why(record: CellRecord) -> str:
    """The reason of a failure, cut short: the table of cells has all of it. Out of memory explains itself."""
    if record.status in ("oom", "skipped") or not record.reason:
        return ""
    return f" ({record.reason if len(record.reason) <= MAX_WHY else record.reason[: MAX_WHY - 1] + '…'})"


def _fixed(key: Key, columns: Sequence[str]) -> str:
    """The axes without a column, in words for a title."""
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
