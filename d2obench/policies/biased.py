"""``equal=bytes``: a policy whose slots have biases gets as many slots as fit into the bytes of slots without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from d2obench.errors import PolicyError
from d2obench.policies.base import Policy
from d2obench.suite.grammar import Budget


@dataclass(frozen=True)
class Biased(Policy):
    """A policy whose slots may have biases, a float32 each: some percent of the bytes of a slot.

    Args:
        equal: what a budget stands for: ``slots``, as many as it says; or ``bytes``: fewer slots, so that with their
            biases they take as many bytes as the budget's slots would take without, to within one slot of a KV head.
    """

    equal: Literal["slots", "bytes"] = "slots"

    def check(self) -> None:
        super().check()
        if self.equal == "slots":
            return
        if not self.adds_biases:
            raise PolicyError(
                f"{self.name}: equal=bytes is for slots with biases",
                why="without a merge by mass its slots are as large as those of any policy",
                remedy="leave it out, or add merge=mass",
            )
        if self.protects_prompt:
            raise PolicyError(
                f"{self.name}: protect=prompt does not go together with equal=bytes",
                why="the slots of the prompt have biases, too, and are not part of the budget",
                remedy="leave one of them out",
            )

    def in_slots(self, budget: Budget, slot_bytes: float) -> Budget:
        if self.equal == "slots":
            return budget
        part = slot_bytes / (slot_bytes + torch.float32.itemsize)
        if budget.tokens is not None:
            return replace(budget, tokens=max(1, round(budget.tokens * part)))
        assert budget.ratio is not None
        return replace(budget, ratio=budget.ratio * part)
