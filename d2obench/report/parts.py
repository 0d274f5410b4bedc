"""What each part of prefill and of a decode step costs, per policy: the tables of the task ``kernels``."""

from __future__ import annotations

from collections.abc import Sequence

from d2obench.metric import METRICS
from d2obench.record import Value
from d2obench.report.fields import axis, axis_column, column, field, varying
from d2obench.report.headline import MAX_ROWS
from d2obench.report.rows import Entry, Row
from d2obench.report.view import Column, Table

TABLES = (
    ("step_share", "Cost of the parts of a decode step", ("tpot_s", "ranges_overhead")),
    ("prefill_share", "Cost of the parts of prefill and compression", ("ttft_s",)),
)
"""The metric whose parts are columns, the title, and what stands before them."""
ORDER = (
    "attention", "scores", "allocation", "similarity", "eviction", "merge", "rest of the policy", "projections", "MLP",
    "lm head", "rest of the model", "loop",
)  # fmt: skip
NOTE = (
    "Own time of each part ÷ the whole, by stamps where ranges begin and end; the shares of a row add up to 100 %, "
    "their medians nearly. TPOT is of steps with the ranges off. A kernel that does several parts at once is booked on "
    "the one it stands in; steps with ranges on run without a captured graph."
)


def parts(found: Sequence[Entry]) -> tuple[Table, ...]:
    """A table for decode steps and one for prefill; none where no cell measured parts."""
    return tuple(table for key, title, before in TABLES if (table := _table(found, key, title, before)))


def _table(found: Sequence[Entry], key: str, title: str, before: Sequence[str]) -> Table | None:
    rows = [Row(entry.key, [entry]) for entry in found if any(name.startswith(f"{key}:") for name in entry.values)]
    if not rows:
        return None
    known = {name.partition(":")[2] for row in rows for name in row.cells[0].values if name.startswith(f"{key}:")}
    names = [*(name for name in ORDER if name in known), *sorted(known - {*ORDER})]
    axes = varying(rows)
    columns = [*map(axis_column, axes), *(column(METRICS[metric]) for metric in before)]
    columns += [Column(f"{key}:{name}", name, METRICS[key].unit, about=METRICS[key].about) for name in names]

    def value(row: Row, name: str) -> Value | None:
        return row.cells[0].values.get(name)

    body = [
        (
            *(axis(row.key, name) for name in axes),
            *(field(metric, value(row, metric)) for metric in before),
            *(field(key, value(row, f"{key}:{name}")) for name in names),
        )
        for row in rows[:MAX_ROWS]
    ]
    groups = [i for i, row in enumerate(rows[:MAX_ROWS]) if not i or row.key.group != rows[i - 1].key.group]
    left_out = max(0, len(rows) - MAX_ROWS)
    return Table(title, tuple(columns), tuple(body), tuple(groups), (NOTE,), left_out)
