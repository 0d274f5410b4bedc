"""Time stamps that mean the same on a CPU and on a GPU.

A stamp taken on a GPU is an event on the current stream: it says when the device got there, costs the host no wait,
and is read once, after the sample, with one synchronisation. All times come out in seconds on the host's clock, so
that phases, memory samples and power samples lie on one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Clock(Protocol):
    """What a measurement needs of time."""

    def now(self) -> float:
        """The host's clock, seconds."""

    def start(self) -> None:
        """Waits until the device is idle; every sample begins here."""

    def stamp(self) -> Any:
        """A mark in the stream of work; never waits."""

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Seconds of ``stamps``, which must stand in the order they were taken; waits for the last one."""


class HostClock:
    """For devices whose work is done when the call returns.

    Args:
        now: seconds from any origin; tests give a scripted one.
        sync: called before each stamp, for devices that run behind the host and have no event timer.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, sync: Callable[[], None] | None = None) -> None:
        self._now, self._sync = now, sync

    def now(self) -> float:
        return self._now()

    def start(self) -> None:
        if self._sync:
            self._sync()

    def stamp(self) -> float:
        if self._sync:
            self._sync()
        return self._now()

    def read(self, stamps: Sequence[float]) -> list[float]:
        return list(stamps)


class CudaClock:
    """Events of one CUDA device; their origin is tied to the host's clock at ``start``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._origin: tuple[Any, float] | None = None

    def now(self) -> float:
        return time.perf_counter()

    def start(self) -> None:
        import torch

        torch.cuda.synchronize(self._device)
        origin = self.stamp()
        origin.synchronize()
        self._origin = origin, time.perf_counter()

    def stamp(self) -> torch.cuda.Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self, stamps: Sequence[Any]) -> list[float]:
        if not stamps:
            return []
        if self._origin is None:
            raise RuntimeError("a clock must be started before its stamps are read")
        stamps[-1].synchronize()
        before, t = self._origin
        seconds = []
        for event in stamps:  # from event to event: elapsed_time is a float32 of milliseconds and coarse when long
            t += before.elapsed_time(event) * 1e-3
            before = event
            seconds.append(t)
        return seconds


def clock_for(device: torch.device) -> Clock:
    """The clock of a device: events on CUDA, the host's clock on a CPU, the host's clock after a wait elsewhere."""
    if device.type == "cuda":
        return CudaClock(device)
    if device.type == "cpu":
        return HostClock()
    import torch

    return HostClock(sync=lambda: torch.accelerator.synchronize(device))
