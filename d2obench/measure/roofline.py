"""Limits by memory traffic: measured copy bandwidth, bytes of a decode step, MBU, the largest possible speed-up.

A decode step of a batch must read every weight once and every sequence's cache once. At the batch sizes of decoding,
arithmetic takes less time than these reads, so a step takes at least ``step bytes / bandwidth``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from math import exp, hypot, log
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from d2obench.measure.clock import clock_for
from d2obench.models.devices import local
from d2obench.record import Value

if TYPE_CHECKING:
    import torch


class Bandwidth(NamedTuple):
    """Copy bandwidth in bytes per second, read and written bytes together: the best and the median of ``n`` copies."""

    best: float
    median: float
    n: int


def copy_bandwidth(device: torch.device, *, size: int | None = None, seconds: float = 1.0) -> Bandwidth:
    """Copies a buffer that is far larger than the caches, for about ``seconds`` and at least five times.

    Args:
        device: where the decode steps run.
        size: bytes of the buffer; by default 1 GiB on a GPU and 256 MiB elsewhere, but at most a quarter of the free
            memory.
        seconds: how long to measure.
    """
    import torch

    size = size or _size(device)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock = clock_for(device)
    target.copy_(source)
    times: list[float] = []
    until = time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < until:
        clock.start()
        before = clock.stamp()
        target.copy_(source)
        a, b = clock.read([before, clock.stamp()])
        times.append(b - a)
    times.sort()
    moved = 2 * source.nbytes
    return Bandwidth(moved / times[0], moved / times[len(times) // 2], len(times))


def read_weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that a decode step reads.

    These are all weights but the input embedding, of which a step reads only one row for each sequence. Where the
    output layer has the same weights, they are read and counted.
    """
    # 1. Every storage once, since weights can be shared.
    seen: dict[int, int] = {}
    for tensor in map(local, (*model.parameters(), *model.buffers())):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    # 2. Leave out the input embedding unless it is the output layer's weight as well.
    of = {name: getattr(model, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output")}
    table, head = (local(getattr(of[name], "weight", None)) for name in ("input", "output"))
    if table is not None and (head is None or head.data_ptr() != table.data_ptr()):
        seen.pop(table.untyped_storage().data_ptr(), None)
    return sum(seen.values())


def step_bytes(weights: int, kv_at_end: int, kept: float, held: float) -> float:
    """Bytes that a decode step must read, on average over the generation.

    Args:
        weights: see :func:`read_weights_bytes`.
        kv_at_end: bytes of keys and values that are stored when the last token is generated.
        kept, held: number of entries right after compression and at the end. A growing cache is read as far as it is
            filled, so on average half-way between the two.
    """
    return weights + (kv_at_end * (kept + held) / 2 / held if held else kv_at_end)


def mbu(bytes_a_step: float, step_s: float, bandwidth: float) -> float:
    """Memory-bandwidth utilisation: 1 where a step takes no longer than reading its bytes at ``bandwidth``."""
    return bytes_a_step / step_s / bandwidth


def largest_speedup(
    full_steps: Iterable[Sequence[float]], full_bytes: float, policy_bytes: float, bandwidth: float, typical: float
) -> Value | None:
    """The largest decode speed-up over the full cache that the policy's bytes and the measured bandwidth allow.

    A step of the policy takes at least ``policy_bytes / bandwidth``. The step of ``full`` is the median of the faster
    half of its windows, because a disturbance of ``full`` would look like a gain of the policy. A measured speed-up
    above the upper end is impossible, so something is wrong with it.

    Args:
        full_steps: seconds of full's decode steps, one sequence for each window or round; empty ones are ignored.
        full_bytes, policy_bytes: bytes that a step of either must read, see :func:`step_bytes`.
        bandwidth: the best copy bandwidth, in bytes per second.
        typical: the median copy bandwidth.

    Returns:
        The speed-up with its uncertainty, over the number of full's windows; None without a step of full.
    """
    # 1. One time per window, fastest first; the undisturbed step of ``full`` is the median of the faster half.
    times = sorted(median(steps) for steps in full_steps if len(steps))
    if not times:
        return None
    undisturbed = median(times[: (len(times) + 1) // 2])
    # 2. Reads can be faster than copies. If ``full`` itself has read faster, its bandwidth is used.
    peak = max(bandwidth, full_bytes / times[0])
    largest = undisturbed * peak / policy_bytes
    # 3. Two factors are uncertain: the undisturbed step, by its distance from the fastest one, and the bandwidth, which
    #    may exceed the best copy as far as that exceeds the median one. They are independent: the squares of their
    #    logarithms add up.
    factor = exp(hypot(log(undisturbed / times[0]), log(max(1.0, bandwidth / typical))))
    return Value(largest, largest / factor, largest * factor, len(times), kind="range")


def _size(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return int(min(2**30, torch.cuda.mem_get_info(device)[0] // 4)) // 4 * 4
    import psutil

    return int(min(2**28, psutil.virtual_memory().available // 4)) // 4 * 4
