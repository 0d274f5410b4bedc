"""Intervals with the coverage that they state, and ranges if there are too few samples for an interval.

What is estimated, by which method, and from how many independent samples an interval is printed:

==================  ==========================================  ==========================================  =======
samples             estimated                                   method                                      from
==================  ==========================================  ==========================================  =======
times of rounds     the median of the run's rounds              t interval of the trimmed mean of logs      3
paired ratios       the median ratio of two caches' rounds      the same, on the logs of the ratios         3
windows in turns    the median ratio or time of windows         t interval of medians of successive blocks  12
figures of items    their mean; documents are the clusters      Hall's transformed t and Student's t        6
bounded scores      their mean, between two known ends          t with one added item at either end         4
right or wrong      the share of right ones                     Clopper and Pearson                         1
p95, p99 of steps   the quantile                                Woodruff, variance between blocks           blocks 8
peaks of memory     the highest                                 none: the range of the rounds               –
==================  ==========================================  ==========================================  =======

With fewer samples the bounds are the smallest and the largest sample, and the result says ``range``. If all samples are
equal, it says ``exact``. The simulated coverage of every row is published under ``reports/coverage``; it is at least
93 % for every number of samples that gets an interval (:mod:`d2obench.study.coverage`).

A time describes the machine as it was during the run. If the machine becomes slower within the run, that is part of
what is estimated, and the time may be different an hour later. Ratios of caches that took turns are not limited so.

Sources: Tukey and McLaughlin (1963) for trimmed means; Hall (1992), "On the removal of skewness by transformation";
Agresti and Caffo (2000) and Bonett and Price (2012) for added items; Clopper and Pearson (1934); Woodruff (1952).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from d2obench.record import Value

Floats = NDArray[np.float64]
Bounds = tuple[Floats, Floats]
Samples = Sequence[float] | Sequence[Sequence[float]]
LEVEL = 0.95
ROUNDS, WINDOWS, ITEMS, SCORES, BLOCKS = 3, 12, 6, 4, 8
"""Smallest number of independent samples for an interval of each kind; the number of blocks for a percentile."""
TRIM = 0.2
_SKEWED, _TAIL, _ALIKE, _FEW = 0.025, 0.02, 0.01, 0.005
"""What the nominal level is raised by for skewed items, for percentiles, for windows that are alike, and for rounds: by
simulation, so that each covers 93 % under every noise that is tried."""


def median(samples: Samples, *, successive: bool = False, level: float = LEVEL) -> Value:
    """The median of times, rates or other figures of rounds, with its interval.

    Args:
        samples: one figure for each round, or the steps of each round, which are reduced to their median.
        successive: whether the samples are windows that follow one another closely, so that neighbours are alike.
        level: of the interval.

    Raises:
        ValueError: there is no sample, or one is not finite.
    """
    if len(samples) and isinstance(samples[0], Sequence | np.ndarray):
        rounds = _finite([float(np.median(_finite(part))) for part in samples if len(part)])  # type: ignore[arg-type]
    else:
        rounds = _finite(samples)  # type: ignore[arg-type]
    positive = bool((rounds > 0).all())
    found = _location(np.log(rounds) if positive else rounds, successive, level)
    return _exp(found, float(np.median(rounds))) if positive else found


def paired_ratio(
    base: Sequence[float], head: Sequence[float], *, successive: bool = False, level: float = LEVEL
) -> Value:
    """The median of head ÷ base over pairs that were measured together, with its interval.

    Args:
        base, head: values above 0, one pair for each round or window, in the order in which they were measured.
        successive: whether the pairs are windows of steps that follow one another closely, rather than whole requests.
        level: of the interval.

    Raises:
        ValueError: lengths differ, there is no pair, or a value is not above 0.
    """
    below, above = _finite(base), _finite(head)
    if len(below) != len(above):
        raise ValueError(f"{len(below)} base and {len(above)} head samples are not pairs")
    if (below <= 0).any() or (above <= 0).any():
        raise ValueError("a ratio needs values above 0")
    found = _location(np.log(above / below), successive, level)
    assert found.value is not None
    return _exp(found, math.exp(found.value))


def highest(peaks: Sequence[float]) -> Value:
    """The highest of several memory peaks, with the range of all of them."""
    array = _finite(peaks)
    return _range(array, float(array.max()), len(array))


def mean(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    ends: tuple[float, float] = (-math.inf, math.inf),
    level: float = LEVEL,
) -> Value:
    """The mean of the figures of items, with its interval. The items of one cluster, such as a document, count as one
    independent sample.

    Args:
        values: one figure for each item.
        clusters: the document of each item; if left out, every item is independent.
        ends: the lowest and the highest value that the figure can have. If both are finite, the figure is a score.
            Right or wrong answers to independent items get the exact binomial interval. For other scores, one item is
            added at either end of the scale, because a few equal scores would otherwise look like certainty.
        level: of the interval.

    Raises:
        ValueError: there is no value, one is not finite, or ``clusters`` has another length.
    """
    # 1. clusters; right or wrong answers to independent items have an exact interval
    array = _finite(values)
    sums, counts = cluster_sums(array, clusters)
    middle, n, score = float(array.mean()), len(sums), all(map(math.isfinite, ends))
    if score and ends == (0.0, 1.0) and n == len(array) and set(array.tolist()) <= {0.0, 1.0}:
        return proportion(int(array.sum()), n, level)
    # 2. one figure for each cluster: its deviation from the mean, weighted by the number of its items
    figures = middle + (sums - middle * counts) / counts.mean()
    # 3. equal figures are exact, too few have a range, others an interval
    if not score and n > 1 and np.ptp(array) == 0:
        return Value(middle, middle, middle, n, kind="exact")
    if n < (SCORES if score else ITEMS):
        return Value(middle, float(figures.min()), float(figures.max()), n, kind="range") if n > 1 else Value(middle)
    bounds = scores_t(figures[None], ends, level) if score else skewed_t(figures[None], level)
    lo, hi = (float(end[0]) for end in bounds)
    lo, hi = max(ends[0], min(lo, middle)), min(ends[1], max(hi, middle))
    return Value(middle, lo, hi, n, kind="interval", method="added items, t" if score else "Hall's t", df=n - 1)


def paired_difference(
    base: Sequence[float],
    head: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    bounded: bool = False,
    level: float = LEVEL,
) -> Value:
    """The mean of head − base over the same items, with its interval; see :func:`mean`.

    Why differences are paired and clustered: Miller, "Adding error bars to evals" (arXiv 2411.00640).

    Args:
        base, head: one figure for each item, in the same order.
        clusters: the document of each item.
        bounded: whether both are scores between 0 and 1.
        level: of the interval.
    """
    if len(base) != len(head) or not len(base):
        raise ValueError(f"{len(base)} base and {len(head)} head items are not pairs")
    differences = [h - b for b, h in zip(base, head, strict=True)]
    ends = (-1.0, 1.0) if bounded else (-math.inf, math.inf)
    return mean(differences, clusters, ends=ends, level=level)


def proportion(hits: int, n: int, level: float = LEVEL) -> Value:
    """A share of independent items with its exact binomial interval."""
    tail = (1 - level) / 2
    lo = float(special.betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    hi = float(special.betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return Value(hits / n, lo, hi, n, kind="interval", method="binomial", df=max(1, n - 1))


def percentile(samples: Samples, q: float, level: float = LEVEL) -> Value | None:
    """The ``q``-quantile of steps with its interval; None if there are too few steps.

    The share of steps below the quantile varies between blocks of successive steps by more than chance, because slow
    and fast phases of the machine last longer than a step. Its standard error is computed from BLOCKS blocks, and is
    never less than that of independent steps.

    Args:
        samples: steps, or rounds of steps, in the order they were measured.
        q: between 0 and 1.
        level: of the interval.
    """
    nested = len(samples) and isinstance(samples[0], Sequence | np.ndarray)
    steps = _finite(np.concatenate([np.asarray(part, float) for part in samples]) if nested else samples)  # type: ignore[arg-type]
    if len(steps) < 2 * BLOCKS:
        return None
    value, (lo, hi) = float(np.quantile(steps, q)), quantile_bounds(steps[None], q, level)
    if math.isnan(lo[0]):
        return None
    return Value(value, float(lo[0]), float(hi[0]), len(steps), kind="interval", method="Woodruff", df=BLOCKS - 1)


# The methods take arrays of shape [trials, n] and return bounds of shape [trials]. The coverage study calls them, too.


def trimmed_t(x: Floats, level: float = LEVEL) -> Bounds:
    """Student's t interval of the mean without the TRIM lowest and highest samples; its error is from the winsorised
    samples (Tukey and McLaughlin 1963)."""
    n = x.shape[1]
    cut = _cut(n)
    # 1. the trimmed mean
    ordered = np.sort(x, axis=1)
    kept = n - 2 * cut
    middle = ordered[:, cut : n - cut].mean(axis=1)
    # 2. its standard error, from the samples with outliers moved to the trimming limits
    pulled = np.clip(ordered, ordered[:, cut : cut + 1], ordered[:, n - cut - 1 : n - cut])
    error = pulled.std(axis=1, ddof=1) * math.sqrt((n - 1) / (kept * (kept - 1)))
    # 3. Student's t with the degrees of freedom of the remaining samples
    half = special.stdtrit(kept - 1, (1 + min(level + _FEW, 0.9999)) / 2) * error
    return middle - half, middle + half


def blocks_t(x: Floats, level: float = LEVEL) -> Bounds:
    """Student's t interval of the medians of successive blocks, which are far less correlated than neighbouring
    samples."""
    # 1. the median of each block
    count = blocks_of(x.shape[1])
    medians = np.stack([np.median(part, axis=1) for part in np.array_split(x, count, axis=1)], axis=1)
    # 2. Student's t of these medians
    middle, error = medians.mean(axis=1), medians.std(axis=1, ddof=1) / math.sqrt(count)
    half = special.stdtrit(count - 1, (1 + min(level + _ALIKE, 0.9999)) / 2) * error
    return middle - half, middle + half


def blocks_of(n: int) -> int:
    """Blocks of ``n`` successive windows: eight windows each, six to twelve of them."""
    return min(12, max(6, n // 8))


def skewed_t(x: Floats, level: float = LEVEL) -> Bounds:
    """On either side, the wider of Student's t and Hall's t, whose cubic transformation corrects for skewness (Hall
    1992)."""
    # 1. mean, standard deviation and unbiased skewness
    n = x.shape[1]
    middle, spread = x.mean(axis=1), x.std(axis=1, ddof=1)
    with np.errstate(all="ignore"):
        skew = ((x - middle[:, None]) ** 3).mean(axis=1) / x.std(axis=1) ** 3 * math.sqrt(n * (n - 1)) / (n - 2)
    skew = np.where(np.abs(skew) > 1e-6, skew, 1e-6)  # avoids division by 0, also if all samples are equal
    # 2. Student's quantile, and its transformation by the inverse of Hall's cubic
    t = special.stdtrit(n - 1, (1 + min(level + _SKEWED, 0.9999)) / 2) / math.sqrt(n)

    def hall(y: float) -> Floats:
        return np.asarray(3 / skew * (np.cbrt(1 + skew * (y - skew / (6 * n))) - 1))

    return middle - spread * np.maximum(hall(t), t), middle + spread * np.maximum(-hall(-t), t)


def scores_t(x: Floats, ends: tuple[float, float], level: float = LEVEL) -> Bounds:
    """Student's t interval after adding one item at either end of the scale (Agresti and Caffo 2000)."""
    n = x.shape[1]
    more = np.concatenate([x, np.broadcast_to(np.array(ends), (len(x), 2))], axis=1)
    middle, spread = more.mean(axis=1), more.std(axis=1)
    half = special.stdtrit(n - 1, (1 + level) / 2) * spread / math.sqrt(n + 2)
    return middle - half, middle + half


def quantile_bounds(x: Floats, q: float, level: float = LEVEL) -> Bounds:
    """Bounds of the ``q``-quantile by Woodruff's method (1952); NaN if a bound lies beyond the samples."""
    # 1. the share of samples below the quantile in each block, and its standard error
    n = x.shape[1]
    below = x <= np.quantile(x, q, axis=1, keepdims=True)
    shares = np.stack([part.mean(axis=1) for part in np.array_split(below, BLOCKS, axis=1)], axis=1)
    error = np.maximum(shares.std(axis=1, ddof=1) / math.sqrt(BLOCKS), math.sqrt(q * (1 - q) / n))
    # 2. bounds of that share, converted to ranks
    half = special.stdtrit(BLOCKS - 1, (1 + min(level + _TAIL, 0.9999)) / 2) * error
    low, high = np.floor((q - half) * n).astype(int) - 1, np.ceil((q + half) * n).astype(int)
    outside = (low < 0) | (high > n - 1)
    # 3. the samples of these ranks
    ordered = np.sort(x, axis=1)
    bounds = [np.take_along_axis(ordered, np.clip(at, 0, n - 1)[:, None], axis=1)[:, 0] for at in (low, high)]
    return np.where(outside, np.nan, bounds[0]), np.where(outside, np.nan, bounds[1])


def cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum and count of the values of each cluster; without clusters, each value is its own."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    where = np.array([names[name] for name in clusters])
    return np.bincount(where, values).astype(np.float64), np.bincount(where).astype(np.float64)


def _cut(n: int) -> int:
    """Number of samples trimmed at either end; none with fewer than six, because too few would remain for an
    interval."""
    return int(TRIM * n) if n > 5 else 0


def _location(x: Floats, successive: bool, level: float) -> Value:
    """The median of ``x`` with its interval or range."""
    n, middle = len(x), float(np.median(x))
    if np.ptp(x) <= 1e-12:
        return Value(middle, middle, middle, n, kind="exact") if n > 1 else Value(middle)
    if n < (WINDOWS if successive else ROUNDS):
        return _range(x, middle, n)
    lo, hi = (float(end[0]) for end in (blocks_t if successive else trimmed_t)(x[None], level))
    df = blocks_of(n) - 1 if successive else n - 2 * _cut(n) - 1
    method = "t of blocks" if successive else "trimmed t"
    return Value(middle, min(lo, middle), max(hi, middle), n, kind="interval", method=method, df=df)


def _range(x: Floats, value: float, n: int) -> Value:
    """The range from smallest to largest; a single sample has none, and samples that are all equal are exact."""
    if n < 2:
        return Value(value, n=n)
    if np.ptp(x) <= 1e-12 * np.abs(x).max():
        return Value(value, value, value, n, kind="exact")
    return Value(value, float(x.min()), float(x.max()), n, kind="range")


def _exp(found: Value, value: float) -> Value:
    """Converts a result on logs to the scale of the samples; its bounds contain the value despite rounding."""
    lo, hi = (None if end is None else math.exp(min(end, 700.0)) for end in (found.lo, found.hi))
    lo, hi = (None if lo is None else min(lo, value)), (None if hi is None else max(hi, value))
    return Value(value, lo, hi, found.n, kind=found.kind, method=found.method, df=found.df)


def _finite(values: Sequence[float] | Floats) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError("samples must be one or more finite numbers")
    return array
