"""What else went on while a round was timed: other load, a stolen CPU, a used-up quota, a slowed-down GPU.

The words become flags of the round. A flagged round is shown and may be repeated; it is never dropped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from d2obench.measure.nvml import COLUMNS, slowdown_names

_TICK = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
_SLOWDOWN = COLUMNS.index("slowdown") + 1
OTHER, STOLEN = 0.10, 0.02


class Load(NamedTuple):
    """CPU seconds since boot, and of this process; all 0 where the system does not tell."""

    wall: float
    busy: float
    stolen: float
    own: float
    throttled: float


class Disturbance(NamedTuple):
    """Shares of the machine's CPU time during a round; None where they can't be told."""

    other: float | None
    stolen: float | None
    throttled_s: float

    def flags(self) -> list[str]:
        """Words for what is above the limits."""
        found = []
        if self.other is not None and self.other >= OTHER:
            found.append(f"other load {self.other:.0%}".replace("%", " %"))
        if self.stolen is not None and self.stolen >= STOLEN:
            found.append(f"stolen CPU {self.stolen:.0%}".replace("%", " %"))
        if self.throttled_s > 0:
            found.append(f"CPU quota used up ({self.throttled_s:.1f} s)")
        return found


def load(root: Path = Path("/")) -> Load:
    """The counters now, as the process that does the work sees them; ``root`` is where ``proc`` and ``sys`` are."""
    busy, stolen = _cpu(root)
    return Load(time.monotonic(), busy, stolen, time.process_time(), _throttled(root))


def between(before: Load, after: Load, cores: int | None = None) -> Disturbance:
    """What others took of the machine between two readings; a round shorter than the counters' ticks tells nothing."""
    cores = cores or os.cpu_count() or 1
    whole = (after.wall - before.wall) * cores
    throttled = max(0.0, after.throttled - before.throttled)
    if not after.busy or whole < 20 * _TICK * cores:
        return Disturbance(None, None, throttled)
    other = (after.busy - before.busy) - (after.own - before.own) - 2 * _TICK * cores
    return Disturbance(
        min(1.0, max(0.0, other / whole)), min(1.0, max(0.0, (after.stolen - before.stolen) / whole)), throttled
    )


def gpu_flags(rows: Sequence[Sequence[float | None]], start: float, end: float) -> list[str]:
    """Why the GPU was slowed down between two times, with the share of samples that say so."""
    inside = [row[_SLOWDOWN] for row in rows if row[0] is not None and start <= row[0] <= end]
    known = [bits for bits in inside if bits is not None]
    counts: dict[str, int] = {}
    for bits in known:
        for word in slowdown_names(bits):
            counts[word] = counts.get(word, 0) + 1
    return [f"GPU {word} {100 * count / len(known):.0f} % of the time" for word, count in counts.items()]


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
