"""Figures and axes as fields and columns of a table: the one place where values become text."""

from __future__ import annotations

from d2obench.metric import METRICS, Metric, show
from d2obench.record import Value
from d2obench.report.rows import Key, Row
from d2obench.report.view import Column, Entry, Mark

AXES = ("run", "model", "dtype", "device", "seed", "shape", "batch", "policy", "budget")
WORDS = {"oom": "out of memory", "skipped": "skipped", "failed": "failed", "incomparable": "incomparable"}
SHORT = WORDS | {"oom": "OOM"}
UNLIKE = "≠"
"""Stands behind the name of a run that was made in another environment than the first."""
NOTHING = Entry("–", mark="quiet")


def varying(rows: list[Row]) -> list[str]:
    """The axes that are worth a column: the policy, and those that vary."""
    return [name for name in AXES if name == "policy" or len({getattr(row.key, name) for row in rows}) > 1]


def fixed(key: Key, columns: list[str]) -> str:
    """The axes without a column, in words for a title."""
    words = []
    for name in AXES:
        value = getattr(key, name)
        if name not in (*columns, "run", "seed") and value is not None:
            words.append(f"{name} {value}" if name in ("batch", "budget") else str(value))
    return ", ".join(words)


def axis(key: Key, name: str) -> Entry:
    """One axis of a row."""
    value = getattr(key, name)
    if value is None:
        return NOTHING
    if name == "run" and str(value).endswith(UNLIKE):
        return Entry(str(value), mark="warn", note="made in another environment than the first run")
    return Entry(str(value), sort=_number(value))


def axis_column(name: str) -> Column:
    """The column of an axis."""
    return Column(name, name, numeric=False)


def field(metric: str, value: Value | None, mark: Mark = "") -> Entry:
    """A value as a field, its interval rounded as the value is."""
    if value is None or value.value is None:
        return Entry("–", mark="quiet", note=value.note if value else "")
    bounds = ("", "", "")
    if value.lo is not None and value.hi is not None:
        half = max(value.hi - value.value, value.value - value.lo)
        bounds = (show(metric, value.lo), show(metric, value.hi), show(metric, half))
    return Entry(signed(metric, value.value), *bounds, value.value * METRICS[metric].scale, mark, value.note)


def signed(metric: str, value: float | None) -> str:
    """A figure as shown; a difference carries its sign."""
    difference = metric.endswith(("_diff", "_rival")) and METRICS[metric].kind == "sampled"
    return ("+" if difference and value is not None and value > 0 else "") + show(metric, value)


def column(metric: Metric, task: str = "") -> Column:
    """A metric as a column; the task is named where several share the metric."""
    header = f"{metric.header} · {task}" if task else metric.header
    return Column(f"{task}:{metric.key}" if task else metric.key, header, metric.unit, metric.direction, metric.about)


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None
