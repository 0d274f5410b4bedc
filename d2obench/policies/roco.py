"""RoCo, robust cache omission: the lowest mean attention among the tokens whose attention varies least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, per_row
from d2obench.policies.mass import MassMerging
from d2obench.policies.rules import DecodeRule, MeanOfLowDeviation, RowSizes

NEWEST = 10
"""Number of newest tokens whose deviation counts as infinite, because too few queries have seen them."""


@dataclass(frozen=True)
class RoCo(MassMerging):
    """Evicts by mean attention among tokens of low standard deviation, per KV head (mean over its query heads).

    A token's mean and deviation are over the attention of all queries that could attend to it. When one of n tokens
    must be evicted, the ``recent·budget + 1`` tokens of highest deviation are safe, and so are the newest 10 (half the
    budget at most); of the others, the one with the lowest mean is evicted. The prompt is reduced to the budget at
    once, by the same rule. (The authors encode a long prompt in strides and evict between them; that changes what the
    prompt's own tokens attend to.)

    Args:
        recent: share of the budget that is safe because of its deviation ("recent ratio" in the authors' code).
        sinks: tokens at the start of the prompt that are kept whatever their attention, as in the authors' mode for
            encoding a prompt; decoding does not protect them.
        merge: ``none``, as published, or ``mass`` (:mod:`d2obench.policies.mass`).
        equal: with ``merge=mass``, what a budget stands for, ``slots`` or ``bytes``:
            :mod:`d2obench.policies.biased`.
    """

    recent: float = 0.3
    sinks: int = 0
    name: ClassVar[str] = "roco"
    about: ClassVar[str] = "lowest mean attention among those of low deviation"
    paper: ClassVar[str] = "RoCo, arXiv 2402.06262"
    needs_attention: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(columns=True, squares=True)

    def check(self) -> None:
        super().check()
        if not 0 <= self.recent < 1:
            raise PolicyError(f"roco: recent is {self.recent}", remedy="use a share of the budget in [0, 1)")
        if self.sinks < 0:
            raise PolicyError(f"roco: sinks is {self.sinks}", remedy="use 0 or more")

    def safe(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens are safe for budgets of any shape, and how many of these because they are the newest."""
        newest = (keep // 2).clamp(1, NEWEST)
        return torch.maximum((keep * self.recent).long() + 1, newest), newest

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        position, length = entries.position, entries.length[:, None, None]
        safe, newest = (per_row(count, position.device) for count in self.safe(keep))
        seen = (length - position).clamp_min(1)
        mean, deviation = moments(entries.stats["sum"], entries.stats["square"], seen)
        deviation.masked_fill_(position >= length - newest, torch.inf).masked_fill_(position < 0, -1.0)
        mean.masked_fill_(places(deviation, descending=True) < safe, torch.inf)
        mean.masked_fill_((position >= 0) & (position < self.sinks), torch.inf)
        return mean.masked_fill_(position < 0, -torch.inf)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return MeanOfLowDeviation(*self.safe(sizes.budget))


def moments(total: Tensor, square: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (which orders as the deviation does) over ``seen`` observations."""
    mean = total / seen
    return mean, (square / seen - mean * mean).clamp_min(0.0)


def places(score: Tensor, descending: bool) -> Tensor:
    """The place of every element in the sorted order of its row; ties go to the lower index."""
    order = score.argsort(dim=-1, descending=descending, stable=True)
    count = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, count)
