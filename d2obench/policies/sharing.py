"""How many of a layer's entries each KV head keeps, by AdaKV's rule (arXiv 2407.11550).

A layer of H heads keeps H·B entries. Heads whose attention is spread over many tokens need more of them than heads that
attend to few, so the heads compete: the scores of all heads are pooled, and where the highest are decides how many each
head keeps. A part of the entries, the ``safeguard`` α, is shared out evenly. There are two forms of it:

``capacity``, the authors' code. Entries that every head keeps in any case (p of them: the recent window, sinks) do not
compete. Of the others, the H·(B − p) highest of the layer are counted: ``c_h`` of them belong to head h, which keeps
``p + (1 − α)·c_h + α·(B − p)`` entries. Fractions are rounded by largest remainder, so that the layer's sum is exact;
the authors round each head by itself.

``forced``, the code of kvpress. The ⌊α·B⌋ highest entries of each head are kept, then the highest of the layer until it
holds H·B. So α takes nothing from a head that has more than this share anyway.

``capacity`` is the default, because the paper's results are those of its authors' code; ``forced`` keeps the very
entries that kvpress keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharing:
    """AdaKV's rule. Args: ``safeguard``, α in [0, 1]; ``form``, see above."""

    safeguard: float = 0.2
    form: Literal["capacity", "forced"] = "capacity"

    def budgets(self, rank: Tensor, certain: Tensor, keep: Tensor) -> Tensor:
        """Entries that each KV head keeps, int64 ``[B, H]``; their sum over the heads of a sequence is ``H·keep``.

        If a layer has fewer entries than that, the rest is shared out evenly.

        Args:
            rank: rank of every entry, float32 ``[B, H, N]``; −inf for padding.
            certain: bool ``[B, H, N]``, entries that are kept in any case.
            keep: entries that a head keeps on average, int64 ``[B]``.
        """
        keep = keep.to(rank.device)[:, None]
        heads, total = rank.shape[1:]
        real = rank > -torch.inf
        if self.form == "capacity":
            # the window and the sinks first; more than B of them do not fit
            sure = torch.minimum((certain & real).sum(-1), keep)
            rank = rank.masked_fill(certain, -torch.inf)
            won = self._won(rank, keep * heads - sure.sum(-1, keepdim=True))
            even = (keep * heads - sure.sum(-1, keepdim=True) - won.sum(-1, keepdim=True)) / heads
            exact = sure + (1 - self.safeguard) * (won + even) + self.safeguard * (keep - sure)
        else:
            forced = (self.safeguard * keep).long()
            order = rank.argsort(dim=-1, descending=True, stable=True)
            first = torch.arange(total, device=rank.device) < forced[..., None]
            rank = rank.scatter(2, order, rank.gather(2, order).masked_fill(first & real.gather(2, order), torch.inf))
            won = self._won(rank, keep * heads)
            exact = won + (keep * heads - won.sum(-1, keepdim=True)) / heads
        return _rounded(exact.double(), (keep * heads)[:, 0])

    @staticmethod
    def _won(rank: Tensor, count: Tensor) -> Tensor:
        """How many of the ``count`` ``[B, 1]`` highest entries of all heads belong to each head, int64 ``[B, H]``."""
        batch, heads, total = rank.shape
        pooled = rank.flatten(1)
        order = pooled.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.arange(heads * total, device=rank.device) < count
        chosen &= pooled.gather(1, order) > -torch.inf
        return torch.zeros(batch, heads, dtype=torch.long, device=rank.device).scatter_add_(
            1, order // total, chosen.long()
        )


def _rounded(exact: Tensor, total: Tensor) -> Tensor:
    """Whole numbers next to ``exact`` ``[B, H]`` with the sum ``total`` ``[B]``, by largest remainder; of equal ones,
    the lower head is rounded up first."""
    whole = (exact + 1e-6).floor()
    order = (exact - whole).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1)
    return whole.long() + (place < (total[:, None] - whole.sum(-1, keepdim=True)))
