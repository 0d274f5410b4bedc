"""Reproducible chance: a number in [0, 1) from what it is drawn for, not from a generator's state.

So a batch draws what its sequences would draw alone, and a run repeats itself for its seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(seed: int, layer: Tensor | int, head: Tensor | int, position: Tensor) -> Tensor:
    """float32 in [0, 1), one per element of the broadcast arguments: 24 bits of a 32-bit avalanche hash of
    (seed, layer, KV head, true position)."""
    stream = _mix(torch.full((), seed + 0x9E3779B9, device=position.device))  # no copy from the host, for a CUDA graph
    for part in (layer, head, position.long()):
        stream = _mix(stream ^ ((part + 1) * 0x9E3779B1 & _MASK))
    return (stream >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser "lowbias32" (C. Wellons), on int64."""
    x = x & _MASK
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
