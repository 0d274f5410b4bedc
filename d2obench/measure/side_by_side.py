"""Measures windows of decode steps: several caches in one process decode in turn.

:mod:`d2obench.measure.samples` says what a window is and how windows lie.

A cache is prefilled once and can then be moved to any step of its generation: back to the beginning by restoring a
snapshot that was taken there, and forward by :meth:`Request.skip_to`, after which its sizes are right and its contents
are placeholders. The snapshot of a cache that evicts is a copy, so such a cache takes twice its memory. A cache that
only grows needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch

from d2obench.cpu import memory as host_memory
from d2obench.measure.clock import Clock
from d2obench.measure.counters import StepCounts, count_decode
from d2obench.measure.disturbance import Load, load, window_flags
from d2obench.measure.finite import require_finite
from d2obench.measure.memory import GarbageCollection, live_bytes
from d2obench.measure.nvml import gpu_flags
from d2obench.measure.phases import GROUP_STEPS, GROUPS, Request, WarmUp, until_stable
from d2obench.measure.samples import RoundOfWindows, Window


def read_load() -> Load:
    """The counters of the system, including how long the threads of this process have waited for a CPU."""
    return load(waits=True)


class Rewindable(Request, Protocol):
    """The methods that a session needs in addition to those of :class:`Request`."""

    def snapshot(self, decode_only: bool = False) -> Any: ...
    def restore(self, saved: Any) -> None: ...


class HeldCache:
    """A session that has read and compressed its prompt and can decode any window of its generation.

    Args:
        session: prefilled and compressed.
        first: the first token of each sequence, int64 ``[B]``.

    Raises:
        ModelError: the session can't return to an earlier step.
    """

    def __init__(self, session: Rewindable, first: torch.Tensor) -> None:
        self.session, self._first = session, first
        self._beginning = session.snapshot(decode_only=True)
        self._at, self._token = 0, first
        self._logits = torch.zeros(0)
        """Of the last step."""

    def go_to(self, step: int) -> None:
        """Moves to decode step ``step`` of the generation; runs at most one step."""
        if step < self._at:
            self.session.restore(self._beginning)
            self._at, self._token = 0, self._first
        if step > self._at == 0:  # a policy may compress in its first step, which can't be skipped therefore
            self._step()
        if step > self._at:
            self.session.skip_to(step - self._at)
            self._at = step

    def decode(self, steps: int, clock: Clock) -> list[float]:
        """Runs decode steps. Returns ``steps + 1`` times in seconds: before the first and after each.

        Raises:
            ModelError: the logits are not finite; names the first layer where this happened.
        """
        clock.start()
        stamps = [clock.stamp()]
        for _ in range(steps):
            self._step()
            stamps.append(clock.stamp())
        times = clock.read(stamps)
        require_finite(self._logits, "of a decode step", self.session)
        return times

    def count(self) -> tuple[StepCounts, int]:
        """Counts the operators of the second decode step, then frees the session; this object can't be used afterwards.

        Returns:
            The counts, and the bytes of all tensors that were freed.
        """
        self.go_to(0)
        with torch.inference_mode():
            counts = count_decode(self.session, self._token)
        del self._beginning, self._first, self._token, self._logits
        before = live_bytes()
        self.session.close()
        del self.session
        return counts, before - live_bytes()

    def close(self) -> None:
        """Frees the cache and the snapshot of its beginning."""
        self._beginning = None
        self.session.close()

    def _step(self) -> None:
        self._logits = self.session.step(self._token)
        self._token = self._logits.argmax(-1)
        self._at += 1


def hold(
    session_factory: Callable[[], Rewindable], prompts: list[list[int]], steps: int, *, clock: Clock, within: float
) -> tuple[HeldCache, WarmUp]:
    """Prefills a cache that will decode in turn with others, and warms up its decode steps.

    Args:
        session_factory: makes the session.
        prompts: token ids of each sequence.
        steps: decode steps of the generation.
        clock: of the session's device.
        within: how far the medians of two successive groups of steps may be apart, relative to the later one.

    Raises:
        ModelError: the session can't return to an earlier step or can't skip steps, or its logits are not finite.
    """
    session = session_factory()
    try:
        with torch.inference_mode():
            logits = session.prefill(prompts)
            session.compress()
            require_finite(logits, "after the prompt", session, prompts)
            held = HeldCache(session, logits.argmax(-1))
            if logits.device.type == "cpu":
                host_memory.release()
            warm = until_stable(_medians(held, steps, clock), within)
            held.go_to(0)
            held.go_to(min(2, steps))  # raises here, and not between windows, where the session can't skip steps
            return held, warm
    except BaseException:
        session.close()
        raise


def decode_in_turn(
    caches: Mapping[str, HeldCache],
    rounds: Sequence[RoundOfWindows],
    *,
    process: int,
    lead: int,
    steps: int,
    clock: Clock,
    origin: float,
    read_load: Callable[[], Load] = read_load,
    read_gpu: Callable[[], tuple[float | None, ...]] | None = None,
    cores: int | None = None,
) -> list[tuple[str, Window]]:
    """Measures rounds of windows.

    Args:
        caches: by name.
        rounds: what to measure.
        process: number of this process within its group.
        lead, steps: of a window, see :class:`d2obench.measure.samples.WindowPlan`.
        clock: of the device.
        origin: the time, by ``clock``, from which ``Window.at_s`` counts.
        read_load: the counters of the system.
        read_gpu: one row of the driver's columns (``d2obench.measure.nvml.COLUMNS``), on a GPU.
        cores: of the machine.

    Returns:
        For each cache of each round, in the order of measurement, its name and its window.
    """
    # 1. Measure. Between windows only counters are read; everything else waits until the last window is over.
    taken: list[tuple[RoundOfWindows, int, list[float], tuple[Load, Load], list[str]]] = []
    GarbageCollection.begin_timing()
    try:
        with torch.inference_mode():
            for round_ in rounds:
                for place, name in enumerate(round_.order):
                    caches[name].go_to(round_.start)
                    gpu = [(0.0, *read_gpu())] if read_gpu else []
                    before = read_load()
                    times = caches[name].decode(lead + steps, clock)
                    after = read_load()
                    gpu += [(0.0, *read_gpu())] if read_gpu else []
                    taken.append((round_, place, times, (before, after), gpu_flags(gpu, 0.0, 0.0)))
    finally:
        GarbageCollection.end_timing()
    # 2. Flags of disturbances: a short window is judged together with its neighbours.
    windows = []
    flags = window_flags([readings for _, _, _, readings, _ in taken], cores)
    # 3. From time stamps to steps.
    for (round_, place, times, (before, after), slowed), words in zip(taken, flags, strict=True):
        gaps = [b - a for a, b in pairwise(times)]
        window = Window(
            process=process,
            sweep=round_.sweep,
            depth=round_.depth,
            attempt=round_.attempt,
            order=place,
            start=round_.start + lead,
            at_s=times[0] - origin,
            lead_s=gaps[:lead],
            step_s=gaps[lead:],
            load=_difference(before, after),
            flags=[*words, *slowed],
        )
        windows.append((round_.order[place], window))
    return windows


def _medians(held: HeldCache, steps: int, clock: Clock) -> Iterator[float]:
    """Median decode step of successive groups of steps, in seconds."""
    width = min(GROUP_STEPS, steps)
    for _ in range(min(GROUPS, steps // width)):
        yield median(b - a for a, b in pairwise(held.decode(width, clock)))


def _difference(before: Load, after: Load) -> dict[str, float]:
    """By how much the counters advanced, in seconds."""
    pairs = zip(Load._fields, before, after, strict=True)
    return {name: round(b - a, 6) for name, a, b in pairs if a is not None and b is not None}
