"""CaM, cache merging: a value that leaves the recent window is now and then shared out among those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import DecodeRule, Entries, Policy, Ring, RowSizes, SpreadSpec, window_rank


@dataclass(frozen=True)
class CaM(Policy):
    """The first tokens and the last, and while decoding a merge of values, as in the authors' code.

    When token i leaves the recent window, its attention in that step over the mean attention of the younger ones,
    clamped to [0, 1], is the chance that ``value / merged`` is added to the next ``merged`` values; keys are lost.
    Per KV head, attention as mean over its query heads. The prompt is evicted without merging. The authors' code shares
    a token out one step before it leaves; here it is the step in which it leaves.

    Args:
        start: share of the budget kept from the start; the rest is the recent window.
        merged: values that a lost one is shared out among.
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
        first = (keep * self.start).long()[:, None, None].to(entries.position.device)
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, first, keep)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return Ring(sizes.leading((sizes.budget * self.start).long()))

    @property
    def merge_spec(self) -> SpreadSpec | None:
        return SpreadSpec(self.merged) if self.merge else None
