"""A long generation measured at a few depths: which steps are run, and what the whole would have taken."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple


class Sampled(NamedTuple):
    """Windows of ``steps`` decode steps at ``depths`` depths of the generation, the first and last step among them."""

    depths: int
    steps: int


def windows(total: int, sampled: Sampled) -> list[int]:
    """First steps of the windows, evenly spread over ``total`` decode steps; empty where they would cover it all."""
    depths, steps = sampled
    if depths * (steps + 1) >= total:
        return []
    last = total - steps
    return [round(i * last / (depths - 1)) for i in range(depths)] if depths > 1 else [last // 2]


def integrate(total: int, starts: Sequence[int], groups: Sequence[Sequence[float]]) -> float:
    """Time of ``total`` steps from windows of measured ones.

    The means of the windows, each at its centre, are joined by straight lines, the outer ones going on to both ends:
    exact for a cost that does not change or grows linearly with the depth, as the full cache's does.
    """
    centres = [start + (len(group) - 1) / 2 for start, group in zip(starts, groups, strict=True)]
    levels = [fmean(group) for group in groups]
    if len(levels) == 1:
        return total * levels[0]
    seconds, k = 0.0, 0
    for i in range(total):
        while k < len(centres) - 2 and centres[k + 1] < i:
            k += 1
        share = (i - centres[k]) / (centres[k + 1] - centres[k])
        seconds += levels[k] + share * (levels[k + 1] - levels[k])
    return seconds
