"""Detects what disturbed a measurement: other load, stolen CPU time, an exhausted quota, a GPU with reduced clocks.

Disturbances are detected from system counters and never from the measured time itself, so that no sample is left out
because it is slow. A disturbed request or window of steps gets flags, which are short texts. Flagged samples are
measured again, up to a limit, or else left out of timing figures. They stay in the recorded samples, and the row says
how many there are.

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
        texts = []
        if self.other is not None and self.other >= OTHER:
            texts.append(f"other load {self.other:.0%}".replace("%", " %"))
        if self.stolen is not None and self.stolen >= STOLEN:
            texts.append(f"stolen CPU {self.stolen:.0%}".replace("%", " %"))
        if self.waited is not None and self.waited >= WAITED:
            texts.append(f"waited for a CPU {self.waited:.0%}".replace("%", " %"))
        if self.throttled_s > 0:
            texts.append(f"CPU quota used up ({self.throttled_s:.1f} s)")
        return texts


def load(root: Path = Path("/"), *, waits: bool = False) -> Load:
    """The counters now, as the process that does the work sees them.

    Args:
        root: where ``proc`` and ``sys`` are.
        waits: whether to read ``waited``, too. It shows other load only where this process runs no more threads than
            there are CPUs, as in windows; in a request, the threads that sample its memory may have to wait as well.
    """
    busy, stolen = _cpu(root)
    waited = _waited(root) if waits else None
    return Load(time.monotonic(), busy, stolen, time.process_time(), _throttled(root), waited)


def between(before: Load, after: Load, cores: int | None = None) -> Disturbance:
    """The part of the machine's CPU time that other work took between two readings.

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

    Counters in ticks can't be read over a short window. They are read over a stretch of at least :data:`STRETCH_S`,
    which is the window and as many of its neighbours as needed. The other counters are read over the window itself.

    Args:
        readings: the counters before and after each window.
        cores: of the machine.
    """
    flags = []
    for place, (before, after) in enumerate(readings):
        # 1. The stretch grows by a window on both sides until it is long enough.
        first = last = place
        while readings[last][1].wall - readings[first][0].wall < STRETCH_S and (first, last) != (0, len(readings) - 1):
            first, last = max(0, first - 1), min(len(readings) - 1, last + 1)
        # 2. Other load and stolen time from the stretch, unless the window alone is long enough to tell.
        stretch = between(readings[first][0], readings[last][1], cores)
        own = between(before, after, cores)
        other = stretch.other if own.other is None else own.other
        stolen = stretch.stolen if own.stolen is None else own.stolen
        flags.append(Disturbance(other, stolen, own.throttled_s, own.waited).flags())
    return flags


def is_disturbance(flag: str) -> bool:
    """Whether a flag says that the machine was disturbed."""
    return flag.startswith(KINDS)


def undisturbed(samples: Sequence[T], flags: Callable[[T], Iterable[str]]) -> list[T]:
    """The undisturbed ones of ``samples``; all of them if fewer than half are undisturbed, so that there still is a
    figure.

    Args:
        samples: requests or windows.
        flags: returns the flags of one of them.
    """
    kept = [sample for sample in samples if not any(map(is_disturbance, flags(sample)))]
    return kept if 2 * len(kept) >= len(samples) else list(samples)


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
            counters = dict(line.split() for line in file)
        return int(counters.get("throttled_usec", 0)) * 1e-6
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
