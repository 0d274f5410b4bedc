"""DuoAttention: some KV heads hold everything, the others only sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, Policy, Stats, per_row, window_rank
from d2obench.policies.rotary import rotate
from d2obench.policies.rules import DecodeRule, Ring, RowSizes
from d2obench.suite.grammar import Budget

SPAN = 500
"""Number of tokens over which a head's reach is measured."""


@dataclass(frozen=True)
class Duo(Policy):
    """Full heads beside streaming heads, over all layers.

    A full head holds every token, also while decoding. A streaming head holds the first ``sinks`` and the last
    ``recent`` tokens, or where that is more than half of the budget, fewer of both in the same proportion. As many
    heads are full as the budget allows, those that reach furthest; what is left over widens the windows of the others.
    So the budget holds for the prompt, and is exceeded by what the full heads append while decoding.

    How far a head reaches is read from a file, or found on the prompt: with the mean μ of its queries before their
    rotation (without the first four) and the mean κ of its keys before theirs, the attention of a query μ to 500 keys κ
    at the distances 499 … 0 is summed up from the furthest on; the mean of these sums is the higher, the less the
    attention depends on what is near. It is the mean over the query heads of a KV head.

    Args:
        sinks: tokens at the start that a streaming head holds.
        recent: newest tokens that a streaming head holds.
        heads: ``prompt``, see above, or a file with a line for each layer and a number for each KV head, separated by
            tabs: the file ``full_attention_heads.tsv`` that the authors publish for a model.
    """

    sinks: int = 64
    recent: int = 256
    heads: str = "prompt"
    name: ClassVar[str] = "duo"
    about: ClassVar[str] = "full heads beside heads with sinks and a recent window"
    paper: ClassVar[str] = "DuoAttention, arXiv 2410.10819"

    @property
    def needs(self) -> Needs:
        return Needs(moments=self.heads == "prompt")

    @property
    def files(self) -> tuple[str, ...]:
        return () if self.heads == "prompt" else (self.heads,)

    @property
    def budgets_need_stats(self) -> bool:
        return True

    @property
    def ragged(self) -> bool:
        return True

    def check(self) -> None:
        if self.sinks < 0:
            raise PolicyError(f"duo: sinks is {self.sinks}", remedy="use 0 or more")
        if self.recent < 1:
            raise PolicyError(f"duo: recent is {self.recent}", remedy="use 1 or more")
        if self.heads != "prompt":
            pattern(self.heads)

    def sinks_of(self, count: Tensor) -> Tensor:
        """Sinks among the entries of a streaming head, for numbers of entries of any shape."""
        share = self.sinks / (self.sinks + self.recent)
        return torch.round(count * share).long().clamp_max(self.sinks)

    def describe(self, entries: Entries) -> None:
        """Adds "reach", the same number for all entries of a KV head."""
        if self.heads == "prompt" and "reach" not in entries.stats:
            reach = reach_of(entries)[..., None]
            entries.stats["reach"] = reach.expand(entries.position.shape).contiguous()

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        if self.heads == "prompt":
            reach = torch.stack([stat["reach"][..., -1] for stat in stats]).cpu()
        else:
            rows = pattern(self.heads)
            if len(rows) != len(stats):
                raise PolicyError(
                    f"duo: {self.heads} has {len(rows)} lines", why=f"the model has {len(stats)} layers to compress"
                )
            reach = torch.tensor(rows)[:, None].expand(-1, len(length), -1)
        budgets = torch.zeros(reach.shape, dtype=torch.long)
        for sequence, tokens in enumerate(length.tolist()):
            budgets[:, sequence] = self._shared(reach[:, sequence], tokens, budget.of(tokens))
        return budgets

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        sinks = per_row(self.sinks_of(keep), entries.position.device)
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, sinks, keep)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        """A ring of every streaming head; that of a full head has room for all tokens to come."""
        return Ring(sizes.leading(self.sinks_of(sizes.budget)))

    def _shared(self, reach: Tensor, tokens: int, mean: int) -> Tensor:
        """Entries of each head ``[layers, H]``, −1 for a full one, with ``mean`` entries for the average head."""
        count, total = reach.numel(), mean * reach.numel()
        if mean >= tokens:
            return torch.full(reach.shape, -1)
        window = max(1, min(self.sinks + self.recent, mean // 2))
        full = (total - count * window) // (tokens - window)
        left = total - full * tokens
        shares = torch.full((count,), left // (count - full))
        shares[: left % (count - full)] += 1
        # the heads of the furthest reach are full; of equals, the first
        order = reach.flatten().argsort(descending=True, stable=True)
        budgets = torch.empty(count, dtype=torch.long)
        budgets[order[:full]], budgets[order[full:]] = -1, shares[: count - full]
        return budgets.view(reach.shape)


def reach_of(entries: Entries) -> Tensor:
    """How far each KV head reaches, float32 ``[B, H]``."""
    moments, rotary, position = entries.moments, entries.rotary, entries.position
    assert moments is not None and rotary is not None
    heads, real = position.shape[1], (position >= 0)[..., None]
    # 1. the mean key before its rotation
    plain = rotate(entries.keys.float(), -position[..., None] * rotary)
    key = (plain * real).sum(2) / real.sum(2).clamp_min(1)
    # 2. attention of the mean query to such keys at all distances, the furthest first
    apart = torch.arange(SPAN - 1, -1, -1, device=key.device)[:, None] * rotary
    query = rotate(moments.mean[:, :, None].expand(-1, -1, SPAN, -1), apart)
    query = query.view(len(key), heads, -1, *query.shape[2:])
    weights = torch.softmax((query * key[:, :, None, None]).sum(-1) * entries.scale, -1)
    return weights.cumsum(-1).mean((2, 3))


def pattern(path: str) -> list[list[float]]:
    """The numbers in a file of heads: a line for each layer, a number for each KV head.

    Raises:
        PolicyError: it can't be read; the message names the line.
    """
    try:
        lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise PolicyError(f"duo: can't read the file of heads {path}", why=str(problem)) from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append([float(word) for word in line.split()])
        except ValueError:
            raise PolicyError(f"duo: line {number} of {path} is not a list of numbers") from None
        if len(rows[-1]) != len(rows[0]):
            raise PolicyError(
                f"duo: line {number} of {path} has {len(rows[-1])} numbers", why=f"line 1 has {len(rows[0])}"
            )
    if not rows:
        raise PolicyError(f"duo: the file of heads {path} is empty")
    return rows
