"""Waiting for events, which tests do in place of sleeps and deadlines: those fail on a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LIMIT_S = 900.0
"""Ends a test that would hang for ever; nothing is expected to take anywhere near as long."""


def wait_for(condition: Callable[[], T], alive: Callable[[], bool] = lambda: True) -> T:
    """What ``condition()`` gives as soon as that is true.

    Raises:
        AssertionError: ``alive()`` is false, so it will never be true, or nothing happened in :data:`LIMIT_S` seconds.
    """
    end = time.monotonic() + LIMIT_S
    while True:
        running = alive()  # asked first: what has ended may have made the condition true at the last moment
        if found := condition():
            return found
        assert running, "the process that was waited for has ended"
        assert time.monotonic() < end, f"nothing happened in {LIMIT_S:g} s"
        time.sleep(0.01)


def state_of(pid: int) -> tuple[str, int]:
    """The state letter of a process and its parent; ``("", 0)`` where there is none."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return "", 0
    return state, int(parent)


def is_dead(pid: int) -> bool:
    """Whether a process has ended, even if nobody has asked for its exit code yet."""
    return state_of(pid)[0] in ("", "Z", "X")


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    every = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [one for one in every if state_of(one)[1] == pid]
