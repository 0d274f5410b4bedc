"""Windows of decode steps: caches that live side by side decode a few steps each, in turn.

A prefill takes seconds and a decode step milliseconds, so a comparison that repeats the prefill for every sample has
few samples. Here every cache of a group is prefilled once in a process, and then all of them decode the same positions
of the generation, one *window* of a few steps after the other. The windows of all caches at the same positions are one
*round of windows*: they were measured within a second of each other and are compared with each other.

* A window lasts about a tenth of a second (``timing.window_s``) or longer, in the fastest of the caches. All of them
  make the same number of steps.
* The first step of a window is run and timed but counts in no figure (``lead``). Since this cache last ran, the other
  caches have run, so its data has been evicted from the processor's caches, and a CUDA graph other than the last one
  used must be loaded again. Neither happens when a model serves a single cache.
* The order is ABBA: one round of windows takes the caches in some order, the next one in reverse, and each such pair
  begins with another cache. After ``2 n`` rounds of windows every one of ``n`` caches has had every place twice.
* Windows lie at several *depths*, spread evenly over the generation, so that a growing cache is measured at all its
  sizes. One round of windows from each depth forms a *sweep*: integrated over the depths (:func:`integrate`) it gives
  the time of the whole generation. Sweeps are the samples from which ratios and their intervals are computed.


Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec

from d2obench.measure.disturbance import undisturbed

LEAD = 1
"""Decode steps at the start of a window that do not count."""
SWEEPS = 8
"""Smallest number of sweeps per process, if the generation and the windows allow it."""
LEAST_STEPS = 4
"""Smallest number of decode steps of a generation that can be measured in windows."""
REPEATED = 0.5
"""Largest number of rounds of windows that may be repeated after a disturbance, as a share of those planned."""


class Window(msgspec.Struct, omit_defaults=True):
    """One window of one cache, raw.

    Args:
        process: which worker process of the group it was measured in, from 0.
        sweep: which sweep of that process it belongs to.
        depth: which of the plan's depths it lies at.
        attempt: 0 the first time, 1 when its round of windows was measured again after a disturbance, and so on.
        order: its place in its round of windows.
        start: index of its first decode step that counts; the first token after the prompt's is made by step 0.
        at_s: when its first step began, in seconds since the windows of this process began.
        lead_s: seconds of the steps that don't count.
        step_s: seconds of each step that counts.
        load: what the counters of the system say of the time it took, see :class:`d2obench.measure.disturbance.Load`.
        flags: what disturbed it, in words; empty where nothing did.
        disturbed: whether it, or another window of its round, was disturbed: windows of a round are compared with each
            other, so all of them are measured again.
    """

    process: int
    sweep: int
    depth: int
    attempt: int
    order: int
    start: int
    at_s: float
    lead_s: list[float]
    step_s: list[float]
    load: dict[str, float] = {}
    flags: list[str] = []
    disturbed: bool = False

    @property
    def place(self) -> tuple[int, int, int]:
        """The key shared by the windows of other caches with which this one is compared."""
        return self.process, self.sweep, self.depth


class RoundOfWindows(NamedTuple):
    """One window of every cache: where, and in which order."""

    sweep: int
    depth: int
    start: int
    order: tuple[str, ...]
    attempt: int = 0


class WindowPlan(NamedTuple):
    """The windows of one process, decided before the first of them.

    Args:
        total: decode steps of the whole generation.
        steps: steps of a window that count.
        lead: steps before them.
        depths: how many depths.
        sweeps: how many sweeps.
        per_pass: windows at each depth before the caches go back to the beginning.
    """

    total: int
    steps: int
    lead: int
    depths: int
    sweeps: int
    per_pass: int

    @property
    def samples(self) -> bool:
        """Whether less than half of the generation's steps are decoded, so that the rest is estimated from them."""
        return 2 * self.depths * self.per_pass * (self.steps + self.lead) < self.total

    def start(self, sweep: int, depth: int) -> int:
        """The first step (of the lead) of a window."""
        width = self.steps + self.lead
        free = self.total - self.per_pass * width
        first = round(depth * free / (self.depths - 1)) if self.depths > 1 else free // 2
        return first + (sweep % self.per_pass) * width

    @staticmethod
    def order(cells: Sequence[str], number: int) -> tuple[str, ...]:
        """The order of the ``number``-th round of windows: forwards and backwards in turn (ABBA), each such pair
        beginning with another cache."""
        first = number // 2 % len(cells)
        rotated = (*cells[first:], *cells[:first])
        return rotated if number % 2 == 0 else rotated[::-1]

    def rounds(self, cells: Sequence[str]) -> list[RoundOfWindows]:
        """Every round of windows in the order they are measured."""
        found: list[RoundOfWindows] = []
        for first in range(0, self.sweeps, self.per_pass):
            for depth in range(self.depths):
                for sweep in range(first, min(first + self.per_pass, self.sweeps)):
                    found.append(RoundOfWindows(sweep, depth, self.start(sweep, depth), self.order(cells, len(found))))
        return found


def plan_windows(
    total: int,
    step_s: Iterable[float],
    *,
    windows: int,
    window_s: float,
    depths: int,
    most_s: float = math.inf,
) -> WindowPlan:
    """Decides how the windows of one process lie.

    Args:
        total: decode steps of the generation, at least :data:`LEAST_STEPS`.
        step_s: seconds of a decode step of each cache, as its warm-up has shown.
        windows: windows of each cache, about.
        window_s: how long a window of the fastest cache is to take, in seconds.
        depths: at how many depths they lie at most.
        most_s: seconds that all windows of all caches may take together; fewer are planned until they do, down to two.
    """
    costs = list(step_s)
    steps = max(1, min(max(2, math.ceil(window_s / max(min(costs), 1e-9))), total - LEAD))
    width = steps + LEAD
    places = max(1, total // width)
    if math.isfinite(most_s):
        windows = max(2, min(windows, int(most_s / (width * sum(costs)))))
    depths = max(1, min(depths, windows // SWEEPS, places))
    sweeps = max(1, windows // depths)
    return WindowPlan(total, steps, LEAD, depths, sweeps, min(sweeps, places // depths))


def integrate(total: int, starts: Sequence[int], groups: Sequence[Sequence[float]]) -> float:
    """Seconds of ``total`` decode steps, estimated from the steps measured at a few depths.

    The mean step of each depth, placed at the centre of its measured steps, is joined to the next by a straight line,
    and the outer lines go on to both ends. That is exact for a cost that is constant or grows linearly with the depth,
    as that of the full cache does.

    Args:
        total: decode steps of the whole generation.
        starts: the first measured step at each depth, ascending.
        groups: seconds of the measured steps at each depth.
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


class Selected(NamedTuple):
    """The windows of a cell that its figures are made of, and what became of the others.

    Args:
        windows: in the order of processes, sweeps and depths.
        planned: windows that were to be measured.
        repeated: windows measured again after a disturbance.
        disturbed: planned windows of which no undisturbed measurement came about.
        left_out: whether ``windows`` is without those. They are in it where they are more than half of all.
        disturbances: the flags of those.
    """

    windows: list[Window]
    planned: int
    repeated: int
    disturbed: int
    left_out: bool
    disturbances: list[list[str]]


def select(windows: Iterable[Window]) -> Selected:
    """For each place of the plan its first undisturbed window, or else its last one, which is then left out."""
    found = sorted(windows, key=lambda one: one.attempt)
    best: dict[tuple[int, int, int], Window] = {}
    for one in found:
        if one.place not in best or best[one.place].disturbed:
            best[one.place] = one
    every = [best[place] for place in sorted(best)]
    calm = [one for one in every if not one.disturbed]
    left_out = 2 * len(calm) >= len(every)
    return Selected(
        windows=calm if left_out else every,
        planned=len(every),
        repeated=len(found) - len(every),
        disturbed=len(every) - len(calm),
        left_out=left_out,
        disturbances=[one.flags for one in every if one.disturbed],
    )


def sweep_times(plan: WindowPlan, windows: Iterable[Window]) -> dict[tuple[int, int], float]:
    """Seconds of the whole generation's decode steps, by (process, sweep); only of sweeps with a window at every depth.

    Args:
        plan: of the windows.
        windows: those to use, of one cell; at most one a place.
    """
    found: dict[tuple[int, int], list[Window]] = {}
    for one in sorted(windows, key=lambda one: one.place):
        found.setdefault((one.process, one.sweep), []).append(one)
    return {
        key: integrate(plan.total, [one.start for one in sweep], [one.step_s for one in sweep])
        for key, sweep in found.items()
        if len(sweep) == plan.depths
    }


class Decoded(NamedTuple):
    """The decode steps of a cell that was measured in windows."""

    plan: WindowPlan
    chosen: Selected

    @property
    def seconds(self) -> dict[tuple[int, int], float]:
        """Of the whole generation, by (process, sweep), in the order they were measured."""
        return sweep_times(self.plan, self.chosen.windows)


def decoded(samples: Mapping[str, Any]) -> Decoded | None:
    """What the raw values of a cell (``samples/<hash>.json``) hold in windows; None where it has none."""
    if not samples.get("windows") or not samples.get("plan"):
        return None
    return Decoded(WindowPlan(**samples["plan"]), select(msgspec.convert(samples["windows"], list[Window])))


def decode_times(samples: Mapping[str, Any]) -> dict[tuple[str, int, int], float]:
    """Seconds of all decode steps of a cell's generation, one entry a sample, from the raw values of a run.

    Two cells are compared where their keys are equal: there they were measured side by side. The samples are sweeps,
    or rounds of whole requests (as in every run before windows); the two have keys that never meet. Disturbed rounds
    are left out unless hardly any others are there, as disturbed windows are.

    Args:
        samples: what ``samples/<hash>.json`` holds; may be empty.
    """
    if (found := decoded(samples)) is not None:
        return {("sweep", *key): seconds for key, seconds in found.seconds.items()}
    rounds = [one for one in samples.get("rounds") or () if isinstance(one, dict)]
    times = {}
    for one in undisturbed(rounds, lambda one: one.get("flags") or ()):
        if isinstance(one.get("round"), int) and isinstance(one.get("decode_s"), int | float):
            times["round", 0, int(one["round"])] = float(one["decode_s"])
    return times
