"""The samples of a timed cell, as ``samples/<hash>.json`` holds them: whole requests, and windows of decode steps.

**Requests.** A :class:`RequestTrace` holds every raw value of one request.

**Windows.** A prefill takes seconds and a decode step milliseconds, so a comparison that repeats the prefill for every
sample has few samples. Therefore every cache of a group is prefilled once in a process, and then all of them decode the
same positions of the generation: each cache a few steps (a *window*), then the next cache. The windows of all caches at
the same positions are one *round of windows*: they were measured within a second of each other and are compared with
each other.

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

This module needs no torch. :mod:`d2obench.measure.phases` measures requests, :mod:`d2obench.measure.side_by_side`
windows.
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


class RequestTrace(msgspec.Struct):
    """Every raw value of one request. Times are in seconds from the start of prefill; memory is in bytes.

    Args:
        batch: sequences decoded together.
        gen: tokens that each sequence generated.
        prompt_tokens: tokens of all prompts together.
        ttft_s: time to the first token, including compression.
        prefill_s, compress_s: time of these phases.
        decode_s: time of all ``gen - 1`` decode steps: their sum, or the integral where only some were measured.
        e2e_s: the whole request.
        loop_s: the part of the measured decode steps that is spent in the loop around the session.
        step_s: time of every measured decode step.
        marks: ``[t, phase]``, ending with the phase ``end``; ``token`` is when the first token was on the host.
        peaks: phase → metric → bytes.
        kv_bytes, kv_prompt_bytes: bytes of keys and values at the end, and right after the prompt.
        state_bytes: bytes of the policy's state.
        requested, effective: the budget and the part of the prompt that was kept, as ratios.
        kept, held: entries of each layer and sequence after compression and at the end.
        over: whether more entries are kept than the budget allows.
        merged, evicted: number of entries, over all layers.
        tokens_digest: identifies the generated tokens.
        merged_layers, evicted_layers: number of entries of each layer.
        kv_read_bytes: bytes of keys and values that the last decode step has read; None where it reads all of them.
        step_at: the index of each step in ``step_s``; empty where all steps were measured.
        uss_bytes: memory that belongs to this process alone, after the request.
        flags: what disturbed or spoiled the request; set by the runner and by the measurement.
        remarks: why a GPU's faster path was not used.
        decode_path: what executed a decode step, in words.
        instructions: how many a decode step took, on average; None where they are not counted.
        sampler_overhead: the share of one core that sampling took.
        sampled_s: the decode time that follows from a sample of the steps (``timing.decode = "both"``).
        round, process, order: set by the runner: the number of the round and of the group's worker process, from 0, and
            the position in the round.
        timeline, device_timeline: rows ``[t, …]`` with the values of ``timeline_columns`` or ``device_columns``.
        timeline_columns, device_columns: the names of these values.
    """

    batch: int
    gen: int
    prompt_tokens: int
    ttft_s: float
    prefill_s: float
    compress_s: float
    decode_s: float
    e2e_s: float
    loop_s: float
    step_s: list[float]
    marks: list[tuple[float, str]]
    peaks: dict[str, dict[str, int]]
    kv_bytes: int
    kv_prompt_bytes: int
    state_bytes: int
    requested: float | None
    effective: float
    kept: list[list[float]]
    held: list[list[float]]
    over: bool
    merged: int
    evicted: int
    tokens_digest: str
    merged_layers: list[int] = []
    evicted_layers: list[int] = []
    kv_read_bytes: int | None = None
    step_at: list[int] = []
    uss_bytes: int | None = None
    flags: list[str] = []
    remarks: list[str] = []
    decode_path: str = ""
    instructions: float | None = None
    sampler_overhead: float | None = None
    sampled_s: float | None = None
    round: int = 0
    process: int = 0
    order: int = 0
    timeline: list[list[float | None]] = []
    timeline_columns: tuple[str, ...] = ()
    device_timeline: list[list[float | None]] = []
    device_columns: tuple[str, ...] = ()


class Window(msgspec.Struct, omit_defaults=True):
    """One window of one cache.

    Args:
        process: which worker process of the group it was measured in, from 0.
        sweep: which sweep of that process it belongs to.
        depth: which of the plan's depths it lies at.
        attempt: 0 the first time, 1 when its round of windows was measured again after a disturbance, and so on.
        order: its position in its round of windows.
        start: index of its first decode step that counts; step 0 reads the first generated token.
        at_s: when its first step began, in seconds since the windows of this process began.
        lead_s: seconds of the steps that don't count.
        step_s: seconds of each step that counts.
        load: by how much the system's counters advanced meanwhile, see :class:`d2obench.measure.disturbance.Load`.
        flags: what disturbed it, in words.
        disturbed: whether any window of its round was disturbed. Windows of a round are compared with each other, so
            then all of them are measured again.
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
        """Process, sweep and depth: windows of different caches are compared where these are equal."""
        return self.process, self.sweep, self.depth


class RoundOfWindows(NamedTuple):
    """One window of every cache: where they lie, and in which order the caches decode.

    ``start`` is the first step, those of the lead included; ``attempt`` counts repetitions after a disturbance.
    """

    sweep: int
    depth: int
    start: int
    order: tuple[str, ...]
    attempt: int = 0


class WindowPlan(NamedTuple):
    """Where the windows of one process lie.

    Args:
        total: decode steps of the whole generation.
        steps: steps of a window that count.
        lead: steps of a window before them.
        depths: number of depths.
        sweeps: number of sweeps.
        per_pass: windows at each depth before the caches return to the beginning of the generation.
    """

    total: int
    steps: int
    lead: int
    depths: int
    sweeps: int
    per_pass: int

    @property
    def samples(self) -> bool:
        """Whether less than half of the generation's steps lie in windows, so that most of its time is estimated."""
        return 2 * self.depths * self.per_pass * (self.steps + self.lead) < self.total

    def start(self, sweep: int, depth: int) -> int:
        """The first step of a window, those of the lead included."""
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
        rounds: list[RoundOfWindows] = []
        for first in range(0, self.sweeps, self.per_pass):  # a pass over the generation
            for depth in range(self.depths):
                for sweep in range(first, min(first + self.per_pass, self.sweeps)):
                    order = self.order(cells, len(rounds))
                    rounds.append(RoundOfWindows(sweep, depth, self.start(sweep, depth), order))
        return rounds


def plan_windows(
    total: int,
    step_s: Iterable[float],
    *,
    windows: int,
    window_s: float,
    depths: int,
    most_s: float = math.inf,
) -> WindowPlan:
    """Decides where the windows of one process lie.

    Args:
        total: decode steps of the generation, at least :data:`LEAST_STEPS`.
        step_s: seconds of a decode step of each cache, from its warm-up.
        windows: number of windows of each cache, about.
        window_s: seconds that a window of the fastest cache should take.
        depths: the largest number of depths.
        most_s: seconds that all windows of all caches may take together; fewer are planned where that is too short, but
            at least two.
    """
    # 1. Steps of a window: so many that the fastest cache takes window_s.
    costs = list(step_s)
    steps = max(1, min(max(2, math.ceil(window_s / max(min(costs), 1e-9))), total - LEAD))
    width = steps + LEAD
    # 2. How many windows fit into the generation without overlap, and into the time.
    places = max(1, total // width)
    if math.isfinite(most_s):
        windows = max(2, min(windows, int(most_s / (width * sum(costs)))))
    # 3. As many depths as leave enough sweeps; then as many sweeps as there are windows for.
    depths = max(1, min(depths, windows // SWEEPS, places))
    sweeps = max(1, windows // depths)
    return WindowPlan(total, steps, LEAD, depths, sweeps, min(sweeps, places // depths))


def integrate(total: int, starts: Sequence[int], groups: Sequence[Sequence[float]]) -> float:
    """Seconds of ``total`` decode steps, estimated from the steps measured at a few depths.

    The time of a step is interpolated linearly between the depths, where each depth stands for the mean of its steps at
    their centre, and extrapolated to both ends of the generation. That is exact where it is constant or grows linearly,
    as with the full cache.

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
        position = (i - centres[k]) / (centres[k + 1] - centres[k])
        seconds += levels[k] + position * (levels[k + 1] - levels[k])
    return seconds


class Selected(NamedTuple):
    """The windows from which the figures of a cell are computed, and how many were left out.

    Args:
        windows: in the order of processes, sweeps and depths.
        planned: number of windows in the plan.
        repeated: how often a window was measured again after a disturbance.
        disturbed: number of planned windows that were disturbed in every attempt.
        left_out: whether ``windows`` is without the disturbed ones; false where these are more than half of all.
        disturbances: the flags of the disturbed ones.
    """

    windows: list[Window]
    planned: int
    repeated: int
    disturbed: int
    left_out: bool
    disturbances: list[list[str]]


def select(windows: Iterable[Window]) -> Selected:
    """Selects the first undisturbed attempt at every planned window, and leaves out windows that have none."""
    # 1. The first undisturbed attempt at each place, or else the last one.
    attempts = sorted(windows, key=lambda window: window.attempt)
    best: dict[tuple[int, int, int], Window] = {}
    for window in attempts:
        if window.place not in best or best[window.place].disturbed:
            best[window.place] = window
    # 2. Without the disturbed ones, unless hardly anything would be left.
    planned = [best[place] for place in sorted(best)]
    kept = [window for window in planned if not window.disturbed]
    left_out = 2 * len(kept) >= len(planned)
    return Selected(
        windows=kept if left_out else planned,
        planned=len(planned),
        repeated=len(attempts) - len(planned),
        disturbed=len(planned) - len(kept),
        left_out=left_out,
        disturbances=[window.flags for window in planned if window.disturbed],
    )


def sweep_times(plan: WindowPlan, windows: Iterable[Window]) -> dict[tuple[int, int], float]:
    """Seconds of the whole generation's decode steps in each sweep that is complete, by (process, sweep).

    Args:
        plan: of the windows.
        windows: the selected ones of one cell, at most one at each place.
    """
    sweeps: dict[tuple[int, int], list[Window]] = {}
    for window in sorted(windows, key=lambda window: window.place):
        sweeps.setdefault((window.process, window.sweep), []).append(window)
    return {
        key: integrate(plan.total, [window.start for window in sweep], [window.step_s for window in sweep])
        for key, sweep in sweeps.items()
        if len(sweep) == plan.depths
    }


class Decoded(NamedTuple):
    """The decode steps of a cell that was measured in windows."""

    plan: WindowPlan
    chosen: Selected

    @property
    def seconds(self) -> dict[tuple[int, int], float]:
        """Seconds of the whole generation's decode steps, by (process, sweep), in the order of measurement."""
        return sweep_times(self.plan, self.chosen.windows)


def decoded(samples: Mapping[str, Any]) -> Decoded | None:
    """The windows of a cell, from the content of ``samples/<hash>.json``; None where it has none."""
    if not samples.get("windows") or not samples.get("plan"):
        return None
    return Decoded(WindowPlan(**samples["plan"]), select(msgspec.convert(samples["windows"], list[Window])))


def decode_times(samples: Mapping[str, Any]) -> dict[tuple[str, int, int], float]:
    """Seconds of all decode steps of a cell's generation, by sample.

    Two cells are compared where their keys are equal: there they were measured next to each other. The samples are
    sweeps of windows, or else rounds of whole requests; a key of one kind never equals one of the other. Disturbed
    rounds are left out, like disturbed windows, unless most rounds are.

    Args:
        samples: the content of ``samples/<hash>.json``; may be empty.
    """
    if (windows := decoded(samples)) is not None:
        return {("sweep", *key): seconds for key, seconds in windows.seconds.items()}
    rounds = [trace for trace in samples.get("rounds") or () if isinstance(trace, dict)]
    times = {}
    for trace in undisturbed(rounds, lambda trace: trace.get("flags") or ()):
        if isinstance(trace.get("round"), int) and isinstance(trace.get("decode_s"), int | float):
            times["round", 0, int(trace["round"])] = float(trace["decode_s"])
    return times
