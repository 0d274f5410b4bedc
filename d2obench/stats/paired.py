"""Two arms on the same items: exact McNemar for right or wrong, a paired cluster bootstrap for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from d2obench.stats.bootstrap import Interval, cluster_sums, mean_interval


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
    return McNemar(lost, won, _at_least(lost, lost + won), min(1.0, 2 * _at_least(max(lost, won), lost + won)))


def paired_difference(
    base: Sequence[float],
    head: Sequence[float],
    clusters: Sequence[object] | None = None,
    level: float = 0.95,
    seed: int | str = 0,
) -> Interval:
    """The mean of head − base over items, with the interval of a bootstrap over clusters (documents).

    Miller, "Adding error bars to evals" (arXiv 2411.00640) for why pairs and clusters. Raises ValueError as above.
    """
    _same_length(base, head)
    return mean_interval(_minus(base, head), clusters, level, seed)


def detectable(
    base: Sequence[float],
    head: Sequence[float],
    clusters: Sequence[object] | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true worsening of the mean that these items would show with ``power`` at one-sided ``alpha``.

    Normal approximation on the cluster means. 0/1 items that all agree are counted as if 3 of them did not (the upper
    95 % bound of no event in n), so that agreement on few items does not pass for certainty.
    """
    _same_length(base, head)
    diff = np.asarray(_minus(base, head))
    sums, counts = cluster_sums(diff, clusters)
    n = len(sums)
    if n < 2:
        return math.inf
    error = math.sqrt(n / (n - 1) * float(((sums - diff.mean() * counts) ** 2).sum())) / len(diff)
    if all(value in (0, 1) for value in (*base, *head)):
        error = max(error, math.sqrt(min(3, n)) / n)
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(power)) * error


def _minus(base: Sequence[float], head: Sequence[float]) -> list[float]:
    return [h - b for b, h in zip(base, head, strict=True)]


def _at_least(k: int, n: int) -> float:
    """P(X ≥ k) of n fair coins, in whole numbers until the last division."""
    term = math.comb(n, k)
    ways = term
    for i in range(k, n):
        term = term * (n - i) // (i + 1)
        ways += term
    return ways / (1 << n)


def _same_length(base: Sequence[float], head: Sequence[float]) -> None:
    if len(base) != len(head) or not len(base):
        raise ValueError(f"{len(base)} base and {len(head)} head items are not pairs")
