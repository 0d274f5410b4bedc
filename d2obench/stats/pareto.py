"""The points nothing else beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from d2obench.metric import Direction


def non_dominated(points: Sequence[Sequence[float | None]], directions: Sequence[Direction]) -> list[bool]:
    """Whether each point is on the Pareto front.

    A point is dominated when another is at least as good in every coordinate and better in one; equal points stand
    together. A point with a missing or non-finite coordinate is never on the front and dominates nothing.

    Args:
        points: one tuple of coordinates a point.
        directions: which way each coordinate is better (``lower`` or ``higher``).
    """
    signs = [{"lower": 1.0, "higher": -1.0}[direction] for direction in directions]
    costs: list[tuple[float, ...] | None] = []
    for point in points:
        values = [value for value in point if value is not None and math.isfinite(value)]
        whole = len(values) == len(signs) == len(point)
        costs.append(tuple(sign * value for sign, value in zip(signs, values, strict=True)) if whole else None)
    known = [cost for cost in costs if cost is not None]
    return [cost is not None and not any(_dominates(other, cost) for other in known) for cost in costs]


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
