"""KeepKV: merges evicted entries and counts their votes, so that a merged entry weighs as much as all it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Kept, Needs, Stats, pick, window_rank
from d2obench.policies.biased import Biased
from d2obench.policies.merging import nearest, sums_by_target
from d2obench.policies.rules import Custom, DecodeRule, LowestScore, RowSizes
from d2obench.policies.window import window_attention

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

TINY = 1e-10
"""Added to the attention of an entry when weights are computed, so that they are never all 0."""
NEWER = 1.2
"""Weight of the newest query when the prompt's entries are ranked; it is 1 for the oldest one and linear between."""


@dataclass(frozen=True)
class KeepKV(Biased):
    """Keeps sinks, heavy hitters of the last queries and a recent window, and merges what it evicts, with votes.

    Every entry carries votes p, 1 at first, and ln p is added to its logit, so that ``p·exp(q·k)`` stands for p
    entries. Its attention s per vote is the mean of ``attention ÷ p`` over the last ``window`` queries that could see
    it. Of the prompt, the first ``sinks`` tokens, the last M tokens and the entries of the highest s before them are
    kept, per KV head (mean over its query heads; here newer queries weigh up to 1.2 times as much). Each decode step
    updates s as a moving average over ``window`` queries, and evicts the entry of the lowest s outside sinks and the
    last M.

    An evicted entry is merged into the kept one c whose key has the highest cosine with its own, if that is at least
    ``threshold``; otherwise it is dropped. With the weights ``w = p·s`` over c and all that are merged into it,

        k_c ← Σ w k ÷ Σ w,   v_c ← Σ w v ÷ Σ w,   s_c ← Σ p s ÷ Σ p,   p_c ← Σ p.

    The authors average exp(logit) where s averages attention: s divides each query's by their sum, so that queries with
    large logits don't outweigh the others, and large logits don't overflow. Their window is as long as the recent part
    of the budget and is stored for every entry; here an entry stores one number.

    Args:
        recent: share of the budget that is the recent window, M tokens.
        sinks: tokens at the start that are never evicted.
        window: number of queries whose attention is averaged.
        threshold: least cosine of a merge.
        equal: what a budget stands for, ``slots`` or ``bytes``: :mod:`d2obench.policies.biased`.
    """

    recent: float = 0.5
    sinks: int = 4
    window: int = 32
    threshold: float = 0.8
    name: ClassVar[str] = "keepkv"
    about: ClassVar[str] = "heavy hitters of the last queries; evicted entries are merged, with votes"
    paper: ClassVar[str] = "KeepKV, arXiv 2504.09936"
    needs_attention: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    @property
    def adds_biases(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        if not 0 < self.recent <= 1:
            raise PolicyError(f"keepkv: recent is {self.recent}", remedy="use a share of the budget in (0, 1]")
        if self.sinks < 0:
            raise PolicyError(f"keepkv: sinks is {self.sinks}", remedy="use 0 or more")
        if self.window < 1:
            raise PolicyError(f"keepkv: window is {self.window}", remedy="use 1 or more")
        if not -1 <= self.threshold <= 1:
            raise PolicyError(f"keepkv: threshold is {self.threshold}", remedy="use a cosine in [-1, 1]")

    def recent_window(self, keep: Tensor) -> Tensor:
        """M for budgets of any shape; at least 1."""
        return torch.round(keep * self.recent).long().clamp_min(1)

    # --- the prompt ---------------------------------------------------------------------------------------------------

    def describe(self, entries: Entries) -> None:
        """Adds "bias", which is ln p; "attention", which is s; and "heavy", by which the prompt's entries are
        ranked."""
        stats = entries.stats
        stats.setdefault("bias", torch.zeros_like(entries.position, dtype=torch.float32))
        seen, real = window_attention(entries, self.window)
        seen = seen.mean(2) / stats["bias"].exp()[:, :, None]
        new = seen.shape[2]
        asked = entries.length[:, None] - new + torch.arange(new, device=seen.device)
        sees = (real[:, None, :, None] & (entries.position[:, :, None] <= asked[:, None, :, None])).float()
        stats["attention"] = seen.sum(2) / sees.sum(2).clamp_min(1)
        weights = torch.linspace(1.0, NEWER, new, device=seen.device)[:, None]
        stats["heavy"] = (seen * weights).sum(2) / (sees * weights).sum(2).clamp_min(TINY)

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(entries.stats["heavy"], entries, self.sinks, self.recent_window(keep))

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        batch, heads, slots = kept.index.shape
        stats, at, gone = entries.stats, *(index.clamp_max(kept.total - 1) for index in (kept.index, kept.evicted))
        if kept.evicted.shape[2] == 0:
            return {}
        keys, values = (pick(held, kept.evicted).flatten(0, 1) for held in (entries.keys, entries.values))
        similarity, target = nearest(keys, kept.keys.flatten(0, 1), kept.filled.flatten(0, 1))
        passed = (similarity >= self.threshold) & kept.leaving.flatten(0, 1)
        votes, own = stats["bias"].exp(), stats["attention"]
        before, leaving = ([held.gather(2, i).flatten(0, 1) for held in (votes, own)] for i in (at, gone))
        targets = Voters(kept.keys.flatten(0, 1), kept.values.flatten(0, 1), *before)
        merged = merge(targets, Voters(keys, values, *leaving), target, passed)
        kept.keys, kept.values = (held.view(batch, heads, slots, -1) for held in (merged.keys, merged.values))
        # an empty slot repeats the last entry; what is written for it must not replace that entry's own
        for name, held in (("bias", merged.votes.log()), ("attention", merged.attention)):
            changed = held.view(batch, heads, slots) - stats[name].gather(2, at)
            stats[name] = stats[name].scatter_add(2, at, changed.masked_fill(~kept.filled, 0.0))
        return {"merged": passed.view(batch, heads, -1).sum(2).float()}

    # --- decoding -----------------------------------------------------------------------------------------------------

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return Custom(LowestScore(self.recent_window(sizes.budget), self.sinks), "entries are merged with votes")

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        state.extra["attention"] = attention = torch.zeros_like(state.score)
        for layer, stats in enumerate(scores):
            held = stats["attention"].flatten(0, 1)
            attention[layer, :, : held.shape[1]] = held

    def observe(self, state: DecodeState) -> None:
        own, filled = state.extra["attention"], state.position >= 0
        assert state.bias is not None
        votes = torch.where(filled, state.bias, 0.0).exp()
        seen = (state.now[None, :, None] - state.position + 1).clamp(1, self.window)
        own += torch.where(filled, (state.attention / votes - own) / seen, 0.0)

    def victims(self, state: DecodeState) -> Tensor:
        assert isinstance(state.rule, Custom) and isinstance(state.rule.inherited, LowestScore)
        sinks = (state.position >= 0) & (state.position < self.sinks)
        shown = state.marked(state.extra["attention"]).masked_fill(sinks, torch.inf)
        return state.least(shown, state.rule.inherited.recent[..., None])

    def absorb_step(self, state: DecodeState, victims: Tensor) -> None:
        store, bias, own = state.store, state.bias, state.extra["attention"]
        assert bias is not None
        for layer, capacity in enumerate(store.capacities):
            slots, position = victims[layer], state.position[layer]
            index = store.base[layer, :, None] + slots
            may = (position >= 0).scatter(1, slots, False)[:, :capacity]
            keys, values = store.read_keys(index), store.read_values(index)
            similarity, target = nearest(keys, store.keys(layer), may)
            passed = (similarity >= self.threshold) & (position.gather(1, slots) >= 0)
            votes, level = bias[layer].exp(), own[layer]
            at = store.base[layer, :, None] + target
            before, leaving = ([held.gather(1, i) for held in (votes, level)] for i in (target, slots))
            targets = Voters(store.read_keys(at), store.read_values(at), *before)
            merged = merge(targets, Voters(keys, values, *leaving), torch.zeros_like(target), passed)
            store.write_keys(at, merged.keys)
            store.write_values(at, merged.values)
            bias[layer].scatter_(1, target, torch.where(passed, merged.votes.log(), bias[layer].gather(1, target)))
            level.scatter_(1, target, merged.attention)
            state.merged[layer] += passed.sum()


@dataclass(frozen=True)
class Voters:
    """Entries with their votes; a row R is a KV head of a sequence.

    Args:
        keys: ``[R, n, d]``.
        values: ``[R, n, d_v]``.
        votes: p, float32 ``[R, n]``.
        attention: s, float32 ``[R, n]``.
    """

    keys: Tensor
    values: Tensor
    votes: Tensor
    attention: Tensor


def merge(kept: Voters, evicted: Voters, target: Tensor, passed: Tensor) -> Voters:
    """The kept entries after evicted ones were merged into them.

    Args:
        target: the merge target of each evicted entry, int64 ``[R, E]``, an index into ``kept``.
        passed: which of them are merged, bool ``[R, E]``.
    """
    slots = kept.votes.shape[1]
    votes = torch.where(passed, evicted.votes, 0.0)
    weight = votes * (evicted.attention + TINY)
    own = kept.votes * (kept.attention + TINY)
    total, keys, values = sums_by_target(target, weight, slots, [evicted.keys, evicted.values])
    more, level = sums_by_target(target, votes, slots, [evicted.attention[..., None]])
    merged_keys, merged_values = (
        torch.where(
            total > 0, ((own[..., None] * held.float() + added) / (own[..., None] + total)).to(held.dtype), held
        )
        for held, added in ((kept.keys, keys), (kept.values, values))
    )
    together = kept.votes + more[..., 0]
    attention = (kept.votes * kept.attention + level[..., 0]) / together.clamp_min(TINY)
    return Voters(merged_keys, merged_values, together, torch.where(more[..., 0] > 0, attention, kept.attention))
