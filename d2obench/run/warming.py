"""Warming a cell up in a cold worker process before it is timed there: requests until its decode steps settle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2obench.run.client import Client
from d2obench.suite.definition import Timing


def warm(client: Client, request: Mapping[str, Any], timing: Timing, most: int | None = None) -> list[Any]:
    """What each warm-up request saw (see :class:`d2obench.measure.warmup.WarmUp`), the last one settled or not.

    Args:
        client: the worker.
        request: of the cell, as for a measurement.
        timing: how near two windows of steps must come, and how many requests at most.
        most: in place of ``timing.warmup``.
    """
    found: list[Any] = []
    while len(found) < (timing.warmup if most is None else most):
        found.append(client.call("warm_up", {**request, "within": timing.warm_within}))
        if found[-1]["stable"]:
            break
    return found
