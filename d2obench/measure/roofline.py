"""What memory traffic alone would allow: measured copy bandwidth, bytes of a decode step, MBU, bound on speed-up.

A decode step of a batch must read every weight once and every sequence's cache once; at the batch sizes of decoding
its arithmetic hides behind that. So ``t >= step bytes / bandwidth``, and of two policies the quotient of their step
bytes bounds the speed-up.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from d2obench.measure.clock import clock_for
from d2obench.models.ranks import local

if TYPE_CHECKING:
    import torch


class Bandwidth(NamedTuple):
    """Copy bandwidth, read + written bytes per second: the best and the median of ``n`` copies."""

    best: float
    median: float
    n: int


def copy_bandwidth(device: torch.device, *, size: int | None = None, seconds: float = 1.0) -> Bandwidth:
    """Copies a buffer far larger than the caches for about ``seconds``, at least five times.

    Args:
        device: where the decode steps run.
        size: bytes of the buffer; by default 1 GiB on a GPU and 256 MiB elsewhere, a quarter of what is free at most.
        seconds: how long.
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
    """Bytes of weights that a decode step reads: all of them but an input embedding that is not also the output's.

    Of an embedding table a step reads one row a sequence.
    """
    seen: dict[int, int] = {}
    for tensor in map(local, (*model.parameters(), *model.buffers())):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    of = {name: getattr(model, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output")}
    table, head = (local(getattr(of[name], "weight", None)) for name in ("input", "output"))
    if table is not None and (head is None or head.data_ptr() != table.data_ptr()):
        seen.pop(table.untyped_storage().data_ptr(), None)
    return sum(seen.values())


def step_bytes(weights: int, kv_at_end: int, kept: float, held: float) -> float:
    """Bytes a decode step must read, mean over the generation.

    Args:
        weights: see :func:`read_weights_bytes`.
        kv_at_end: storage of keys and values when the last token is out.
        kept, held: entries right after compression and at the end, summed alike. A cache that grows does so evenly
            and is read up to where it is filled; one that does not is read whole.
    """
    return weights + (kv_at_end * (kept + held) / 2 / held if held else kv_at_end)


def mbu(bytes_a_step: float, step_s: float, bandwidth: float) -> float:
    """Memory-bandwidth utilisation: 1 where a step takes no longer than reading its bytes at ``bandwidth``."""
    return bytes_a_step / step_s / bandwidth


def _size(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return int(min(2**30, torch.cuda.mem_get_info(device)[0] // 4)) // 4 * 4
    import psutil

    return int(min(2**28, psutil.virtual_memory().available // 4)) // 4 * 4
