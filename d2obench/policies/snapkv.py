"""SnapKV: keeps what the prompt's last queries attend to; decoded tokens are appended. PyramidKV: the same, with larger
budgets for lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.allocation import water_fill
from d2obench.policies.base import Entries, Needs, Stats, window_rank
from d2obench.policies.mass import MassMerging
from d2obench.policies.prompt_only import PromptOnly
from d2obench.suite.grammar import Budget


@dataclass(frozen=True)
class SnapKV(MassMerging, PromptOnly):
    """The last ``window`` tokens, and those that their queries attend to most.

    The attention of the last ``window`` queries to each earlier token is averaged (also over the query heads of a KV
    head) and pooled over neighbours; the ``budget − window`` highest are kept together with the window, per KV head. If
    the budget is smaller than the window, only the newest tokens are kept: use a smaller window for short prompts.

    Args:
        window: number of queries whose attention is summed, and of tokens kept as the recent window.
        kernel: number of neighbours to pool over, odd.
        pool: ``avg`` or ``max``.
        decode: ``grow``, as published: every decoded token is appended, so more than the budget is held. ``slide``: the
            recent window slides over the decoded tokens, while the entries chosen from the prompt stay.
        block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
        merge: ``none``, as published, or ``mass`` (:mod:`d2obench.policies.mass`).
        equal: with ``merge=mass``, what a budget stands for, ``slots`` or ``bytes``:
            :mod:`d2obench.policies.biased`.
    """

    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    name: ClassVar[str] = "snapkv"
    about: ClassVar[str] = "what the prompt's last queries attend to; the prompt only"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"

    @property
    def needs(self) -> Needs:
        return Needs(columns=self.merge == "mass", window=self.window)

    def check(self) -> None:
        super().check()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"{self.name}: kernel is {self.kernel}", remedy="use an odd number")

    def importance(self, entries: Entries) -> Tensor:
        looking = entries.position >= entries.length[:, None, None] - self.window
        seen = entries.stats["window"].masked_fill(looking | (entries.position < 0), 0.0)
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        return pool(seen / self.window, self.kernel, stride=1, padding=self.kernel // 2)

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(self.importance(entries), entries, 0, keep.clamp_max(self.window))


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose layer budgets fall linearly from the first layer to the last.

    With b the budget without the window, the last layer gets b ÷ ``beta``; the first layer gets as much more than b as
    the last gets less (at most the prompt); the layers between lie on a straight line. The sum over layers is exactly
    that of equal budgets; the authors' integer step may keep more.

    Args:
        beta: ratio of b to the last layer's budget; 1 for equal layers.
        short: budgets for a prompt of fewer than 2·b tokens: ``pyramid`` as for any other, or ``equal`` for all layers,
            as in the authors' code.
    """

    beta: float = 20.0
    short: Literal["pyramid", "equal"] = "pyramid"
    name: ClassVar[str] = "pyramidkv"
    about: ClassVar[str] = "SnapKV with layer budgets that fall with depth"
    paper: ClassVar[str] = "PyramidKV, arXiv 2406.02069"

    @property
    def budgets_need_stats(self) -> bool:
        return False

    def check(self) -> None:
        super().check()
        if self.beta < 1:
            raise PolicyError(f"pyramidkv: beta is {self.beta}", remedy="use 1 or more")

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        layers, columns = len(stats), []
        for tokens in length.tolist():
            equal = budget.of(tokens)
            window = min(self.window, equal)
            free = equal - window
            least = free / self.beta
            most = 2 * free - least
            if most > tokens - window:
                most = max(free, tokens - window)
                least = 2 * free - most
            line = [most - (most - least) * layer / max(1, layers - 1) for layer in range(layers)]
            if free == 0 or layers == 1 or (self.short == "equal" and tokens < 2 * free):
                columns.append([equal] * layers)
                continue
            parts = water_fill([part / (free * layers) for part in line], free * layers, 0, max(free, tokens - window))
            columns.append([window + part for part in parts])
        return torch.tensor(columns).T
