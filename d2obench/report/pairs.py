"""Ratios of two timed cells of one run, paired round by round: decode ÷ streaming, full ÷ library, peak ÷ full.

Those the runner records itself (``speedup`` and the like) are not made again. Cells at batch ``max`` each have a batch
of their own and are not paired here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2obench.policies import YARDSTICKS
from d2obench.record import CellRecord, Value
from d2obench.stats.bootstrap import paired_ratio

FULL, STREAMING = "full", "streaming"
FIRST_TOKEN = ("prefill", "compress")
MEMORY = ("allocated_bytes", "rss_bytes")
"""What a peak is taken of: the first that the rounds have."""
Round = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Round]]


def pairs(cell: CellRecord, others: Sequence[CellRecord], rounds: Rounds) -> dict[str, Value]:
    """The ratios of a cell.

    Args:
        cell: a timed one.
        others: good cells that differ from it in policy and budget only.
        rounds: raw rounds by cell id.
    """
    policy = cell.axes.policy
    found: dict[str, Value | None] = {}
    if cell.axes.batch == "max":
        return {}
    for other in others:
        if other.axes.policy == STREAMING != policy and other.axes.budget == cell.axes.budget:
            found["to_streaming"] = _ratio("to_streaming", cell, rounds[cell.id], rounds[other.id], _decode_s)
        if other.axes.policy == FULL != policy:
            found["prefill_peak_cost"] = _ratio("prefill_peak_cost", cell, rounds[other.id], rounds[cell.id], _peak)
    if policy == FULL:
        rivals = {one.axes.policy: rounds[one.id] for one in others if one.axes.policy in YARDSTICKS}
        for name, theirs in rivals.items():
            ratio = _ratio(f"to_library:{name}", cell, rounds[cell.id], theirs, _decode_s)
            best = found.get("to_library")
            if ratio and ratio.value and (best is None or not best.value or ratio.value < best.value):
                note = f"the fastest of {', '.join(rivals)} is {name}"
                found["to_library"] = Value(ratio.value, ratio.lo, ratio.hi, ratio.n, note)
    return {key: value for key, value in found.items() if value is not None}


def _ratio(
    metric: str, cell: CellRecord, base: Sequence[Round], head: Sequence[Round], take: Callable[[Round], float | None]
) -> Value | None:
    """``head ÷ base`` over the rounds both have."""
    below = {one.get("round"): take(one) for one in base}
    found = [(below.get(one.get("round")), take(one)) for one in head]
    both = [(a, b) for a, b in found if a and b]
    if not both:
        return None
    ratio = paired_ratio([a for a, _ in both], [b for _, b in both], seed=f"{cell.id}:{metric}")
    return Value(*ratio, n=len(both))


def _decode_s(one: Round) -> float | None:
    seconds = one.get("decode_s")
    return float(seconds) if isinstance(seconds, int | float) else None


def _peak(one: Round) -> float | None:
    """The highest memory until the first token."""
    peaks = one.get("peaks")
    phases = [peaks.get(name) or {} for name in FIRST_TOKEN] if isinstance(peaks, dict) else []
    for key in MEMORY:
        known = [phase[key] for phase in phases if isinstance(phase.get(key), int | float)]
        if known:
            return float(max(known))
    return None
