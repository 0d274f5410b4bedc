"""Every figure of every cell as one row: what the CSV and JUnit formats are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from d2obench.metric import METRICS, show
from d2obench.record import Run, Value
from d2obench.report.derive import metric_of
from d2obench.report.fields import signed
from d2obench.report.rows import Entry
from d2obench.report.view import Case, Tidy

_PLACES = {key: place for place, key in enumerate(METRICS)}


def tidy(found: Iterable[Entry]) -> Iterable[Tidy]:
    """One row per cell and metric; a cell without figures still has the row of its time."""
    for entry in found:
        cell, axes = entry.record, entry.record.axes
        policy, budget, shape, batch = (
            "" if x is None else str(x) for x in (axes.policy, axes.budget, axes.shape, axes.batch)
        )
        where = (entry.name, cell.id, axes.task, axes.model, axes.dtype, axes.device)
        head = (*where, policy, budget, shape, batch, axes.seed, cell.status)
        flags = "; ".join(cell.flags)
        for key in sorted(entry.values, key=_place):
            value = entry.values[key]
            figure = (value.value, unit(key), value.lo, value.hi, value.n)
            yield Tidy(*head, key, *figure, said(key, value), flags, value.note)
        spent = round(cell.seconds, 1)
        yield Tidy(*head, "seconds", spent, "s", None, None, None, f"{spent:.1f}", flags, cell.reason)


def cases(found: Iterable[Entry], runs: Sequence[tuple[str, Run]]) -> Iterable[Case]:
    """Every cell that ran, then those that have no record."""
    for entry in found:
        cell = entry.record
        known = [(metric_of(key), key, value) for key, value in entry.values.items()]
        text = "\n".join(f"{metric.header}: {said(key, value)}" for metric, key, value in known if metric)
        yield Case(entry.name, cell.id, cell.axes.task, cell.status, cell.reason, round(cell.seconds, 3), text)
    for name, run in runs:
        for cell_id in run.missing:
            yield Case(name, cell_id, "missing", "missing", "no record yet", 0.0, "")


def said(key: str, value: Value) -> str:
    """A figure as the views print it: value, interval, unit."""
    metric = metric_of(key)
    if metric is None or value.value is None:
        return "" if value.value is None else f"{value.value:g}"
    bounds = ""
    if value.lo is not None and value.hi is not None:
        bounds = f" [{show(metric.key, value.lo)} … {show(metric.key, value.hi)}]"
    return f"{signed(metric.key, value.value)}{bounds} {metric.unit}".rstrip()


def unit(key: str) -> str:
    """The unit of the recorded value; what is shown as a percentage is recorded as a fraction, without a unit."""
    metric = metric_of(key)
    return "" if metric is None or (metric.scale != 1 and not metric.base) else metric.base or metric.unit


def _place(key: str) -> tuple[int, str]:
    """Metrics in the order of their table, unknown ones last."""
    metric = metric_of(key)
    return (_PLACES[metric.key] if metric else len(_PLACES), key)
