"""Decides from intervals alone which figures may be called better, best, met or impossible.

A range, a figure without bounds, and an interval that contains both answers prove nothing: "not told apart". Three
rules apply to every such word:

* **Many comparisons.** Words are grouped into families: the sentences of a report on D2O or on the best policies, those
  of one task on merging by mass and on policies that are never the best choice, the targets of a run, the bold figures
  of one column among comparable rows, the Pareto-optimal rows of one task among comparable rows. With a
  probability of 95 % all words of one family are right together (Bonferroni): if a family needs ``comparisons``
  intervals, each of them is widened to the level 1 − 0.05 ÷ comparisons before it is used.
* **Processes.** Where the operating system happens to place a process in memory changes its times by some percent
  (Mytkowicz et al., ASPLOS 2009); in the gate's study, medians of fresh processes differed by BIAS beyond their
  sampling error. A time or a ratio of times is widened by this amount, less so the more fresh processes it was measured
  in.
* **What bytes allow.** A speed-up whose whole interval lies above what bytes and measured bandwidth allow is
  impossible: something else was measured, so it never counts as better.

Nothing here reads a file or draws a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec
from scipy import special

from d2obench.metric import METRICS
from d2obench.record import Value
from d2obench.stats.intervals import LEVEL, proportion

Verdict = Literal["better", "worse", "not told apart", "impossible"]
Outcome = Literal["met", "missed", "no verdict"]
BIAS = 0.015
"""Standard deviation of the logs of fresh processes' medians (``reports/gate-study-cpu``), without their sampling
error."""
PROCESSES = 2
"""Number of fresh processes that a sentence about speed needs; with fewer, the sentence states it."""
K = TypeVar("K", bound=Hashable)


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sentence of a report, a bold figure or a target, as data, so that the rate of false sentences can be studied.

    Args:
        word: ``better`` or ``worse`` than the policy it is compared with; ``best``, better than ``others``;
            ``undominated``, better than ``others``, which are all the rows that hold as few bytes or fewer; ``met`` or
            ``missed``, of a target.
        cell: the cell that the figure belongs to.
        metric: the figure, named as in ``results.csv``.
        least, most: the bounds that the word claims for the figure: from 1 or up to 1 for ratios, 0 for differences, or
            a target's bounds.
        others: for ``best`` and ``undominated``, the cells that it is claimed to be better than.
        lo, hi: the interval that the claim is based on.
        comparisons: number of comparisons for which the interval was widened.
        processes: number of fresh processes that were measured; 0 if times are not involved.
    """

    word: Literal["better", "worse", "best", "undominated", "met", "missed"]
    cell: str
    metric: str
    least: float | None = None
    most: float | None = None
    others: tuple[str, ...] = ()
    lo: float | None = None
    hi: float | None = None
    comparisons: int = 1
    processes: int = 0


class Leader(NamedTuple):
    """The best of several figures, and those that can't be told from it; without any such, it is proven to be best."""

    best: Hashable
    near: tuple[Hashable, ...]


def widened(value: Value, comparisons: int = 1, *, timed: bool = False, processes: int = 1) -> Value:
    """The interval widened so that all ``comparisons`` words based on such intervals are right together with 95 %.

    A range is returned unchanged; it proves nothing.

    Args:
        value: an interval, or an exact figure, which is returned unchanged.
        comparisons: number of words based on intervals in the same report.
        timed: whether the figure is a time, a rate or a ratio of times.
        processes: number of fresh processes in which it was measured.
    """
    if value.value is None or value.kind == "exact":
        return value
    if value.kind != "interval" or value.lo is None or value.hi is None:
        return value
    level = 1 - (1 - LEVEL) / max(1, comparisons)
    # 1. a share of right answers has an exact interval at every level
    if value.method == "binomial":
        return proportion(round(value.value * value.n), value.n, level)
    # 2. other intervals grow as the quantile of Student's t does
    df = value.df or max(1, value.n - 1)
    factor = float(special.stdtrit(df, (1 + level) / 2) / special.stdtrit(df, (1 + LEVEL) / 2))
    logs = timed and value.lo > 0
    middle, lo, hi = (math.log(end) if logs else end for end in (value.value, value.lo, value.hi))
    below, above = factor * (middle - lo), factor * (hi - middle)
    # 3. a time also allows for what differs between processes; independent errors add up as squares
    if logs:
        bias = float(special.ndtri((1 + level) / 2)) * BIAS / math.sqrt(max(1, processes))
        below, above = math.hypot(below, bias), math.hypot(above, bias)
    lo, hi = (math.exp(end) if logs else end for end in (middle - below, middle + above))
    return msgspec.structs.replace(value, lo=lo, hi=hi)


def least(values: Sequence[Value]) -> Value:
    """The smallest of several figures, with an interval for the smallest true value; a range if one has no interval.

    Which figure comes out smallest is partly chance, so its own interval would be too narrow and would lie too low.
    All intervals are widened so that they hold together (Bonferroni). Then the smallest true value lies between the
    smallest lower and the smallest upper bound.

    Raises:
        ValueError: there is no value.
    """
    known = [one for one in values if one.value is not None]
    if not known:
        raise ValueError("there is no value to choose from")
    smallest = min(known, key=lambda one: one.value or 0.0)
    if len(known) == 1:
        return smallest
    wide = [widened(one, len(known)) for one in known]
    lows, highs = [one.lo for one in wide if one.lo is not None], [one.hi for one in wide if one.hi is not None]
    if len(lows) < len(known) or len(highs) < len(known):
        return Value(smallest.value, n=smallest.n)
    n, df = min(one.n for one in known), min(one.df or max(1, one.n - 1) for one in known)
    certain = {one.kind for one in known} <= {"interval", "exact"}
    return Value(
        smallest.value, min(lows), min(highs), n, kind="interval" if certain else "range", df=df,
        method=f"least of {len(known)}",
    )  # fmt: skip


def timed(metric: str) -> bool:
    """Whether a figure depends on how fast the machine was: times, rates and ratios of times."""
    found = METRICS.get(metric.partition(":")[0])
    return found is not None and found.kind in ("timed", "ratio") and found.group != "memory"


def same(metric: str) -> float:
    """The value of a ratio or a difference if two policies are equal: 1 or 0."""
    return 1.0 if METRICS[metric.partition(":")[0]].kind == "ratio" else 0.0


def told(
    metric: str, value: Value | None, comparisons: int = 1, *, processes: int = 1, bound: float | None = None
) -> Verdict:
    """Whether a ratio or a difference proves its policy to be better or worse than the one it is compared with.

    Args:
        metric: its key, for example ``speedup`` or ``kl_rival:h2o``.
        value: the figure.
        comparisons, processes: see :func:`widened`.
        bound: the largest ratio that bytes and measured bandwidth allow, where known.
    """
    if value is None or value.value is None:
        return "not told apart"
    if impossible(value, bound):
        return "impossible"
    wide = widened(value, comparisons, timed=timed(metric), processes=processes)
    ends, direction = _ends(metric, wide), METRICS[metric.partition(":")[0]].direction
    if ends is None or direction == "none" or ends[0] <= same(metric) <= ends[1]:
        return "not told apart"
    return "better" if (ends[0] > same(metric)) == (direction == "higher") else "worse"


def impossible(value: Value, bound: float | None) -> bool:
    """Whether a ratio exceeds its bound by more than its own uncertainty; a single figure is entirely uncertain."""
    return bound is not None and value.lo is not None and value.lo > bound * math.exp(2 * BIAS)


def apart(metric: str, mine: Value, theirs: Value, comparisons: int = 1, *, processes: int = 1) -> Verdict:
    """Compares two policies' figures of one metric: they are told apart if their widened intervals do not touch.

    If a paired ratio or difference of the two exists, use :func:`told`, which is more sensitive.
    """
    wide = [widened(one, comparisons, timed=timed(metric), processes=processes) for one in (mine, theirs)]
    a, b = (_ends(metric, one) for one in wide)
    direction = METRICS[metric.partition(":")[0]].direction
    if a is None or b is None or direction == "none":
        return "not told apart"
    if a[1] < b[0]:
        return "better" if direction == "lower" else "worse"
    if b[1] < a[0]:
        return "worse" if direction == "lower" else "better"
    return "not told apart"


def leader(
    metric: str,
    figures: Mapping[K, Value],
    comparisons: int | None = None,
    *,
    processes: int = 1,
    pair: Callable[[K, K], Verdict] | None = None,
) -> Leader | None:
    """The best figure, with all figures that can't be told from it; None if fewer than two are known.

    Exact figures that are equal share the first place and are listed in ``near``.

    Args:
        metric: of all figures.
        figures: by row; leave out impossible ones.
        comparisons: words of the same report; as many as there are figures where it is left out.
        processes: see :func:`widened`.
        pair: whether the first row is better than the second; by their own intervals where it is left out.
    """
    direction = METRICS[metric.partition(":")[0]].direction
    known = {key: one for key, one in figures.items() if one.value is not None}
    if direction == "none" or len(known) < 2:
        return None
    sign = 1.0 if direction == "lower" else -1.0
    best = min(known, key=lambda key: sign * (known[key].value or 0.0))
    count = comparisons or len(known)

    def better(other: K) -> bool:
        if pair is not None:
            return pair(best, other) == "better"
        return apart(metric, known[best], known[other], count, processes=processes) == "better"

    return Leader(best, tuple(key for key in known if key != best and not better(key)))


def front(sizes: Mapping[K, float | None], better: Callable[[K, K], bool]) -> set[K]:
    """The rows proven to be undominated: every other row that is as small or smaller is proven to be worse.

    Args:
        sizes: what each row holds, for example KV bytes; a row without a size is never on the front.
        better: whether the first row's quality is told to be better than the second's.
    """
    known = {key: size for key, size in sizes.items() if size is not None and math.isfinite(size)}
    return {
        key
        for key, size in known.items()
        if all(better(key, other) for other, theirs in known.items() if other != key and theirs <= size)
    }


def outcome(
    metric: str,
    value: Value,
    at_least: float | None,
    at_most: float | None,
    comparisons: int = 1,
    *,
    processes: int = 1,
) -> Outcome:
    """Whether a figure keeps its bounds: ``met`` if its whole widened interval lies inside, ``missed`` if all of it
    lies outside.

    Args:
        metric: its key.
        value: the figure.
        at_least, at_most: the bounds; one may be left out.
        comparisons: targets of the same suite.
        processes: see :func:`widened`.
    """
    ends = _ends(metric, widened(value, comparisons, timed=timed(metric), processes=processes))
    if ends is None:
        return "no verdict"
    lo, hi = ends
    low, high = (-math.inf if at_least is None else at_least), (math.inf if at_most is None else at_most)
    if low <= lo and hi <= high:
        return "met"
    return "missed" if hi < low or lo > high else "no verdict"


def resting_on(processes: int) -> str:
    """The addition to a sentence about speed; empty if it is based on enough fresh processes."""
    return "" if processes >= PROCESSES else "measured in one process"


def across_runs(metric: str) -> bool:
    """Whether two runs made at different times may be compared by it: bytes, counts, quality, and ratios within a
    run."""
    found = METRICS.get(metric.partition(":")[0])
    return found is None or found.kind != "timed"


def ratio_of_ratios(base: Value, head: Value) -> Value:
    """head ÷ base of two independent runs, each with its interval; a range if either has no interval.

    On the log scale, the distances from value to bound are added as squares (Donner and Zou 2012, MOVER).
    """
    assert base.value and head.value
    value, n = head.value / base.value, min(base.n, head.n)
    ends = [end for end in (base.lo, base.hi, head.lo, head.hi) if end is not None and end > 0]
    if len(ends) < 4:
        return Value(value, n=n)
    below, above, low, high = (math.log(end) for end in ends)
    b, h = math.log(base.value), math.log(head.value)
    lo = h - b - math.hypot(h - low, above - b)
    hi = h - b + math.hypot(high - h, b - below)
    certain = {base.kind, head.kind} <= {"interval", "exact"}
    df = min(base.df or base.n, head.df or head.n)
    return Value(value, math.exp(lo), math.exp(hi), n, kind="interval" if certain else "range", method="MOVER", df=df)


def _ends(metric: str, value: Value) -> tuple[float, float] | None:
    """The bounds on which a word may be based; None if there are none.

    1. Counts and bytes, and figures that were the same in every repeat: the figure itself. If the repeats of a count
       differ after all, it is their range. The range of a figure for information, as over documents, proves nothing.
    2. A peak of memory: the figure, if every repeat came to the same number of bytes. A range proves nothing.
    3. All other figures: their interval.
    """
    kind = METRICS[metric.partition(":")[0]].kind
    if value.value is None:
        return None
    if value.kind == "exact" or kind == "exact" or (kind == "info" and value.kind != "range"):
        return (value.value, value.value) if value.lo is None or value.hi is None else (value.lo, value.hi)
    if value.lo is None or value.hi is None:
        return None
    same = kind == "bounded" and value.n > 1 and value.lo == value.hi
    return (value.lo, value.hi) if value.kind == "interval" or same else None
