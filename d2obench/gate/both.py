"""Work that is not timed, done by both sides of a gate at once: two processes, a thread each to wait for one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from threading import Thread
from typing import TypeVar

from d2obench.gate.arm import Arm

T = TypeVar("T")
PATIENCE_S = 30.0
"""How long threads may take to notice that their processes are gone."""


def both(arms: Mapping[str, Arm], work: Callable[[Arm], T], *, at_once: bool = True) -> dict[str, T]:
    """``work`` of every arm, by name. Counts and scores do not depend on what else runs; times do.

    Args:
        arms: by name.
        work: uses that arm and nothing else.
        at_once: False does one after the other, where the two would share one device's memory.

    Raises:
        Exception: the first arm's whose work failed. Ctrl-C ends the processes before it goes on.
    """
    if not at_once:
        return {name: work(arm) for name, arm in arms.items()}
    found: dict[str, T] = {}
    failed: dict[str, Exception] = {}

    def one(name: str, arm: Arm) -> None:
        try:
            found[name] = work(arm)
        except Exception as problem:
            failed[name] = problem

    threads = [Thread(target=one, args=item, daemon=True) for item in arms.items()]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        until = time.monotonic() + PATIENCE_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
            for arm in arms.values():  # again and again: one may be starting a process just now
                arm.end()
            time.sleep(0.05)
        raise
    for name in arms:
        if name in failed:
            raise failed[name]
    return {name: found[name] for name in arms}
