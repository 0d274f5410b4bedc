"""SnapKV: what the prompt's last queries attend to is kept; decoding adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import DecodeRule, Entries, Needs, Policy, Ring, RowSizes, window_rank


@dataclass(frozen=True)
class SnapKV(Policy):
    """The last ``window`` tokens, and those that their queries attend to most.

    The attention of the last ``window`` queries to each earlier token is summed (mean over the query heads of a KV
    head) and pooled over neighbours; the ``budget − window`` highest are kept beside the window, per KV head. At a
    budget below the window only the newest tokens are left: take a smaller window for short prompts.

    Args:
        window: queries that look back, and tokens kept as the recent window.
        kernel: neighbours pooled over, odd.
        pool: ``avg`` or ``max``.
        decode: ``grow``, as published: every decoded token is added, and more than the budget is held. ``slide``:
            the recent window slides over the decoded tokens while the prompt's chosen ones stay.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    decode: Literal["grow", "slide"] = "grow"
    name: ClassVar[str] = "snapkv"
    about: ClassVar[str] = "what the prompt's last queries attend to; the prompt only"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"

    @property
    def grows(self) -> bool:
        return self.decode == "grow"

    @property
    def needs(self) -> Needs:
        return Needs(window=self.window)

    def check(self) -> None:
        if self.window < 1:
            raise PolicyError(f"{self.name}: window is {self.window}", remedy="use 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"{self.name}: kernel is {self.kernel}", remedy="use an odd number")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        looking = entries.position >= entries.length[:, None, None] - self.window
        seen = entries.stats["window"].masked_fill(looking | (entries.position < 0), 0.0)
        pooled = (F.avg_pool1d if self.pool == "avg" else F.max_pool1d)(
            seen, self.kernel, stride=1, padding=self.kernel // 2
        )
        return window_rank(pooled, entries, 0, keep.clamp_max(self.window))

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        """The window slides (``decode=slide``): the entries in front of the prompt's recent window stay."""
        recent = sizes.budget.clamp(1, self.window)
        return Ring((sizes.held - recent).clamp_min(0))
