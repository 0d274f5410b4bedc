"""Random eviction: the floor that every rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.policies.base import DecodeRule, Entries, LowestDraw, Policy, RowSizes
from d2obench.policies.drawing import uniform


@dataclass(frozen=True)
class Random(Policy):
    """A uniform sample of all tokens so far, drawn per layer and KV head.

    Every token draws a number once, from the seed and its place; the ``budget`` highest are held at any time, which is
    a uniform sample without replacement of whatever was read. Nothing is protected, the newest token neither.
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
