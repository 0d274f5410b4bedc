"""PyramidKV: SnapKV with more for the lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.allocation import water_fill
from d2obench.policies.base import Stats
from d2obench.policies.snapkv import SnapKV
from d2obench.suite.grammar import Budget


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose layer budgets fall linearly from the first layer to the last.

    With b the budget without the window, the last layer gets b ÷ ``beta``, the first as much more than b as the last
    gets less (the prompt at most), and those between a straight line. The sum over layers is exactly that of equal
    budgets; the authors' whole-number step may keep more.

    Args:
        beta: 1 for equal layers.
    """

    beta: float = 20.0
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
            if free == 0 or layers == 1:
                columns.append([equal] * layers)
                continue
            parts = water_fill([part / (free * layers) for part in line], free * layers, 0, max(free, tokens - window))
            columns.append([window + part for part in parts])
        return torch.tensor(columns).T
