"""Random eviction, the baseline that every rule should beat; and reproducible random numbers, which CaM uses too.

A number in [0, 1) is a hash of what it is drawn for, independent of any generator state. So a sequence draws the same
numbers in a batch as alone, and a run is reproducible from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.policies.base import Entries
from d2obench.policies.protect import Protecting
from d2obench.policies.rules import DecodeRule, LowestDraw, RowSizes

MASK, FACTOR = 0xFFFFFFFF, 0x9E3779B1


@dataclass(frozen=True)
class Random(Protecting):
    """A uniform random sample of all tokens so far, drawn per layer and KV head.

    Every token draws one number, from the seed, layer, head and position; the ``budget`` highest are held at any time,
    which is a uniform sample without replacement of all tokens read. No token is protected, not even the newest.

    Args:
        protect: ``prompt`` keeps the whole prompt (:mod:`d2obench.policies.protect`) and samples generated tokens.
    """

    name: ClassVar[str] = "random"
    about: ClassVar[str] = "a uniform random sample: the floor"
    paper: ClassVar[str] = "none"

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        heads = entries.first_head + torch.arange(entries.position.shape[1], device=entries.position.device)[:, None]
        draw = uniform(entries.seed, entries.layer, heads, entries.position)
        return draw.masked_fill(entries.position < 0, -torch.inf)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return LowestDraw()


def uniform(seed: int, layer: Tensor | int, head: Tensor | int, position: Tensor) -> Tensor:
    """float32 in [0, 1), one per element of the broadcast arguments: 24 bits of a 32-bit avalanche hash of
    (seed, layer, KV head, true position)."""
    return drawn(stream(seed, layer, head, position.device), position)


def stream(seed: int, layer: Tensor | int, head: Tensor | int, device: torch.device) -> Tensor:
    """The hash of (seed, layer, KV head), int64, from which all draws of a head are derived."""
    found = _mix(torch.full((), seed + 0x9E3779B9, device=device))  # no copy from the host, for a CUDA graph
    for part in (layer, head):
        found = _mix(found ^ ((part + 1) * FACTOR & MASK))
    return found


def drawn(stream: Tensor, position: Tensor) -> Tensor:
    """The random numbers of the given positions, derived from a :func:`stream`."""
    return (_mix(stream ^ ((position.long() + 1) * FACTOR & MASK)) >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser "lowbias32" (C. Wellons), on int64."""
    x = x & MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)
