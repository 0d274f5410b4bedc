"""Policies that choose among the prompt's entries and have no rule for decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Policy, window_rank
from d2obench.policies.rules import DecodeRule, Ring, RowSizes


@dataclass(frozen=True)
class PromptOnly(Policy):
    """A policy that, as published, compresses the prompt and evicts nothing while decoding.

    Args:
        window: with ``decode=slide``, the number of newest entries that the sliding window holds.
        decode: ``grow``, as published: every decoded token is appended, so more than the budget is held. ``slide``:
            each decoded token replaces the oldest of the newest ``window`` entries, while all older entries and the
            policy's sinks stay.
        block: read the prompt in blocks of so many tokens and cut the cache to the budget after each of them, so that
            it never holds more than the budget and a block; 0 to read the whole prompt first. This changes the result:
            a block's tokens attend only to what was kept of the blocks before, scores come from what is left and from
            the block, and what was evicted early can't come back.
    """

    window: int = 32
    decode: Literal["grow", "slide"] = "grow"
    block: int = 0

    @property
    def grows(self) -> bool:
        return self.decode == "grow"

    @property
    def protected(self) -> int:
        """Number of tokens at the start that decoding never evicts, the policy's sinks."""
        return 0

    def check(self) -> None:
        super().check()
        if self.window < 1:
            raise PolicyError(f"{self.name}: window is {self.window}", remedy="use 1 or more")
        if self.block < 0 or self.block == 1:
            raise PolicyError(f"{self.name}: block is {self.block}", remedy="use 2 tokens or more, or 0 for no blocks")
        if self.block and self.budgets_need_stats:
            raise PolicyError(
                f"{self.name} can't be cut between blocks",
                why="what it keeps depends on the whole prompt",
                remedy="leave block out, or use allocate=uniform where the policy has it",
            )

    def importance(self, entries: Entries) -> Tensor:
        """What entries are ranked by, float32 ``[B, H, N]``; the higher, the more important."""
        raise TypeError(f"{type(self).__name__} has no importance")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(self.importance(entries), entries, 0, torch.zeros_like(keep))

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        """The rule of ``decode=slide``."""
        recent = sizes.budget.clamp(1, self.window)
        sinks = sizes.leading(sizes.budget.clamp_max(self.protected))
        return Ring(torch.maximum(sizes.held - recent, sinks))
