"""One rule for each kind of metric: it takes two figures, or their samples, and returns one :class:`Row`.

δ is the tolerance of a metric, from the suite or from the metric table.

* exact: a worse figure is REGRESSED, a better one IMPROVED. A figure without a better side must not change.
* bounded: a figure that is worse by more than δ is REGRESSED, and one that is better by more than δ IMPROVED.
* timed: θ is the median of ±ln(head ÷ base) over interleaved rounds, where positive means worse, and [lo, hi] is its
  interval (:mod:`d2obench.stats.intervals`). lo > ln(1 + δ) is REGRESSED, hi < −ln(1 + δ) is IMPROVED, and any other
  hi < ln(1 + δ) is OK. Otherwise the figure is INCONCLUSIVE, and more rounds are measured.
* ratio: the same rule, applied to one of three things: the interval of a run's ratio divided by the ratio of a
  baseline; ratios that both sides of a gate measured; or the ratio of two runs' ratios, with the noise of both.
* budget: the head's figure against a bound that the suite sets, whatever the base has. Counts and bytes are compared as
  they are; of others, the whole interval has to be inside (OK) or outside (REGRESSED).
* sampled: both sides have the same items. Right or wrong answers are REGRESSED if their mean falls by more than δ and
  McNemar's exact one-sided test gives p < 0.05. Other figures are judged by the interval of the paired differences
  against ±δ, with documents as clusters.

No round is left out, and no round is chosen because it was the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from d2obench.gate.verdict import BUDGET, Figure, Row, Verdict
from d2obench.metric import METRICS, Direction
from d2obench.record import Value
from d2obench.stats.claims import outcome, ratio_of_ratios, timed, widened
from d2obench.stats.intervals import paired_difference, paired_ratio
from d2obench.stats.paired import detectable, mcnemar

SAME = 1e-9
"""Relative difference up to which two exact figures are equal: they may have been written to a file and read again."""
ALPHA = 0.05


def tolerance(metric: str, overrides: Mapping[str, float] | None = None) -> float:
    """The tolerance of a metric: that of the suite, otherwise that of the metric table, otherwise 0."""
    if overrides and metric in overrides:
        return overrides[metric]
    return METRICS[metric].tolerance if metric in METRICS else 0.0


def judge_exact(cell: str, metric: str, base: Figure, head: Figure) -> Row:
    """Judges an exact figure. Digests, which are strings, and tokens by layer, which are tuples, have to be equal."""
    if base is None or head is None:
        return missing(cell, metric, "exact", base, head)
    if isinstance(base, tuple) and isinstance(head, tuple):
        return _vector(cell, metric, base, head)
    if isinstance(base, int | float) and isinstance(head, int | float):
        if math.isclose(base, head, rel_tol=SAME):
            return Row(cell, metric, Verdict.OK, "exact", base, head, 0.0)
        effect = head / base - 1 if base else None
        worse = (head - base) * _sign(metric)
        if worse < 0:
            return Row(cell, metric, Verdict.IMPROVED, "exact", base, head, effect, reason="tighten the baseline")
        reason = "worse" if worse > 0 else "changed; it must stay equal"
        return Row(cell, metric, Verdict.REGRESSED, "exact", base, head, effect, reason=reason)
    if base == head:
        return Row(cell, metric, Verdict.OK, "exact", base, head)
    return Row(cell, metric, Verdict.REGRESSED, "exact", base, head, reason="changed; it must stay equal")


def judge_repeats(cell: str, metric: str, repeats: Sequence[Figure]) -> Row | None:
    """An INCOMPARABLE row if an exact figure differs between the repeats of one run; None if all repeats agree."""
    different = list(dict.fromkeys(repeats))
    if len(different) < 2:
        return None
    figures = [str(figure)[:20] for figure in different[:3]]
    reason = f"not exact: repeats of one run gave {' and '.join(figures)}"
    return Row(cell, metric, Verdict.INCOMPARABLE, "exact", different[0], different[1], n=len(repeats), reason=reason)


def judge_bounded(cell: str, metric: str, base: float | None, head: float | None, limit: float) -> Row:
    """Judges a bounded figure; ``limit`` is the relative change that is tolerated."""
    if base is None or head is None or base <= 0:
        return missing(cell, metric, "bounded", base, head)
    effect = head / base - 1
    worse = effect * _sign(metric)
    verdict = Verdict.REGRESSED if worse > limit else Verdict.IMPROVED if worse < -limit else Verdict.OK
    return Row(cell, metric, verdict, "bounded", base, head, effect, limit=limit)


def judge_timed(
    cell: str, metric: str, base: Sequence[float], head: Sequence[float], limit: float, level: float = 0.98
) -> Row:
    """Judges a timed figure, or a ratio that both sides measured, by pairs of interleaved rounds.

    Args:
        cell, metric: what is judged.
        base, head: the figure in each round, in the same order; values above 0.
        limit: the relative change that is tolerated.
        level: of the interval.
    """
    kind = METRICS[metric].kind if metric in METRICS else "timed"
    if not len(base) or not len(head):
        return missing(cell, metric, kind, None, None)
    found = paired_ratio(base, head, level=level)
    return _ratio_row(cell, metric, kind, _median(base), _median(head), found, limit, len(base))


def judge_ratio(cell: str, metric: str, stored: float | None, head: Value | None, limit: float) -> Row:
    """Judges the ratio of one run, with its interval, by the ratio that a baseline stores."""
    if stored is None or stored <= 0 or head is None or head.value is None:
        return missing(cell, metric, "ratio", stored, head.value if head else None)
    lo = None if head.lo is None else head.lo / stored
    hi = None if head.hi is None else head.hi / stored
    found = msgspec.structs.replace(head, value=head.value / stored, lo=lo, hi=hi)
    return _ratio_row(cell, metric, "ratio", stored, head.value, found, limit, head.n)


def judge_ratios(
    cell: str, metric: str, base: Value | None, head: Value | None, limit: float, comparisons: int = 1
) -> Row:
    """Judges a ratio that two runs measured, each with noise of its own."""
    if not base or not head or not base.value or not head.value or base.value <= 0 or head.value <= 0:
        sides = (one.value if one else None for one in (base, head))
        return missing(cell, metric, "ratio", *sides)
    found = widened(ratio_of_ratios(base, head), comparisons, timed=timed(metric))
    return _ratio_row(cell, metric, "ratio", base.value, head.value, found, limit, found.n)


def judge_budget(cell: str, metric: str, head: Value, bound: tuple[float | None, float | None], text: str) -> Row:
    """Judges the head's figure by a bound of the suite.

    Args:
        cell, metric: what is judged.
        head: the figure.
        bound: at least, at most; one of them is None.
        text: the bound as the suite has it.
    """
    least, most = bound
    limit = most if least is None else least
    effect = head.value / limit - 1 if head.value is not None and limit else None
    if METRICS[metric].kind in ("exact", "bounded") and head.value is not None:
        figure, head = head.value, Value(head.value)
        inside = (least is None or figure >= least) and (most is None or figure <= most)
        found = "met" if inside else "missed"
    else:
        found = outcome(metric, head, least, most)
    if found == "missed":
        reason = f"outside the budget {text}: mend the head, or change gate.budget.{metric} in the suite on purpose"
        verdict = Verdict.REGRESSED
    else:
        verdict = Verdict.OK if found == "met" else Verdict.INCONCLUSIVE
        reason = "" if found == "met" else f"the interval reaches over the budget {text}, or there is none"
    lo, hi = (end / limit - 1 if end is not None and limit else None for end in (head.lo, head.hi))
    return Row(cell, metric, verdict, BUDGET, text, head.value, effect, lo, hi, n=head.n, reason=reason)


def side_by_side(cell: str, metric: str, base: Value, head: Value, reason: str) -> Row:
    """A row that shows two figures of runs made at different times. It has no verdict: the machine may have changed."""
    effect = head.value / base.value - 1 if base.value and head.value else None
    kind = METRICS[metric].kind
    return Row(cell, metric, Verdict.NOT_JUDGED, kind, base.value, head.value, effect, reason=reason)


def judge_sampled(
    cell: str,
    metric: str,
    base: Mapping[str, float],
    head: Mapping[str, float],
    limit: float,
    clusters: Mapping[str, Any] | None = None,
    *,
    comparisons: int = 1,
) -> Row:
    """Judges a figure of quality item by item; sides with different items are INCOMPARABLE.

    Args:
        cell, metric: what is judged.
        base, head: item id → figure.
        limit: the change that is tolerated.
        clusters: item id → document, for items that are parts of a document.
        comparisons: number of such rows; each is judged at a level at which all are right together (Bonferroni).
    """
    # 1. the same items on both sides
    if base.keys() != head.keys() or not base:
        odd = len(base.keys() ^ head.keys())
        reason = f"the items differ: {odd} of {len(base.keys() | head.keys())} ids are on one side only"
        return Row(cell, metric, Verdict.INCOMPARABLE, "sampled", reason=reason)
    # 2. the paired differences and their interval
    ids = sorted(base)
    before, after = [base[i] for i in ids], [head[i] for i in ids]
    groups = [clusters.get(i, i) for i in ids] if clusters else None
    changed = sum(not math.isclose(b, h, rel_tol=1e-6, abs_tol=1e-9) for b, h in zip(before, after, strict=True))
    bounded = metric in METRICS and METRICS[metric].unit in ("%", "points")
    found = paired_difference(before, after, groups, bounded=bounded, level=1 - ALPHA / comparisons)
    # 3. the verdict, and where it is no regression, the smallest change that these items could have shown
    sign = _sign(metric)
    verdict, reason = _sampled_verdict(before, after, found, limit, sign, changed, ALPHA / comparisons)
    if changed and verdict in (Verdict.INCONCLUSIVE, Verdict.OK):
        reason += f"; {len(ids)} items show a change of {detectable(before, after, groups):.3g} (80 %)"
    means = math.fsum(before) / len(ids), math.fsum(after) / len(ids)
    lo, hi = (found.lo, found.hi) if found.kind != "range" else (None, None)
    return Row(cell, metric, verdict, "sampled", *means, found.value, lo, hi, limit, len(ids), reason)


def confirm(first: Row, second: Row | None, failed: Mapping[str, Any] | None = None) -> Row:
    """The row of a regression after its second sitting: confirmed, or INCONCLUSIVE with what both sittings found."""
    if second is not None and second.verdict is Verdict.REGRESSED:
        return msgspec.structs.replace(first, reason=f"confirmed by fresh processes: {second.change}")
    seen = (
        "the second sitting failed" if failed else f"then {second.change or 'nothing'}" if second else "not seen again"
    )
    return msgspec.structs.replace(
        first, verdict=Verdict.INCONCLUSIVE, reason=f"not confirmed by fresh processes: first {first.change}, {seen}"
    )


def missing(cell: str, metric: str, kind: str, base: Figure, head: Figure) -> Row:
    """The INCOMPARABLE row of a figure that at least one side lacks."""
    side = "neither side has it" if base is None and head is None else "the base has none" if base is None else ""
    reason = side or ("the head has none" if head is None else "the base is 0")
    return Row(cell, metric, Verdict.INCOMPARABLE, kind, base, head, reason=reason)


def _sampled_verdict(
    before: Sequence[float],
    after: Sequence[float],
    found: Value,
    limit: float,
    sign: int,
    changed: int,
    alpha: float,
) -> tuple[Verdict, str]:
    if not changed:
        return Verdict.OK, "no item changed"
    moved = f"{changed} items changed"
    worse = (found.value or 0.0) * sign
    # 1. right or wrong answers: McNemar's test decides on a regression
    binary = all(value in (0, 1) for value in (*before, *after))
    if binary:
        flips = mcnemar(before, after) if sign < 0 else mcnemar(after, before)
        moved = f"{flips.lost} lost, {flips.won} won, p = {flips.p_worse:.3g}"
        if worse > limit and flips.p_worse < alpha:
            return Verdict.REGRESSED, moved
    # 2. everything else is decided by where the interval lies, turned so that positive means worse
    if found.lo is None or found.hi is None or found.kind == "range":
        return Verdict.INCONCLUSIVE, f"{moved}; too few documents for an interval"
    low, high = sorted((found.lo * sign, found.hi * sign))
    if low > limit and not binary:
        return Verdict.REGRESSED, moved
    if high < limit:
        return (Verdict.IMPROVED if high < -limit else Verdict.OK), moved
    return Verdict.INCONCLUSIVE, f"{moved}; the interval reaches over the limit"


def _ratio_row(cell: str, metric: str, kind: str, base: float, head: float, found: Value, limit: float, n: int) -> Row:
    assert found.value is not None
    effect = found.value - 1
    if found.lo is None or found.hi is None or found.kind == "range":
        reason = "too few rounds for an interval"
        return Row(cell, metric, Verdict.INCONCLUSIVE, kind, base, head, effect, limit=limit, n=n, reason=reason)
    # the interval on the log scale, turned so that positive means worse, against the tolerated change
    ends = (math.log(found.lo) * _sign(metric), math.log(found.hi) * _sign(metric))
    low, high, bar = min(ends), max(ends), math.log1p(limit)
    reason = ""
    if low > bar:
        verdict = Verdict.REGRESSED
    elif high < bar:
        verdict = Verdict.IMPROVED if high < -bar else Verdict.OK
    else:
        verdict, reason = Verdict.INCONCLUSIVE, f"the interval reaches over the limit of {limit:.0%} after {n} rounds"
    return Row(cell, metric, verdict, kind, base, head, effect, found.lo - 1, found.hi - 1, limit, n, reason)


def _vector(cell: str, metric: str, base: tuple[float, ...], head: tuple[float, ...]) -> Row:
    effect = sum(head) / sum(base) - 1 if sum(base) else None
    if len(base) != len(head):
        reason = f"{len(base)} layers became {len(head)}"
        return Row(cell, metric, Verdict.REGRESSED, "exact", base, head, effect, reason=reason)
    moved = [i for i, (b, h) in enumerate(zip(base, head, strict=True)) if not math.isclose(b, h, rel_tol=SAME)]
    if not moved:
        return Row(cell, metric, Verdict.OK, "exact", base, head, 0.0)
    first = moved[0]
    reason = (
        f"{len(moved)} of {len(base)} layers changed, the first is layer {first}: {base[first]:g} → {head[first]:g}"
    )
    return Row(cell, metric, Verdict.REGRESSED, "exact", base, head, effect, reason=reason)


def _sign(metric: str) -> int:
    """+1 if more is worse, −1 if less is worse, 0 if neither is."""
    direction: Direction = METRICS[metric].direction if metric in METRICS else "none"
    return {"lower": 1, "higher": -1, "none": 0}[direction]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(map(float, values))
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
