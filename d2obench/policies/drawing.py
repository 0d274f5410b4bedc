"""Reproducible chance: a number in [0, 1) from what it is drawn for, not from a generator's state.

So a batch draws what its sequences would draw alone, and a run repeats itself for its seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK, FACTOR = 0xFFFFFFFF, 0x9E3779B1


def uniform(seed: int, layer: Tensor | int, head: Tensor | int, position: Tensor) -> Tensor:
    """float32 in [0, 1), one per element of the broadcast arguments: 24 bits of a 32-bit avalanche hash of
    (seed, layer, KV head, true position)."""
    return drawn(stream(seed, layer, head, position.device), position)


def stream(seed: int, layer: Tensor | int, head: Tensor | int, device: torch.device) -> Tensor:
    """The hash of (seed, layer, KV head), int64: what all draws of a head begin with."""
    found = _mix(torch.full((), seed + 0x9E3779B9, device=device))  # no copy from the host, for a CUDA graph
    for part in (layer, head):
        found = _mix(found ^ ((part + 1) * FACTOR & MASK))
    return found


def drawn(stream: Tensor, position: Tensor) -> Tensor:
    """The numbers that positions draw from a :func:`stream`."""
    return (_mix(stream ^ ((position.long() + 1) * FACTOR & MASK)) >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser "lowbias32" (C. Wellons), on int64."""
    x = x & MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)
