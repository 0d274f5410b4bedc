"""From the entries of a layer to its slots: selection, merging, and what is booked of every slot."""

from __future__ import annotations

import torch
from torch import Tensor

from d2obench.engine.slots import CLOSED, EMPTY
from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Kept, Policy, pick, select
from d2obench.ranges import span


def compress(policy: Policy, entries: Entries, keep: Tensor, most: int) -> tuple[Kept, dict[str, Tensor]]:
    """What the policy keeps of a layer, after merging, and what it wants to remember.

    Args:
        policy: the rule.
        entries: of the layer.
        keep: int64 ``[B]``, entries to keep of each sequence.
        most: slots offered.
    """
    position = entries.position
    total = position.shape[2]
    if most == total and not bool((position < 0).any()):
        everything = torch.arange(total, device=position.device).expand_as(position)
        return Kept(everything, everything[..., :0], total, entries.keys, entries.values), {}
    with span("evict"):
        index, evicted = select(policy.rank(entries, keep), keep, most)
    kept = Kept(index, evicted, total, pick(entries.keys, index), pick(entries.values, index))
    with span("merge"):
        return kept, policy.absorb(entries, kept, keep)


def book(own: Tensor, index: Tensor, position: Tensor, usable: Tensor | None) -> None:
    """Fills in the positions of a layer's slots.

    Args:
        own: int32 ``[B, H, C]`` of CLOSED slots, written in place.
        index: int64 ``[B, H, n]``, the entry in each of the first n slots; N for none.
        position: int64 ``[B, H, N]`` of the entries, negative for padding.
        usable: slots of each sequence, ``[B]``; None if decoding appends behind the first n.
    """
    count, total = index.shape[2], position.shape[2]
    if usable is None:
        own[..., count:] = EMPTY
    else:
        slots = torch.arange(own.shape[2], device=own.device)
        own[:] = torch.where(slots < usable.to(own.device)[:, None], EMPTY, CLOSED)[:, None]
    true = position.gather(2, index.clamp_max(total - 1)).to(own.dtype)
    own[..., :count] = torch.where((true >= 0) & (index < total), true, own[..., :count])


def to_the_right(kept: Kept) -> Kept:
    """The same entries with empty slots on the left instead of the right: decoded tokens follow."""
    count = kept.index.shape[2]
    empty = count - kept.filled.sum(-1, keepdim=True)
    if not bool(empty.any()):
        return kept
    order = (torch.arange(count, device=kept.index.device) - empty) % count
    keys, values = (held.gather(2, order[..., None].expand_as(held)) for held in (kept.keys, kept.values))
    return Kept(kept.index.gather(2, order), kept.evicted, kept.total, keys, values)


def real_tokens(mask: Tensor, total: int) -> Tensor:
    """Tokens that are not padding, ``[B]``, from a 2D mask ``[B, total]`` or the last row of a 4D one; padding must
    stand on the left."""
    if mask.dim() == 4:
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask == 0
    real = mask[:, -total:].bool()
    counts = real.sum(1)
    if not bool((real == (torch.arange(total, device=mask.device) >= (total - counts)[:, None])).all()):
        raise PolicyError("the batch is padded on the right or inside", remedy="pad on the left")
    return counts
