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
    """Time of ``total`` steps from windows of measured ones: each window's mean, joined by straight lines.

    A line through a window's centre is exact for a cost that grows linearly with the depth, which is the full
    cache's; before the first and after the last centre it goes on level.
    """
    centres = [start + (len(group) - 1) / 2 for start, group in zip(starts, groups, strict=True)]
    levels = [fmean(group) for group in groups]
    seconds, k = 0.0, 0
    for i in range(total):
        while k < len(centres) and centres[k] < i:
            k += 1
        if k in (0, len(centres)):
            seconds += levels[min(k, len(centres) - 1)]
        else:
            share = (i - centres[k - 1]) / (centres[k] - centres[k - 1])
            seconds += levels[k - 1] + share * (levels[k] - levels[k - 1])
    return seconds
