"""CaM, cache merging: a value that leaves the recent window is, with a certain probability, added to later values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Policy, per_row, window_rank
from d2obench.policies.rules import DecodeRule, Ring, RowSizes, SpreadSpec


@dataclass(frozen=True)
class CaM(Policy):
    """The first tokens and the most recent ones, with a random merge of values during decoding, as in the authors'
    code.

    When token i leaves the recent window, its attention in that step divided by the mean attention of the younger
    tokens, clamped to [0, 1], is the probability that ``value / merged`` is added to the next ``merged`` values; its
    key is dropped. This is decided per KV head, with attention as the mean over its query heads. The prompt is evicted
    without merging. The authors' code merges a token one step before it leaves; here it is merged in the step in which
    it leaves.

    Args:
        start: share of the budget for the first tokens; the rest is the recent window.
        merged: number of values that an evicted value is divided among.
        merge: whether to merge at all.
    """

    start: float = 0.5
    merged: int = 32
    merge: bool = True
    name: ClassVar[str] = "cam"
    about: ClassVar[str] = "start and recent window, with a random merge of values"
    paper: ClassVar[str] = "CaM, ICML 2024"
    needs_attention: ClassVar[bool] = True

    def check(self) -> None:
        if not 0 <= self.start < 1:
            raise PolicyError(f"cam: start is {self.start}", remedy="use a share of the budget in [0, 1)")
        if self.merged < 1:
            raise PolicyError(f"cam: merged is {self.merged}", remedy="use 1 or more")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        first = per_row((keep * self.start).long(), entries.position.device)
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, first, keep)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return Ring(sizes.leading((sizes.budget * self.start).long()))

    @property
    def merge_spec(self) -> SpreadSpec | None:
        return SpreadSpec(self.merged) if self.merge else None
