"""Ratios of two caches that were measured in turns; all of them are defined and computed here.

The runner records the ratios to the full cache. A report adds those to StreamingLLM, to the library's caches and to
D2O's rivals, and a gate compares the ratios of two revisions. All are computed from pairs, because whatever slows down
the machine for a while slows down both sides of a pair. A pair is a round of whole requests. For the time of decode
steps it is a sweep of windows (:mod:`d2obench.measure.samples`) if both caches were measured in windows.
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
"""One measured request as a run stores it: ``round``, ``ttft_s``, ``decode_s``, ``e2e_s``, ``peaks``."""
Samples = Mapping[str, Any]
"""The raw values of a cell as a run stores them: ``rounds``, and ``windows`` with their ``plan`` if it has any."""
Figures = Mapping[tuple[str, int, int], float]
"""Figures of one cell; those of another cell with the same key were measured beside them."""


class Ratio(NamedTuple):
    """How a ratio is formed.

    Args:
        partner: the policy on the other side; empty if the caller chooses it.
        figure: the figure of a round that is compared; a round without it, or with 0, is left out.
        speedup: True for partner ÷ own, where more than 1 is better; False for own ÷ partner, a cost.
        decode: whether it compares the time of all decode steps, which windows measure better than rounds.
    """

    partner: str
    figure: Callable[[Round], float | None]
    speedup: bool
    decode: bool = False


def seconds(key: str) -> Callable[[Round], float | None]:
    """A function that reads the time ``key`` of a round."""

    def read(one: Round) -> float | None:
        value = one.get(key)
        return float(value) if isinstance(value, int | float) else None

    return read


def peak_to_first_token(one: Round) -> float | None:
    """The highest memory of a round until its first token: that of the GPU's allocator if there is one, otherwise that
    of the process."""
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
"""Every paired ratio of the metric table. ``speedup_memory`` compares two caches, each with its own largest batch."""


class Pairs(NamedTuple):
    """Figures of two cells in the order in which they were measured. ``successive`` says that they are sweeps of
    windows, which follow each other so closely that neighbours may be alike."""

    mine: list[float]
    partner: list[float]
    successive: bool


def pairs(metric: str, mine: Samples, partner: Samples, *, every: bool = False) -> Pairs:
    """The figures of ``mine`` and ``partner`` that were measured beside each other and are above 0.

    Args:
        metric: a key of RATIOS.
        mine, partner: raw values of two cells.
        every: whether to include rounds in which the machine was disturbed.
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
    """One ratio with its interval; None if the two cells were never measured beside each other.

    Args:
        metric: a key of RATIOS.
        mine: raw values of the cell.
        partner: raw values of the cell it is compared with.
        per: own batch ÷ the partner's batch, if the two differ on purpose.
    """
    found = pairs(metric, mine, partner)
    if not found.mine:
        return None
    ours, theirs = [value / per for value in found.mine], found.partner
    below, above = (ours, theirs) if RATIOS[metric].speedup else (theirs, ours)
    return paired_ratio(below, above, successive=found.successive)


def against_full(mine: Samples, full: Samples, *, batches: tuple[int, int] | None = None) -> dict[str, Value]:
    """The ratios to the full cache that the runner records.

    Args:
        mine: raw values of the cell.
        full: raw values of the full cache.
        batches: the batches of the cell and of the full cache if each ran with its own largest batch. Then only their
            throughputs are compared, so that equal batch and equal memory are not mixed up.
    """
    if batches is not None:
        found = {"speedup_memory": ratio("speedup_memory", mine, full, batches[0] / batches[1])}
    else:
        found = {name: ratio(name, mine, full) for name in ("speedup", "speedup_e2e", "prefill_cost")}
    return {name: value for name, value in found.items() if value is not None}
