"""Clocks whose time stamps have the same meaning on a CPU and on a GPU.

On a GPU a stamp is an event in the current stream: it records when the device reached that point. The host does not
wait for it; all stamps of a sample are read together after the sample, with one synchronisation. All times are seconds
on the host's clock, so that phases, memory samples and power samples have the same time axis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from d2obench.measure.disturbance import Load


class Clock(Protocol):
    """The methods of a clock."""

    def now(self) -> float:
        """The host's clock, in seconds."""

    def start(self) -> None:
        """Waits until the device is idle; every sample begins with this call."""

    def stamp(self) -> Any:
        """A time stamp for the present point in the device's work; does not wait for the device."""

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """The times of ``stamps`` in seconds, given in the order they were taken; waits for the last one."""


class HostClock:
    """The clock of devices whose work is done when the call returns.

    Args:
        now: seconds from any origin; tests pass a scripted one.
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
    """The clock of a CUDA device: events, whose times are converted to the host's clock at each ``start``."""

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
        # elapsed_time() returns milliseconds as float32, which gets coarse over long spans. So the short times from
        # one event to the next are added up.
        before, t = self._origin
        seconds = []
        for event in stamps:
            t += before.elapsed_time(event) * 1e-3
            before = event
            seconds.append(t)
        return seconds


class SharedClock:
    """The clock of one rank where several processes (ranks) share a model.

    A sample begins when every rank is ready, so that no rank waits for another one while it is timed. Every rank reads
    the times of rank 0, so that all ranks decide alike, for example how long to warm up.

    Args:
        own: this rank's clock.
        device: a device whose tensors can be sent between ranks.
    """

    def __init__(self, own: Clock, device: Any) -> None:
        self._own, self._device = own, device

    def now(self) -> float:
        return self._own.now()

    def start(self) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1, device=self._device))  # a barrier that works in NCCL and in Gloo
        self._own.start()

    def stamp(self) -> Any:
        return self._own.stamp()

    def read(self, stamps: Sequence[Any]) -> list[float]:
        import torch
        import torch.distributed as dist

        times = torch.tensor(self._own.read(stamps), dtype=torch.float64, device=self._device)
        dist.broadcast(times, 0)
        shared: list[float] = times.tolist()
        return shared


def clock_for(device: torch.device) -> Clock:
    """The clock of a device: events on CUDA, the host's clock on a CPU; elsewhere the host's clock, which waits for the
    device at every stamp."""
    if device.type == "cuda":
        return CudaClock(device)
    if device.type == "cpu":
        return HostClock()
    import torch

    return HostClock(sync=lambda: torch.accelerator.synchronize(device))


def shared_clock(clock: Clock, model: Any) -> Clock:
    """``clock`` itself, or a :class:`SharedClock` around it where several ranks share ``model``."""
    return SharedClock(clock, model.device) if _is_shared(model) else clock


def shared_load(load: Load, model: Any) -> Load:
    """``load`` with the CPU time of all ranks that share ``model`` counted as this process's own.

    Otherwise each rank would report the others as a disturbance.
    """
    if not _is_shared(model):
        return load
    import torch
    import torch.distributed as dist

    own = torch.tensor(load.own, dtype=torch.float64, device=model.device)
    dist.all_reduce(own)
    return load._replace(own=float(own))


def _is_shared(model: Any) -> bool:
    return (getattr(model, "tp_size", None) or 1) > 1
