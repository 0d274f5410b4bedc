"""Ratios of two caches that were measured side by side; defined and computed only here.

The runner records the ratios to the full cache, a report adds those to StreamingLLM, to the library's caches and to
D2O's rivals, and a gate compares the same ratios of two revisions. All of them are computed from pairs, because what
slows the machine down for a while slows both sides of a pair. A pair is a round of whole requests; for the time of
decode steps it is a sweep of windows (:mod:`d2obench.measure.samples`) if both caches were measured in windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from d2obench.measure.disturbance import undisturbed
from d2obench.measure.samples import decode_times
from d2obench.record import Value
from d2obench.stats.intervals import paired_ratio

FULL, STREAMING = "full", "streaming"
Round = Mapping[str, Any]
"""One measured request as a run keeps it: ``round``, ``ttft_s``, ``decode_s``, ``e2e_s``, ``peaks``."""
Samples = Mapping[str, Any]
"""The raw values of a cell as a run keeps them: ``rounds``, and where it has any ``windows`` and their ``plan``."""
Figures = Mapping[tuple[str, int, int], float]
"""Figures that were measured beside those of another cell where the keys are the same."""


class Ratio(NamedTuple):
    """How a ratio is formed.

    Args:
        partner: the policy on the other side; empty where the caller chooses it.
        figure: what is compared of a round; None or 0 leaves the round out.
        speedup: True for partner ÷ own (above 1 is better), False for own ÷ partner (a cost, below 1 is better).
        decode: it compares the time of all decode steps, which windows tell better than rounds.
    """

    partner: str
    figure: Callable[[Round], float | None]
    speedup: bool
    decode: bool = False


def seconds(key: str) -> Callable[[Round], float | None]:
    """The time ``key`` of a round."""

    def read(one: Round) -> float | None:
        value = one.get(key)
        return float(value) if isinstance(value, int | float) else None

    return read


def peak_to_first_token(one: Round) -> float | None:
    """The highest memory of a round until its first token: the allocator's where there is one, else the process's."""
    peaks = one.get("peaks")
    phases = [peaks.get(name) or {} for name in ("prefill", "compress")] if isinstance(peaks, dict) else []
    for key in ("allocated_bytes", "rss_bytes"):
        known = [phase[key] for phase in phases if isinstance(phase.get(key), int | float)]
        if known:
            return float(max(known))
    return None


RATIOS: dict[str, Ratio] = {
    "speedup": Ratio(FULL, seconds("decode_s"), True, decode=True),
    "speedup_e2e": Ratio(FULL, seconds("e2e_s"), True),
    "speedup_memory": Ratio(FULL, seconds("decode_s"), True, decode=True),
    "prefill_cost": Ratio(FULL, seconds("ttft_s"), False),
    "prefill_peak_cost": Ratio(FULL, peak_to_first_token, False),
    "to_streaming": Ratio(STREAMING, seconds("decode_s"), True, decode=True),
    "to_library": Ratio("", seconds("decode_s"), True, decode=True),
    "decode_rival": Ratio("", seconds("decode_s"), True, decode=True),
}
"""Every paired ratio of the metric table. ``speedup_memory`` compares each at its own largest batch."""


class Pairs(NamedTuple):
    """Figures of two cells, in the order they were measured; ``successive`` where they are sweeps of windows, which
    follow each other so closely that neighbours may be alike."""

    mine: list[float]
    partner: list[float]
    successive: bool


def pairs(metric: str, mine: Samples, partner: Samples, *, every: bool = False) -> Pairs:
    """The figures of ``mine`` and of ``partner`` where both were measured beside each other and are above 0.

    Args:
        metric: a key of RATIOS.
        mine, partner: raw values of two cells.
        every: take rounds in which the machine was disturbed, too.
    """
    one = RATIOS[metric]
    ours: Figures = decode_times(mine) if one.decode and not every else {}
    theirs: Figures = decode_times(partner) if one.decode and not every else {}
    successive = bool(mine.get("windows")) and bool(ours.keys() & theirs.keys())
    if not ours.keys() & theirs.keys():
        ours, theirs = _of_rounds(mine, one.figure, every), _of_rounds(partner, one.figure, every)
    good = [(ours[key], theirs[key]) for key in ours if key in theirs and min(ours[key], theirs[key]) > 0]
    return Pairs([a for a, _ in good], [b for _, b in good], successive)


def _of_rounds(samples: Samples, figure: Callable[[Round], float | None], every: bool) -> Figures:
    rounds = [one for one in samples.get("rounds") or () if isinstance(one, Mapping)]
    if not every:
        rounds = undisturbed(rounds, lambda one: one.get("flags") or ())
    found = {("round", 0, one.get("round", -1)): figure(one) for one in rounds}
    return {key: value for key, value in found.items() if value}


def ratio(metric: str, mine: Samples, partner: Samples, per: float = 1.0) -> Value | None:
    """One ratio with its interval; None where the two were never measured beside each other.

    Args:
        metric: a key of RATIOS.
        mine: raw values of the cell.
        partner: raw values of the cell it is compared with.
        per: own batch ÷ the partner's batch, where the two differ on purpose.
    """
    found = pairs(metric, mine, partner)
    if not found.mine:
        return None
    ours, theirs = [value / per for value in found.mine], found.partner
    below, above = (ours, theirs) if RATIOS[metric].speedup else (theirs, ours)
    return paired_ratio(below, above, successive=found.successive)


def against_full(mine: Samples, full: Samples, *, batches: tuple[int, int] | None = None) -> dict[str, Value]:
    """What the runner records of a cell beside the full cache.

    Args:
        mine: raw values of the cell.
        full: raw values of the full cache.
        batches: batch of the cell and of the full cache where each ran at its own largest one; then only their
            throughputs can be compared, and equal batch and equal memory are never mixed.
    """
    if batches is not None:
        found = {"speedup_memory": ratio("speedup_memory", mine, full, batches[0] / batches[1])}
    else:
        found = {name: ratio(name, mine, full) for name in ("speedup", "speedup_e2e", "prefill_cost")}
    return {name: value for name, value in found.items() if value is not None}
