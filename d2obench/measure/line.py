"""The line of a request: its stamps in the order they were taken, the phases they open, and the samples beside them."""

from __future__ import annotations

from typing import Any

from d2obench.measure.clock import Clock
from d2obench.measure.memory import PHASES, MemoryProbe
from d2obench.measure.sampler import Sampler


class Line:
    """Stamps and marks of one request; 0 is its first stamp."""

    def __init__(self, clock: Clock, memory: MemoryProbe) -> None:
        self._clock, self.memory = clock, memory
        self.stamps: list[Any] = []
        self.marks: list[tuple[int, str]] = []
        self.phase: str | None = None
        self.origin = 0.0

    def stamp(self) -> int:
        self.stamps.append(self._clock.stamp())
        return len(self.stamps) - 1

    def mark(self, phase: str) -> None:
        """Enters ``phase``; entering it twice is once."""
        if phase != self.phase:
            self.memory.enter(phase if phase in PHASES else None)
            self.phase = phase
            self.marks.append((self.stamp(), phase))

    def read(self) -> list[float]:
        """Seconds of all stamps from the first one."""
        times = self._clock.read(self.stamps)
        self.origin = times[0]
        return [t - self.origin for t in times]

    def samples(self, sampler: Sampler | None) -> list[list[float | None]]:
        """A sampler's rows on the line of the stamps."""
        return [[(row[0] or 0.0) - self.origin, *row[1:]] for row in sampler.rows] if sampler else []
