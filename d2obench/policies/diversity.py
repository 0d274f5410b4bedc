"""Diversity: how far an entry's key is from the keys of all entries that matter more.

An entry whose key almost repeats that of a more important one adds little to what attention can find. So a policy may
multiply an entry's score by ``D_j = min ‖k_j − k_i‖`` over the entries i of higher score. The entry of highest score
gets the largest D of its row.

Design. D of all entries takes the product of all keys with all keys, but only few of them decide which entries are
kept: the distance to some of the entries i is an upper bound of D_j, and most entries of low score are close to one of
the highest. So with compiled loops D is computed as far as it matters for a budget (:func:`settle`), with the same
result: an entry whose score times bound is less than what the budget's last entry has is not compared any further. The
statistic then holds −1 times the bound, which ranks below every entry that is kept. Other devices compute all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.policies.base import per_row, pick

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
    if deferrable(keys):
        found = deferred(real)
        settle(found, keys, score, real, real, torch.full((batch,), count))
        return found
    order = score.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    found = _by_blocks(pick(keys, order).flatten(0, 1).float())
    order = order.flatten(0, 1)
    sorted_real = real.flatten(0, 1).gather(1, order)
    found.masked_fill_(~sorted_real, 1.0)
    found[:, 0] = 1.0
    if count > 1:
        others = found[:, 1:].masked_fill(~sorted_real[:, 1:], -torch.inf).amax(1)
        found[:, 0] = torch.where(others.isinf(), 1.0, others)
    return torch.empty_like(found).scatter_(1, order, found).view(batch, heads, count)


def deferrable(keys: Tensor) -> bool:
    """Whether D of these keys can be computed as far as it matters, by :func:`settle`."""
    return keys.device.type == "cpu" and cpu.available()


def deferred(real: Tensor) -> Tensor:
    """The statistic of entries of which nothing has been computed, float32 ``[B, H, N]``; ``real`` as in
    :func:`diversity`."""
    return torch.where(real, -torch.inf, 1.0)


def settle(found: Tensor, keys: Tensor, score: Tensor, real: Tensor, certain: Tensor, keep: Tensor) -> None:
    """Computes D, in place, of all entries that may be among those of highest score · D.

    Args:
        found: float32 ``[B, H, N]``: D, or −1 times an upper bound of it.
        keys: as in :func:`diversity`.
        score: likewise.
        real: likewise.
        certain: bool ``[B, H, N]``, entries that are kept in any case, whose D is needed.
        keep: number of entries that are kept, int64 ``[B]`` or ``[B, H]``.
    """
    rows, count = found.shape[0] * found.shape[1], found.shape[2]
    places = (per_row(keep, keys.device) - (certain & real).sum(-1, keepdim=True)).flatten(0, 1)
    bound = score.masked_fill(certain, torch.inf).masked_fill_(~real, -torch.inf).flatten(0, 1)
    held = found.flatten(0, 1)
    if not bool((held == -torch.inf).any()):
        cut, most = _limits(held, bound, places)
        if not bool(((held < 0) & ~((bound * -held < cut) & (-held <= most))).any()):
            return
    # 1. the entries in the order of their score
    order = score.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    given = _Sorted(pick(keys, order).flatten(0, 1).float())
    order = order.flatten(0, 1)
    held, bound = held.gather(1, order), bound.gather(1, order).contiguous()
    held[:, 0] = 1.0  # it is not compared with any
    # 2. the first ones have the best chance of being kept; then the others as far as they matter
    first = min(count, int(places.max().clamp_min(0)) * 5 // 4 + CHUNKED)
    given.compare(held, torch.full_like(bound, torch.inf), 1, first, *(torch.zeros(rows), torch.zeros(rows)))
    if first < count:
        cut, most = _limits(held[:, 1:], bound[:, 1:], places)
        given.compare(held, bound, first, count, cut.flatten(), most.flatten())
    # 3. the first of all gets the largest
    others = held[:, 1:].masked_fill(bound[:, 1:] == -torch.inf, -torch.inf)
    held[:, 0] = others.amax(1) if count > 1 else 1.0
    held[:, 0].masked_fill_(held[:, 0] < 0, 1.0)
    found.copy_(torch.empty_like(held).scatter_(1, order, held).view_as(found))


CHUNKED = 32
"""Number of entries that are compared in any case, beside those that might all be kept."""


def _limits(held: Tensor, bound: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """What the last of the ``places`` ``[R, 1]`` best entries has at least, and the largest D, as far as D is known,
    float32 ``[R, 1]``; ``held`` and ``bound`` ``[R, N]``: D and score, inf for entries that are kept in any case, −inf
    for padding."""
    known = held >= 0
    most = held.masked_fill(~known | (bound == -torch.inf), -torch.inf).amax(1, keepdim=True)
    free = torch.where(known & (bound < torch.inf), bound * held, -torch.inf)
    best = free.topk(min(held.shape[1], max(1, int(places.max())))).values
    cut = best.gather(1, (places - 1).clamp(0, best.shape[1] - 1))
    cut.masked_fill_(places > best.shape[1], -torch.inf).masked_fill_(places < 1, torch.inf)
    return cut, most


class _Sorted:
    """Keys ``[R, N, d]``, float32, in the order in which they are compared, as the compiled loop reads them."""

    def __init__(self, keys: Tensor) -> None:
        from d2obench.cpu.distance import CHUNK

        rows, count, width = keys.shape
        slots = -(-count // CHUNK) * CHUNK
        self.keys, self.turned, self.half = keys, torch.empty(rows, width, slots), torch.zeros(rows, slots)
        self.turned[..., :count], self.turned[..., count:] = keys.transpose(1, 2), 0.0
        torch.linalg.vector_norm(keys, dim=-1, out=self.half[:, :count]).square_().mul_(-0.5)

    def compare(self, found: Tensor, weight: Tensor, first: int, last: int, cut: Tensor, most: Tensor) -> None:
        """See :func:`d2obench.cpu.distance.distance`."""
        from d2obench.cpu.distance import BLOCK, DistanceArguments, distance

        if first >= last:
            return
        rows, count, width = self.keys.shape
        given = DistanceArguments(
            items=rows * -(-(last - first) // BLOCK), count=count, slots=self.half.shape[1], width=width, first=first,
            last=last,
        )  # fmt: skip
        given.point(keys=self.keys, turned=self.turned, half=self.half, weight=weight, cut=cut, most=most, found=found)
        cpu.launch(distance, given)


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
