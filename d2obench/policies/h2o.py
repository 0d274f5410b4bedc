"""H2O, the heavy-hitter oracle: evicts by accumulated attention, at the prompt's end and in every decode step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, window_rank
from d2obench.policies.mass import MassMerging, mean_attention
from d2obench.policies.protect import Protecting
from d2obench.policies.rules import DecodeRule, LowestScore, LowestWeightedScore, MassSpec, RowSizes


@dataclass(frozen=True)
class HeavyHitters(Protecting):
    """Keeps sinks, heavy hitters by accumulated attention, and a recent window, per KV head: what H2O and D2O share.

    Args:
        recent: share of the budget that is the recent window.
        sinks: tokens at the start that are never evicted.
        normalised: divide a score by the number of queries that could attend to the token.
    """

    recent: float = 0.5
    sinks: int = 0
    normalised: bool = False
    needs_attention: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(columns=True)

    def check(self) -> None:
        super().check()
        if not 0 < self.recent <= 1:
            raise PolicyError(f"{self.name}: recent is {self.recent}", remedy="use a share of the budget in (0, 1]")
        if self.sinks < 0:
            raise PolicyError(f"{self.name}: sinks is {self.sinks}", remedy="use 0 or more")

    def window(self, keep: Tensor) -> Tensor:
        """Size M of the recent window for budgets of any shape; at least 1."""
        return torch.round(keep * self.recent).long().clamp_min(1)

    def score(self, entries: Entries) -> Tensor:
        """What entries outside sinks and window are ranked by, float32 ``[B, H, N]``."""
        return mean_attention(entries) if self.normalised else entries.stats["sum"]

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(self.score(entries), entries, self.sinks, self.window(keep))

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        recent = self.window(sizes.budget)
        if isinstance(self.merge_spec, MassSpec):  # the scores of sinks are needed, too
            return LowestWeightedScore(recent, self.sinks, self.normalised)
        return LowestScore(recent, self.sinks, self.normalised)


@dataclass(frozen=True)
class H2O(MassMerging, HeavyHitters):
    """Keeps heavy hitters by accumulated attention and a recent window, per KV head.

    A token's score is the sum of the attention it has received from all queries so far (mean over the query heads of
    its KV head). Of the prompt, the last M tokens and the ``budget − M`` tokens of highest score before them are kept.
    Each decode step adds its attention to the scores and evicts the token of lowest score that is not among the last M.

    Args:
        recent: share of the budget that is the recent window; in the authors' code both parts are equal.
        sinks: tokens at the start that are never evicted; the authors' code protects none.
        normalised: divide a score by the number of queries that could attend to the token. This option is not in the
            paper; it removes the advantage of early tokens.
        merge: ``none``, as published, or ``mass`` (:mod:`d2obench.policies.mass`).
        equal: with ``merge=mass``, what a budget stands for, ``slots`` or ``bytes``:
            :mod:`d2obench.policies.biased`.
        protect: ``prompt`` keeps the whole prompt (:mod:`d2obench.policies.protect`).
    """

    name: ClassVar[str] = "h2o"
    about: ClassVar[str] = "heavy hitters by accumulated attention and a recent window"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"
