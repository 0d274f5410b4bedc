"""CriticalKV: half of the budget by a score of attention, the other half by what an entry can change in the output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import RECENT, Entries, Needs, Stats, per_row
from d2obench.policies.prompt_only import PromptOnly
from d2obench.policies.roco import places
from d2obench.suite.grammar import Budget

CHOSEN = RECENT / 2
"""Rank of what the first stage chose: higher than any score, lower than the recent window."""


@dataclass(frozen=True)
class CriticalKV(PromptOnly):
    """A second stage for another policy's scores: they are weighted with the norm of what a value adds to the output.

    The share ``first`` of the budget goes to the entries that rank highest by ``score``, whose recent window and sinks
    stay protected. The rest goes to the highest of ``(score + epsilon) · ‖W_O v‖₁``, where v is the entry's value and
    W_O the part of the layer's output projection that belongs to a query head; the norm is the mean over the query
    heads of the KV head. Layer budgets are those of the scoring policy. Decoding evicts nothing by itself (``decode``).

    Args:
        window: that of the scoring policy, see ``snapkv``; and with ``decode=slide``, of the sliding window.
        decode, block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
        score: the policy whose scores are used, with its other parameters: ``snapkv(kernel=7)`` or
            ``expected(value_norms=false)``.
        first: share of the budget that the first stage takes.
        epsilon: added to a score before it is weighted.
    """

    score: str = "snapkv"
    first: float = 0.5
    epsilon: float = 1e-4
    name: ClassVar[str] = "criticalkv"
    about: ClassVar[str] = "another policy's scores, then times what a value adds to the output; the prompt only"
    paper: ClassVar[str] = "CriticalKV, arXiv 2502.03805"

    @cached_property
    def scoring(self) -> PromptOnly:
        """The policy whose scores are used."""
        from d2obench.policies import parse_policy

        found = parse_policy(self.score)
        alone = isinstance(found, PromptOnly) and found.bits is None and found.merge_spec is None
        if not alone or isinstance(found, CriticalKV):
            raise PolicyError(
                f"criticalkv can't use the scores of '{self.score}'",
                why="it weights scores that are not negative, of a policy that chooses among a prompt's entries",
                remedy="use score=snapkv or score=expected",
            )
        assert isinstance(found, PromptOnly)
        return replace(found, window=self.window, decode=self.decode, block=self.block)

    @property
    def needs(self) -> Needs:
        return replace(self.scoring.needs, projection=True)

    @property
    def protected(self) -> int:
        return self.scoring.protected

    @property
    def budgets_need_stats(self) -> bool:
        return self.scoring.budgets_need_stats

    def check(self) -> None:
        super().check()
        self.scoring.check()
        if self.scoring.name in ("keydiff", "knorm"):
            raise PolicyError(
                f"criticalkv can't use the scores of '{self.score}'",
                why="they are negative, so that a larger value would lower them",
                remedy="use score=snapkv or score=expected",
            )
        if not 0 <= self.first <= 1:
            raise PolicyError(f"criticalkv: first is {self.first}", remedy="use a share of the budget in [0, 1]")
        if self.epsilon < 0:
            raise PolicyError(f"criticalkv: epsilon is {self.epsilon}", remedy="use 0 or more")

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        return self.scoring.layer_budgets(stats, length, budget)

    def describe(self, entries: Entries) -> None:
        self.scoring.describe(entries)

    def importance(self, entries: Entries) -> Tensor:
        """The weighted scores of the second stage."""
        return (self.scoring.importance(entries) + self.epsilon) * output_norms(entries)

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        # 1. the first stage, by the scoring policy's own ranks
        rank = self.scoring.rank(entries, keep)
        chosen = places(rank, descending=True) < per_row((keep * self.first).long(), rank.device)
        # 2. the second stage; what the scoring policy protects stays so
        second = torch.where(chosen, CHOSEN, self.importance(entries))
        return torch.where(rank.abs() >= RECENT, rank, second)


def output_norms(entries: Entries) -> Tensor:
    """``‖W_O v‖₁`` of every entry, mean over the query heads of its KV head, float32 ``[B, H, N]``; ``‖v‖₁`` if the
    model is not known."""
    values, projection = entries.values, entries.projection
    if projection is None:
        return values.float().abs().sum(-1)
    batch, heads, total, width = values.shape
    parts = projection.float().to(values.device).view(projection.shape[0], heads, -1, width)
    norms = torch.zeros(batch, heads, total, device=values.device)
    for head in range(heads):
        for member in range(parts.shape[2]):
            added = values[:, head].float() @ parts[:, head, member].T
            norms[:, head] += added.abs().sum(-1) / parts.shape[2]
    return norms
