"""The largest batch that fits a memory limit: predicted from the model's dimensions, tried, and bisected.

A trial is the whole prompt, the first and the last steps of the generation with the cache at its full depth. On a GPU
the limit is set in the allocator, so that going over it is a real out of memory; on a CPU the resident set is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from d2obench.errors import OutOfMemory
from d2obench.models import Dimensions
from d2obench.record import Axes
from d2obench.run.predict import memory_of
from d2obench.run.worker_client import Client
from d2obench.suite.grammar import parse_memory
from d2obench.tasks.base import Cell

MOST = 4096
RESOLUTION = 32


def find_batch(cell: Cell, limit: str, client: Client) -> dict[str, Any]:
    """Searches the largest batch of a cell.

    Args:
        cell: its batch is ``max``.
        limit: ``24GiB``, ``0.5`` of the device, or empty for all of a GPU and what is free of a CPU's memory.
        client: the worker that tries.

    Returns:
        ``batch``, ``limit`` in words, ``predicted``, and the ``trials`` as ``[batch, peak bytes or None]``.

    Raises:
        OutOfMemory: not even one sequence fits.
    """
    axes = cell.axes
    memory = client.call("memory", {"device": axes.device})
    bound = (
        parse_memory(limit, memory["total"]) if limit else memory["total" if axes.device.startswith("cuda") else "free"]
    )
    words = f"under {bound / 2**30:.2f} GiB"
    facts = client.call("describe", {"models": [axes.model], "devices": []})
    model = Dimensions(**facts["models"][axes.model])
    empty, one = (memory_of(cell, model, batch) for batch in (0, 1))
    predicted = int((bound - empty) / (one - empty)) if bound > empty else 1
    trials: list[list[int | None]] = []

    def fits(batch: int) -> bool:
        request = {"axes": msgspec.to_builtins(axes), "batch": batch, "sampled": [2, 1], "limit": bound}
        try:
            peak = peak_bytes(client.call("measure", request)["trace"], axes)
        except OutOfMemory:
            peak = None
        trials.append([batch, peak])
        return peak is not None and peak <= bound

    found = largest_batch(fits, predicted)
    if found == 0:
        raise OutOfMemory(f"not even one sequence fits {words}")
    return {"batch": found, "limit": words, "predicted": predicted, "trials": trials}


def peak_bytes(trace: dict[str, Any], axes: Axes) -> int:
    """The highest memory of a request: allocated on a GPU, the resident set elsewhere."""
    key = "allocated_bytes" if axes.device.startswith("cuda") else "rss_bytes"
    return max(int(peaks[key]) for peaks in trace["peaks"].values() if key in peaks)


def largest_batch(fits: Callable[[int], bool], predicted: int, most: int = MOST) -> int:
    """The largest batch for which ``fits`` is true, to within 1/32 of itself; 0 where not even one sequence fits.

    Args:
        fits: tries a batch for real; false when it goes over the limit or memory ends. Must not turn true again above
            a batch that does not fit.
        predicted: where to start.
        most: never tries more.
    """
    guess, low, high = max(1, min(predicted, most)), 0, most + 1
    while high - low > max(1, low // RESOLUTION):
        if fits(guess):
            low = guess
            guess = min(most, low + max(1, low // 2)) if high > most else (low + high) // 2
        else:
            high = guess
            guess = (low + high) // 2
        if guess == low:
            break
    return low
