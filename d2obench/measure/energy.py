"""Energy of a stretch of time from NVML's samples, and what of it the tokens cost beyond an idle GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from d2obench.measure.nvml import COLUMNS, Nvml

_POWER, _ENERGY = COLUMNS.index("power_w") + 1, COLUMNS.index("energy_j") + 1
_COUNTER_SPAN, _POWER_SPAN = 0.5, 2.0
"""Seconds below which nothing is told: the counter moves in steps of up to 0.1 s, and recent GPUs give their power as
the mean over the last second."""

Rows = Sequence[Sequence[float | None]]


def joules(rows: Rows, start: float, end: float) -> float | None:
    """Energy between two times: from the driver's counter, else from the power integrated by straight lines.

    None where the GPU gives neither, where the samples don't cover the time, or where it is too short to tell.

    Args:
        rows: ``[t, …]`` in the columns of :mod:`d2obench.measure.nvml`.
        start, end: seconds on the same line.
    """
    counted, power = _points(rows, _ENERGY), _points(rows, _POWER)
    if end - start >= _COUNTER_SPAN and _cover(counted, start, end):
        return _at(counted, end) - _at(counted, start)
    if end - start < _POWER_SPAN or not _cover(power, start, end):
        return None
    inside = [point for point in power if start < point[0] < end]
    edges = [(start, _at(power, start)), *inside, (end, _at(power, end))]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(edges))


def joules_per_token(rows: Rows, start: float, end: float, tokens: int, idle_w: float | None) -> float | None:
    """Energy per token net of what the GPU would have taken idle; never below zero."""
    spent = joules(rows, start, end)
    if spent is None or idle_w is None or tokens < 1:
        return None
    return max(0.0, spent - idle_w * (end - start)) / tokens


def idle_power(gpu: Nvml | None, seconds: float = 2.0, interval: float = 0.05) -> float | None:
    """The GPU's power when nothing runs: the median over ``seconds``, in watts; None where it can't be told."""
    if gpu is None:
        return None
    found = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        watts = gpu.read()[_POWER - 1]
        if watts is not None:
            found.append(watts)
        time.sleep(interval)
    return median(found) if found else None


def _points(rows: Rows, column: int) -> list[tuple[float, float]]:
    return [(row[0], value) for row in rows if row[0] is not None and (value := row[column]) is not None]


def _cover(points: Sequence[tuple[float, float]], start: float, end: float) -> bool:
    """Whether the points reach over a stretch, but for a tenth of it at most."""
    slack = 0.05 * (end - start)
    return len(points) > 1 and points[0][0] <= start + slack and points[-1][0] >= end - slack


def _at(points: Sequence[tuple[float, float]], t: float) -> float:
    """The value at ``t`` on the line through ``points``; level outside."""
    for a, b in pairwise(points):
        if a[0] <= t <= b[0]:
            return a[1] + (b[1] - a[1]) * (t - a[0]) / (b[0] - a[0]) if b[0] > a[0] else b[1]
    return points[0][1] if t < points[0][0] else points[-1][1]
