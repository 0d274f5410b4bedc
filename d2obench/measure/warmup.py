"""Warming up: in a process, the first decode steps of a shape compile, choose kernels, touch pages and raise clocks.

One request is decoded a few steps at a time until the medians of two successive windows of steps agree. Both lie at
nearly the same depth, so that the growth of a cache does not make them differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

from d2obench.measure.clock import Clock
from d2obench.measure.phases import Request

WINDOW, WINDOWS = 4, 8
"""Decode steps of a window, and how many windows at most."""
MOST_TOKENS = 1 + WINDOW * WINDOWS


class WarmUp(NamedTuple):
    """Median decode step of each window in seconds, and whether the last two agreed."""

    decode_s: list[float]
    stable: bool


def warm_up(
    session_factory: Callable[[], Request], prompts: list[list[int]], gen: int, *, clock: Clock, within: float
) -> WarmUp:
    """Runs one request until its decode is stable.

    Args:
        session_factory: makes the session.
        prompts: token ids of each sequence.
        gen: largest number of tokens; with fewer than two windows of steps it can't be determined, and counts as not
            stable.
        clock: of the session's device.
        within: how far two successive medians may be apart, relative to the later one.
    """
    session = session_factory()
    try:
        with torch.inference_mode():
            logits = session.prefill(prompts)
            session.compress()
            return until_stable(_windows(session, logits.argmax(-1), min(gen, MOST_TOKENS) - 1, clock), within)
    finally:
        session.close()


def until_stable(medians: Iterator[float], within: float) -> WarmUp:
    """Consumes medians until two successive ones agree, or none is left."""
    found: list[float] = []
    for one in medians:
        found.append(one)
        if len(found) > 1 and abs(found[-1] - found[-2]) <= within * found[-1]:
            return WarmUp(found, True)
    return WarmUp(found, False)


def _windows(session: Request, tokens: torch.Tensor, steps: int, clock: Clock) -> Iterator[float]:
    for _ in range(steps // WINDOW):
        clock.start()
        stamps = [clock.stamp()]
        for _ in range(WINDOW):
            tokens = session.step(tokens).argmax(-1)
            stamps.append(clock.stamp())
        times = clock.read(stamps)
        yield median(b - a for a, b in pairwise(times))
