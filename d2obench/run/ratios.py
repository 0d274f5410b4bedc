"""A policy against the full cache: ratios of times measured in the same round of one interleaved group.

With equal batch: ``speedup``, ``speedup_e2e`` and ``prefill_cost``. With batch ``max`` each runs at its own largest
batch, so throughputs are compared instead (``speedup_memory``), and the two kinds are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from d2obench.record import Value
from d2obench.stats.bootstrap import paired_ratio

FULL = "full"
Round = Mapping[str, Any]


def against_full(
    name: str, mine: Iterable[Round], full: Iterable[Round], *, batches: tuple[int, int] | None = None
) -> dict[str, Value]:
    """The ratios of one cell.

    Args:
        name: the cell's id; it seeds the resampling.
        mine, full: raw rounds of the cell and of the full cache; only rounds that both have are used.
        batches: batch of the cell and of full where they differ on purpose (batch ``max``).
    """
    base = {one["round"]: one for one in full}
    pairs = [(base[one["round"]], one) for one in mine if one["round"] in base]

    def ratio(metric: str, time: Callable[[Round], float], above_full: bool, scale: float = 1.0) -> dict[str, Value]:
        times = [(time(theirs), time(ours) / scale) for theirs, ours in pairs]
        theirs, ours = ([one[i] for one in times if min(one) > 0] for i in (0, 1))
        if not theirs:
            return {}
        found = paired_ratio(*((ours, theirs) if above_full else (theirs, ours)), seed=f"{name}:{metric}")
        return {metric: Value(found.value, found.lo, found.hi, len(theirs))}

    if batches is not None:
        return ratio("speedup_memory", decode_s, True, batches[0] / batches[1])
    return {
        **ratio("speedup", decode_s, True),
        **ratio("speedup_e2e", lambda one: float(one["e2e_s"]), True),
        **ratio("prefill_cost", lambda one: float(one["ttft_s"]), False),
    }


def decode_s(one: Round) -> float:
    """Seconds of all decode steps of a round, measured or integrated."""
    return float(one["decode_s"])
