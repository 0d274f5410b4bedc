"""Detects what disturbed a measurement: other load, stolen CPU time, an exhausted quota, a GPU with reduced clocks.

Disturbances are detected from system counters and never from the measured time itself, so that no sample is left out
because it is slow. Each reading becomes flags, in words, of a request or a window of steps. Flagged samples are
measured again, up to a limit, and otherwise left out of timing figures; they stay in the recorded samples, and the row
says how many there are.

``other load`` and ``stolen CPU`` come from ``/proc/stat``, which counts in ticks of 10 ms, so a window of a tenth of a
second is judged together with its neighbours (:func:`window_flags`). ``waited for a CPU`` counts nanoseconds: the time
during which threads of this process were ready to run but did not run (``/proc/self/task/*/schedstat``). For a GPU, the
driver tells why its clocks are reduced (:func:`d2obench.measure.nvml.gpu_flags`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

_TICK = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
OTHER, STOLEN, WAITED = 0.10, 0.02, 0.05
"""Share of the machine's CPU time from which a disturbance is flagged."""
KINDS = ("other load", "stolen CPU", "waited for a CPU", "CPU quota used up", "GPU ")
"""Prefixes of flags that describe a disturbance; other flags say what is wrong with the request, not the machine."""
STRETCH_S = 0.5
"""Seconds over which counters in ticks are read; shorter windows are judged together with their neighbours."""
T = TypeVar("T")


class Load(NamedTuple):
    """Counters of CPU seconds; 0 if the system does not provide them.

    Args:
        wall: the clock.
        busy: CPU time of all CPUs since boot.
        stolen: time taken by the hypervisor since boot.
        own: CPU time of this process.
        throttled: time during which the CPU quota of this control group was exhausted.
        waited: time during which threads of this process were ready to run but did not; None if unknown.
    """

    wall: float
    busy: float
    stolen: float
    own: float
    throttled: float
    waited: float | None = None


class Disturbance(NamedTuple):
    """Shares of the machine's CPU time between two readings; None if unknown."""

    other: float | None
    stolen: float | None
    throttled_s: float
    waited: float | None = None

    def flags(self) -> list[str]:
        """A text for each value that is above its limit."""
        found = []
        if self.other is not None and self.other >= OTHER:
            found.append(f"other load {self.other:.0%}".replace("%", " %"))
        if self.stolen is not None and self.stolen >= STOLEN:
            found.append(f"stolen CPU {self.stolen:.0%}".replace("%", " %"))
        if self.waited is not None and self.waited >= WAITED:
            found.append(f"waited for a CPU {self.waited:.0%}".replace("%", " %"))
        if self.throttled_s > 0:
            found.append(f"CPU quota used up ({self.throttled_s:.1f} s)")
        return found


def load(root: Path = Path("/"), *, waits: bool = False) -> Load:
    """The counters now, as the process that does the work sees them.

    Args:
        root: where ``proc`` and ``sys`` are.
        waits: read ``waited``, too. It tells of others only where this process runs no more threads than there are
            CPUs, as in windows; while a request is measured, the threads that sample its memory wait for their turn.
    """
    busy, stolen = _cpu(root)
    waited = _waited(root) if waits else None
    return Load(time.monotonic(), busy, stolen, time.process_time(), _throttled(root), waited)


def between(before: Load, after: Load, cores: int | None = None) -> Disturbance:
    """The share of the machine that other work took between two readings.

    ``other`` and ``stolen`` are None for a time shorter than 20 ticks of the counters (0.2 s).
    """
    cores = cores or os.cpu_count() or 1
    whole = (after.wall - before.wall) * cores
    throttled = max(0.0, after.throttled - before.throttled)
    waited = None
    if before.waited is not None and after.waited is not None and whole > 0:
        waited = min(1.0, max(0.0, (after.waited - before.waited) / whole))
    if not after.busy or whole < 20 * _TICK * cores:
        return Disturbance(None, None, throttled, waited)
    other = (after.busy - before.busy) - (after.own - before.own) - 2 * _TICK * cores
    return Disturbance(
        min(1.0, max(0.0, other / whole)),
        min(1.0, max(0.0, (after.stolen - before.stolen) / whole)),
        throttled,
        waited,
    )


def window_flags(readings: Sequence[tuple[Load, Load]], cores: int | None = None) -> list[list[str]]:
    """The flags of consecutive windows.

    Each window is judged by the counters over itself, and over a stretch of at least :data:`STRETCH_S` around it, that
    is, itself and as many neighbours as needed, or all of them.
    itself and as many neighbours as that takes, or all there are.

    Args:
        readings: the counters before and after each window.
        cores: of the machine.
    """
    found = []
    for place, (before, after) in enumerate(readings):
        first = last = place
        while readings[last][1].wall - readings[first][0].wall < STRETCH_S and (first, last) != (0, len(readings) - 1):
            first, last = max(0, first - 1), min(len(readings) - 1, last + 1)
        stretch = between(readings[first][0], readings[last][1], cores)
        own = between(before, after, cores)
        other = stretch.other if own.other is None else own.other
        stolen = stretch.stolen if own.stolen is None else own.stolen
        found.append(Disturbance(other, stolen, own.throttled_s, own.waited).flags())
    return found


def is_disturbance(flag: str) -> bool:
    """Whether a flag says that the machine was disturbed."""
    return flag.startswith(KINDS)


def undisturbed(found: Sequence[T], flags: Callable[[T], Iterable[str]]) -> list[T]:
    """The undisturbed ones of ``found``; all of them if fewer than half are undisturbed, so that there still is a
    figure.

    Args:
        found: requests or windows.
        flags: returns the flags of one of them.
    """
    calm = [one for one in found if not any(map(is_disturbance, flags(one)))]
    return calm if 2 * len(calm) >= len(found) else list(found)


def _cpu(root: Path) -> tuple[float, float]:
    """Busy seconds of all CPUs (user, nice, system, irq, softirq) and stolen seconds; proc_stat(5)."""
    try:
        with open(root / "proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0
    if len(ticks) < 8:
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq) * _TICK, steal * _TICK


def _throttled(root: Path) -> float:
    """Seconds this control group's CPU quota was used up (cgroup v2); 0 without one."""
    try:
        with open(root / "sys/fs/cgroup/cpu.stat", encoding="ascii") as file:
            found = dict(line.split() for line in file)
        return int(found.get("throttled_usec", 0)) * 1e-6
    except (OSError, ValueError):
        return 0.0


def _waited(root: Path) -> float | None:
    """Seconds that this process's threads were ready to run and waited for a CPU; proc_pid_schedstat(5)."""
    waited = 0
    try:
        for task in os.scandir(root / "proc/self/task"):
            with open(f"{task.path}/schedstat", encoding="ascii") as file:
                waited += int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return waited * 1e-9
