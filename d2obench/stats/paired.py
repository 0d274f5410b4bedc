"""Tests of two arms on the same items: the exact test for right or wrong answers, and the smallest change they could
show."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from d2obench.stats.intervals import cluster_sums


class McNemar(NamedTuple):
    """Items only the base had right (``lost``), items only the head had right (``won``), and exact p-values.

    ``p_worse`` is one-sided (head is worse), ``p`` two-sided.
    """

    lost: int
    won: int
    p_worse: float
    p: float


def mcnemar(base: Sequence[float], head: Sequence[float]) -> McNemar:
    """The exact test of McNemar (1947): discordant items are a fair coin when the arms are alike.

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
    """The smallest true worsening of the mean that these items would show with ``power`` at one-sided ``alpha``.

    Normal approximation on the cluster means. 0/1 items that all agree are counted as if 3 of them did not (the upper
    95 % bound of no event in n), so that agreement on few items does not pass for certainty.
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
