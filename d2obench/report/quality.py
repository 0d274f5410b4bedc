"""Which figure stands for the quality of a row, and which rows nothing beats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from d2obench.metric import METRICS
from d2obench.report.rows import Key, Row, grouped
from d2obench.stats.pareto import non_dominated
from d2obench.suite.definition import SPEED

STANDS = ("kl", "score_diff", "score", "gold_bpb_diff", "ppl", "nll")
"""Which quality figure stands for a task, best first: a difference to full before a bare value."""


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The quality tasks of the rows, each once, in the order they were run."""
    found = dict.fromkeys(entry.record.axes.task for row in rows for entry in row.cells)
    return [task for task in found if task != SPEED]


def primary(rows: Iterable[Row], task: str) -> str:
    """The metric that stands for a task: the first of STANDS that a row has."""
    rows = list(rows)
    return next((metric for metric in STANDS if any(row.value(task, metric) for row in rows)), "score")


def loss(row: Row, task: str, metric: str) -> float | None:
    """A quality figure; what is a difference to full is 0 for full itself."""
    value = row.value(task, metric)
    if value is not None and value.value is not None:
        return value.value
    entry = row.of(task)
    same = entry is not None and entry.record.status == "ok" and row.key.policy == "full"
    return 0.0 if same and (metric.endswith("_diff") or metric == "kl") else None


def held(row: Row) -> float | None:
    """KV bytes of the row's timed cell."""
    value = row.value(SPEED, "kv_bytes")
    return value.value if value else None


def front(rows: Sequence[Row], task: str) -> set[Key]:
    """Rows that no other row of their group beats in both quality (in ``task``) and KV bytes."""
    best: set[Key] = set()
    for group in grouped(row for row in rows if not row.foreign):
        metric = primary(group, task)
        points = [(loss(row, task, metric), held(row)) for row in group]
        stands = non_dominated(points, (METRICS[metric].direction, "lower"))
        best |= {row.key for row, stand in zip(group, stands, strict=True) if stand}
    return best
