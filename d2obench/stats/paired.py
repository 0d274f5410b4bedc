"""Tests of two sides on the same items: an exact test for right or wrong answers, and the smallest change that these
items could show."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from d2obench.stats.intervals import cluster_sums


class McNemar(NamedTuple):
    """The result of McNemar's test.

    Args:
        lost: number of items that only the base had right.
        won: number of items that only the head had right.
        p_worse: one-sided p-value; the alternative is that the head is worse.
        p: two-sided p-value.
    """

    lost: int
    won: int
    p_worse: float
    p: float


def mcnemar(base: Sequence[float], head: Sequence[float]) -> McNemar:
    """The exact test of McNemar (1947): if the sides are equally good, an item on which they differ is won or lost with
    equal probability.

    Args:
        base, head: 0 or 1 for each item, in the same order.

    Raises:
        ValueError: lengths differ or a value is neither 0 nor 1.
    """
    _same_length(base, head)
    if any(value not in (0, 1) for value in (*base, *head)):
        raise ValueError("McNemar's test needs 0 or 1 for each item")
    lost = sum(b > h for b, h in zip(base, head, strict=True))
    won = sum(h > b for b, h in zip(base, head, strict=True))

    def at_least(count: int) -> float:
        return float(special.bdtrc(count - 1, lost + won, 0.5)) if count else 1.0

    return McNemar(lost, won, at_least(lost), min(1.0, 2 * at_least(max(lost, won))))


def detectable(
    base: Sequence[float],
    head: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true worsening of the mean that these items would show with probability ``power``, at the one-sided
    level ``alpha``.

    It is a normal approximation for the means of clusters. If all items with values 0 and 1 agree, three of them count
    as different, which is the upper 95 % bound for an event that was never seen; otherwise agreement on a few items
    would look like certainty.

    Args:
        base, head: one figure for each item, in the same order.
        clusters: the document of each item; every item is its own if left out.
    """
    _same_length(base, head)
    diff = np.subtract(head, base, dtype=np.float64)
    sums, counts = cluster_sums(diff, clusters)
    n = len(sums)
    if n < 2:
        return math.inf
    error = math.sqrt(n / (n - 1) * float(((sums - diff.mean() * counts) ** 2).sum())) / len(diff)
    if all(value in (0, 1) for value in (*base, *head)):
        error = max(error, math.sqrt(min(3, n)) / n)
    return float(special.ndtri(1 - alpha) + special.ndtri(power)) * error


def _same_length(base: Sequence[float], head: Sequence[float]) -> None:
    if len(base) != len(head) or not len(base):
        raise ValueError(f"{len(base)} base and {len(head)} head items are not pairs")
