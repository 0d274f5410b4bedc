"""Intervals by resampling, numpy only.

Samples are a flat list, or nested: a list of rounds of steps. Steps of one round share the machine's mood, so nested
samples are resampled by round and never step by step. Every function is deterministic in its ``seed``.

Few samples make a percentile bootstrap too narrow: of fewer than six samples, the 95 % interval of a median reaches
from the smallest to the largest and covers only 1 − 2^(1−n). One sample (or one round) has no interval.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = Sequence[float] | Sequence[Sequence[float]]
Floats = NDArray[np.float64]
RESAMPLES = 10_000
_CELLS = 20_000_000  # resampled values a call may touch


class Interval(NamedTuple):
    """A figure and the bounds of its interval; the bounds are None where the samples can't carry one."""

    value: float
    lo: float | None
    hi: float | None


def seed_of(name: str) -> int:
    """The seed that belongs to a metric id: its crc32."""
    return zlib.crc32(name.encode())


def interval(
    samples: Samples, statistic: Literal["median", "mean"] = "median", level: float = 0.95, seed: int | str = 0
) -> Interval:
    """The statistic of all samples with its percentile-bootstrap interval.

    Args:
        samples: values, or rounds of values (may differ in length).
        statistic: what is taken of the pooled samples.
        level: coverage, for example 0.95.
        seed: a number, or a name that is hashed to one.

    Raises:
        ValueError: there is no sample, or one is not finite.
    """
    rounds = _rounds(samples)
    pooled = np.concatenate(rounds)
    take = np.median if statistic == "median" else np.mean
    value = float(take(pooled))
    if len(rounds) < 2:
        return Interval(value, None, None)
    if len(pooled) == len(rounds):
        return Interval(value, *_bounds(take(pooled[_draws(len(pooled), seed)], axis=1), level))
    return Interval(value, *_bounds(_by_round(rounds, take, seed), level))


def unanimous_interval(outcome: float, trials: int, level: float = 0.95) -> Interval:
    """Share of successes after ``trials`` that all failed (0) or all succeeded (1), with its exact interval.

    Resampling can't doubt what never varied: it would give no width at all. Clopper and Pearson (1934).
    """
    nearest = ((1 - level) / 2) ** (1 / trials)
    return Interval(outcome, 0.0, 1 - nearest) if outcome == 0 else Interval(outcome, nearest, 1.0)


def mean_interval(
    values: Sequence[float], clusters: Sequence[object] | None = None, level: float = 0.95, seed: int | str = 0
) -> Interval:
    """The mean with its interval; whole clusters (documents) are resampled where given.

    Raises:
        ValueError: there is no value, one is not finite, or ``clusters`` has another length.
    """
    array = _finite(values)
    sums, counts = cluster_sums(array, clusters)
    mean = float(array.mean())
    if len(sums) < 2:
        return Interval(mean, None, None)
    draws = _draws(len(sums), seed)
    return Interval(mean, *_bounds(sums[draws].sum(1) / counts[draws].sum(1), level))


def paired_ratio(base: Sequence[float], head: Sequence[float], level: float = 0.95, seed: int | str = 0) -> Interval:
    """exp of the median of ln(head_i ÷ base_i) over pairs measured together, with its percentile-bootstrap interval.

    Args:
        base, head: values above 0, one pair a round.

    Raises:
        ValueError: lengths differ, there is no pair, or a value is not above 0.
    """
    below, above = _finite(base), _finite(head)
    if len(below) != len(above):
        raise ValueError(f"{len(below)} base and {len(above)} head samples are not pairs")
    if (below <= 0).any() or (above <= 0).any():
        raise ValueError("a ratio needs values above 0")
    logs = np.log(above / below)
    value = math.exp(float(np.median(logs)))
    if len(logs) < 2:
        return Interval(value, None, None)
    lo, hi = _bounds(np.median(logs[_draws(len(logs), seed)], axis=1), level)
    return Interval(value, math.exp(lo), math.exp(hi))


def percentile(samples: Samples, q: float, level: float = 0.95, seed: int | str = 0) -> Interval | None:
    """The ``q``-quantile (0 < q < 1) with its interval, or None where the samples can't carry it.

    Flat samples get the distribution-free interval of order statistics; it exists when neither q^n nor (1−q)^n exceeds
    (1−level)/2, that is from 6 samples for the median, 72 for p95 and 368 for p99 at 95 %. Nested samples must be as
    many in all and are resampled by round.
    """
    rounds = _rounds(samples)
    pooled = np.sort(np.concatenate(rounds))
    n, tail = len(pooled), (1 - level) / 2
    if max(q**n, (1 - q) ** n) > tail:
        return None
    value = float(np.quantile(pooled, q))
    if len(pooled) > len(rounds) > 1:
        return Interval(value, *_bounds(_by_round(rounds, lambda x: np.quantile(x, q), seed), level))
    below = _binomial_cdf(n, q)
    low = int(np.searchsorted(below, tail, side="right")) - 1
    high = int(np.searchsorted(below, 1 - tail))
    return Interval(value, float(pooled[max(0, low)]), float(pooled[min(n - 1, high)]))


def cluster_sums(values: Floats, clusters: Sequence[object] | None) -> tuple[Floats, Floats]:
    """Sum and count of the values of each cluster; every value is its own cluster where there are none."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    where = np.array([names[name] for name in clusters])
    return np.bincount(where, values).astype(np.float64), np.bincount(where).astype(np.float64)


def _by_round(rounds: list[Floats], take: Callable[..., Any], seed: int | str) -> Floats:
    """The statistic of resampled rounds. Few rounds give few different draws, so each is worked out once."""
    resamples = max(500, min(2000, _CELLS // sum(map(len, rounds))))
    draws = np.random.default_rng(_seed(seed)).integers(0, len(rounds), (resamples, len(rounds)))
    different, times = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    values = [float(take(np.concatenate([rounds[i] for i in draw]))) for draw in different]
    return np.repeat(np.array(values), times)


def _draws(n: int, seed: int | str) -> NDArray[np.int64]:
    resamples = max(1000, min(RESAMPLES, _CELLS // n))
    return np.random.default_rng(_seed(seed)).integers(0, n, (resamples, n))


def _seed(seed: int | str) -> int:
    return seed_of(seed) if isinstance(seed, str) else seed


def _bounds(values: Floats, level: float) -> tuple[float, float]:
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def _finite(values: Sequence[float]) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError("samples must be one or more finite numbers")
    return array


def _rounds(samples: Samples) -> list[Floats]:
    if len(samples) and isinstance(samples[0], Sequence | np.ndarray):
        return [_finite(part) for part in samples if len(part)] or [_finite([])]  # type: ignore[arg-type]
    return [*_finite(samples)[:, None]]  # type: ignore[arg-type]


def _binomial_cdf(n: int, q: float) -> Floats:
    """P(X ≤ k) for k = 0 … n of a binomial(n, q)."""
    k, fact = np.arange(n + 1), np.array([math.lgamma(i + 1) for i in range(n + 1)])
    return np.cumsum(np.exp(fact[n] - fact - fact[::-1] + k * math.log(q) + (n - k) * math.log1p(-q)))
