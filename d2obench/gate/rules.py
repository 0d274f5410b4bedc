"""One rule a metric kind: two figures (or their samples) in, one :class:`Row` out.

* exact: any worse value is REGRESSED, any better one IMPROVED; a figure with no better side must not change.
* bounded: more than the tolerance worse is REGRESSED.
* timed: θ = median of r_i = ±ln(head_i ÷ base_i) over interleaved rounds, positive = worse, with its interval
  (``d2obench.stats.intervals``). lo > ln(1+δ): REGRESSED. hi < ln(1+δ): OK, IMPROVED if hi < −ln(1+δ). Else
  INCONCLUSIVE: measure on.
* ratio: the interval of one run's paired ratio against the stored ratio × (1 − δ), or both sides measured as ``timed``,
  or the ratio of the ratios of two runs made at different times, with the noise of both.
* sampled: the same items on both sides. 0/1: REGRESSED if the mean falls by more than δ and McNemar's exact one-sided
  p < 0.05. Else the interval of the paired differences, documents as clusters, against ±δ.

Rounds are never dropped and never "the best of"; δ comes from the metric table or from the suite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from d2obench.gate.verdict import Figure, Row, Verdict
from d2obench.metric import METRICS, Direction
from d2obench.record import Value
from d2obench.stats.claims import ratio_of_ratios, timed, widened
from d2obench.stats.intervals import paired_difference, paired_ratio
from d2obench.stats.paired import detectable, mcnemar

SAME = 1e-9  # relative: two exact floats written and read again
ALPHA = 0.05


def tolerance(metric: str, overrides: Mapping[str, float] | None = None) -> float:
    """δ of a metric: the suite's word, else the metric table's; 0 for what is in neither."""
    if overrides and metric in overrides:
        return overrides[metric]
    return METRICS[metric].tolerance if metric in METRICS else 0.0


def judge_exact(cell: str, metric: str, base: Figure, head: Figure) -> Row:
    """Exact: equal, better or worse; strings (digests) and vectors (tokens a layer) must be equal."""
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
    """A row that says so when repeats of one exact figure differ within one run; None when they agree."""
    different = list(dict.fromkeys(repeats))
    if len(different) < 2:
        return None
    figures = [str(figure)[:20] for figure in different[:3]]
    reason = f"not exact: repeats of one run gave {' and '.join(figures)}"
    return Row(cell, metric, Verdict.INCOMPARABLE, "exact", different[0], different[1], n=len(repeats), reason=reason)


def judge_bounded(cell: str, metric: str, base: float | None, head: float | None, limit: float) -> Row:
    """Bounded: ``limit`` (relative) worse is let pass."""
    if base is None or head is None or base <= 0:
        return missing(cell, metric, "bounded", base, head)
    effect = head / base - 1
    worse = effect * _sign(metric)
    verdict = Verdict.REGRESSED if worse > limit else Verdict.IMPROVED if worse < -limit else Verdict.OK
    return Row(cell, metric, verdict, "bounded", base, head, effect, limit=limit)


def judge_timed(
    cell: str, metric: str, base: Sequence[float], head: Sequence[float], limit: float, level: float = 0.98
) -> Row:
    """Timed (and ratios measured on both sides): pairs of interleaved rounds, see the module's head."""
    kind = METRICS[metric].kind if metric in METRICS else "timed"
    if not len(base) or not len(head):
        return missing(cell, metric, kind, None, None)
    found = paired_ratio(base, head, level=level)
    return _ratio_row(cell, metric, kind, _median(base), _median(head), found, limit, len(base))


def judge_ratio(cell: str, metric: str, stored: float | None, head: Value | None, limit: float) -> Row:
    """Ratio of one run, with its interval, against a stored one."""
    if stored is None or stored <= 0 or head is None or head.value is None:
        return missing(cell, metric, "ratio", stored, head.value if head else None)
    lo = None if head.lo is None else head.lo / stored
    hi = None if head.hi is None else head.hi / stored
    found = msgspec.structs.replace(head, value=head.value / stored, lo=lo, hi=hi)
    return _ratio_row(cell, metric, "ratio", stored, head.value, found, limit, head.n)


def judge_ratios(
    cell: str, metric: str, base: Value | None, head: Value | None, limit: float, comparisons: int = 1
) -> Row:
    """The same ratio inside two runs, each with its own noise."""
    if not base or not head or not base.value or not head.value or base.value <= 0 or head.value <= 0:
        sides = (one.value if one else None for one in (base, head))
        return missing(cell, metric, "ratio", *sides)
    found = widened(ratio_of_ratios(base, head), comparisons, timed=timed(metric))
    return _ratio_row(cell, metric, "ratio", base.value, head.value, found, limit, found.n)


def side_by_side(cell: str, metric: str, base: Value, head: Value, reason: str) -> Row:
    """Two figures of runs made at different times, of which none is judged: the machine is in them."""
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
    """Sampled: item by item over the ids of both sides; other ids on one side make it INCOMPARABLE.

    With ``comparisons`` of them, each is judged at a level at which all are right together (Bonferroni).
    """
    if base.keys() != head.keys() or not base:
        odd = len(base.keys() ^ head.keys())
        reason = f"the items differ: {odd} of {len(base.keys() | head.keys())} ids are on one side only"
        return Row(cell, metric, Verdict.INCOMPARABLE, "sampled", reason=reason)
    ids = sorted(base)
    before, after = [base[i] for i in ids], [head[i] for i in ids]
    groups = [clusters.get(i, i) for i in ids] if clusters else None
    changed = sum(not math.isclose(b, h, rel_tol=1e-6, abs_tol=1e-9) for b, h in zip(before, after, strict=True))
    bounded = metric in METRICS and METRICS[metric].unit in ("%", "points")
    found = paired_difference(before, after, groups, bounded=bounded, level=1 - ALPHA / comparisons)
    sign = _sign(metric)
    verdict, reason = _sampled_verdict(before, after, found, limit, sign, changed, ALPHA / comparisons)
    if changed and verdict in (Verdict.INCONCLUSIVE, Verdict.OK):
        reason += f"; {len(ids)} items show a change of {detectable(before, after, groups):.3g} (80 %)"
    means = math.fsum(before) / len(ids), math.fsum(after) / len(ids)
    lo, hi = (found.lo, found.hi) if found.kind != "range" else (None, None)
    return Row(cell, metric, verdict, "sampled", *means, found.value, lo, hi, limit, len(ids), reason)


def confirm(first: Row, second: Row | None, failed: Mapping[str, Any] | None = None) -> Row:
    """A regression that was found twice stays one; else it is INCONCLUSIVE and says what both sittings saw."""
    if second is not None and second.verdict is Verdict.REGRESSED:
        return msgspec.structs.replace(first, reason=f"confirmed by fresh processes: {second.change}")
    seen = (
        "the second sitting failed" if failed else f"then {second.change or 'nothing'}" if second else "not seen again"
    )
    return msgspec.structs.replace(
        first, verdict=Verdict.INCONCLUSIVE, reason=f"not confirmed by fresh processes: first {first.change}, {seen}"
    )


def missing(cell: str, metric: str, kind: str, base: Figure, head: Figure) -> Row:
    """INCOMPARABLE for want of a side."""
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
    binary = all(value in (0, 1) for value in (*before, *after))
    if binary:
        flips = mcnemar(before, after) if sign < 0 else mcnemar(after, before)
        moved = f"{flips.lost} lost, {flips.won} won, p = {flips.p_worse:.3g}"
        if worse > limit and flips.p_worse < alpha:
            return Verdict.REGRESSED, moved
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
    """+1 where more is worse, −1 where less is worse, 0 where neither is."""
    direction: Direction = METRICS[metric].direction if metric in METRICS else "none"
    return {"lower": 1, "higher": -1, "none": 0}[direction]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(map(float, values))
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
