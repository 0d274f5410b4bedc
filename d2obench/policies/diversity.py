"""Diversity: how far an entry's key is from the keys of all entries that matter more.

An entry whose key almost repeats that of a more important one adds little to what attention can find. So a policy may
multiply an entry's score by ``D_j = min ‖k_j − k_i‖`` over the entries i of higher score. The entry of highest score
gets the largest D of its row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.policies.base import pick

CPU_BLOCK, GPU_CHUNK = 128, 2**25
"""On a CPU without compiled loops, the number of entries that are compared at once with all entries of higher score;
it is small, because within such a block half of the distances are computed for nothing. Elsewhere, the number of
distances that are computed at once: 128 MiB, few launches."""


def diversity(keys: Tensor, score: Tensor, real: Tensor) -> Tensor:
    """``D`` of every entry, float32 ``[B, H, N]``.

    Args:
        keys: ``[B, H, N, d]``.
        score: float32 ``[B, H, N]``; of equals, the earlier entry counts as the higher one.
        real: bool, broadcasts to ``[B, H, N]``; other entries are padding, get 1 and do not count.
    """
    batch, heads, count = keys.shape[:3]
    real = real.expand(batch, heads, count)
    order = score.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    held = pick(keys, order).flatten(0, 1).float()
    found = _by_loop(held) if held.device.type == "cpu" and cpu.available() else _by_blocks(held)
    order = order.flatten(0, 1)
    sorted_real = real.flatten(0, 1).gather(1, order)
    found.masked_fill_(~sorted_real, 1.0)
    found[:, 0] = 1.0
    if count > 1:
        others = found[:, 1:].masked_fill(~sorted_real[:, 1:], -torch.inf).amax(1)
        found[:, 0] = torch.where(others.isinf(), 1.0, others)
    return torch.empty_like(found).scatter_(1, order, found).view(batch, heads, count)


def _by_loop(held: Tensor) -> Tensor:
    """As :func:`_by_blocks`, in one compiled loop whose products never leave a core's cache."""
    from d2obench.cpu.distance import DistanceArguments, distance
    from d2obench.cpu.nearest import BLOCK, COLUMNS

    rows, count, width = held.shape
    slots = -(-count // COLUMNS) * COLUMNS
    turned, half = torch.empty(rows, width, slots), torch.zeros(rows, slots)
    turned[..., :count], turned[..., count:] = held.transpose(1, 2), 0.0
    torch.linalg.vector_norm(held, dim=-1, out=half[:, :count]).square_().mul_(-0.5)
    found = torch.empty(rows, count)
    given = DistanceArguments(items=rows * -(-count // BLOCK), count=count, slots=slots, width=width)
    given.point(keys=held, turned=turned, half=half, found=found)
    cpu.launch(distance, given)
    return found


def _by_blocks(held: Tensor) -> Tensor:
    """The distance of each key ``[R, N, d]`` to the nearest of those before it, float32 ``[R, N]``; what it says of the
    first is meaningless."""
    (rows, count, _), device = held.shape, held.device
    found = torch.empty(rows, count, device=device)
    # an entry is compared with all before it, block by block; of ‖a − b‖², the part that depends on b is minimised
    # first
    some, step = (1, CPU_BLOCK) if device.type == "cpu" else (rows, max(32, GPU_CHUNK // max(1, rows * count)))
    behind = torch.full((min(step, count), min(step, count)), torch.inf, device=device).triu()
    for low in range(0, rows, some):
        part = slice(low, low + some)
        squares = held[part].square().sum(-1)
        for first in range(0, count, step):
            last = min(count, first + step)
            products = held[part, first:last], held[part, :last].transpose(1, 2)
            apart = torch.baddbmm(squares[:, None, :last], *products, alpha=-2)
            apart[..., first:] += behind[: last - first, : last - first]
            found[part, first:last] = (apart.amin(-1) + squares[:, first:last]).clamp_min_(0.0).sqrt_()
    return found
