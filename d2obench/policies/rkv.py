"""R-KV: keeps what the newest queries attend to and what does not repeat a newer entry; made for long reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, Policy, window_rank
from d2obench.policies.rules import Custom, DecodeRule, RowSizes

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

TWIN = 0.5
"""Cosine of two keys above which the entries repeat each other."""
CHUNK = 2**24
"""Number of cosines that are computed at once."""


@dataclass(frozen=True)
class RKV(Policy):
    """The newest ``window`` entries, and those of the highest importance less redundancy, per KV head.

    *Importance*: attention of the last ``window`` queries to the entries before them, by the highest logit among the
    query heads of the KV head; its mean over the queries, and the maximum over ``kernel`` neighbours. *Redundancy*: the
    mean cosine of an entry's key with all other keys, softmax over the entries; a key does not count the newest of the
    entries that repeat it (cosine above 0.5), so that of several twins the newest stays. The score is ``mix ·
    importance − (1 − mix) · redundancy``.

    The prompt is cut to the budget in this way, and then the cache, whenever ``interval`` more tokens have been
    decoded: it holds up to ``budget + interval`` entries between.

    Args:
        window: number of queries, and of newest entries that are always kept.
        kernel: number of neighbours to take the maximum over, odd.
        mix: weight of the importance: 0.07 in the authors' code, 0.1 in the paper.
        interval: evict this many entries at once, once in as many decode steps.
    """

    window: int = 8
    kernel: int = 7
    mix: float = 0.07
    interval: int = 128
    name: ClassVar[str] = "rkv"
    about: ClassVar[str] = "what the newest queries attend to and no newer entry repeats; evicts at intervals"
    paper: ClassVar[str] = "R-KV, arXiv 2505.24133"

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    @property
    def decode_queries(self) -> int:
        return self.window

    def check(self) -> None:
        if self.window < 1:
            raise PolicyError(f"rkv: window is {self.window}", remedy="use 1 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"rkv: kernel is {self.kernel}", remedy="use an odd number")
        if not 0 <= self.mix <= 1:
            raise PolicyError(f"rkv: mix is {self.mix}", remedy="use a weight in [0, 1]")
        if self.interval < 1:
            raise PolicyError(f"rkv: interval is {self.interval}", remedy="use 1 or more steps")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        assert entries.queries is not None
        heads, position, queries = entries.keys.shape[1], entries.position, entries.queries[:, :, -self.window :]
        queries = queries.float().reshape(len(queries) * heads, -1, *queries.shape[2:])
        old, real = position < entries.length[:, None, None] - self.window, position >= 0
        keys, real, old = (held.flatten(0, 1) for held in (entries.keys, real, old))
        score = self._score(queries * entries.scale, keys, real, old)
        return window_rank(score.view(position.shape), entries, 0, keep.clamp_max(self.window))

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return Custom(None, "redundancy compares all keys")

    def observe(self, state: DecodeState) -> None:
        """The decode state keeps the queries that are needed."""

    def victims(self, state: DecodeState) -> Tensor:
        assert state.queries is not None
        found = torch.zeros(state.position.shape, device=state.now.device)
        newest = state.now[:, None] - self.window
        for layer, capacity in enumerate(state.store.capacities):
            # in the order of positions, slots without an entry first
            position, order = state.position[layer, :, :capacity].sort(dim=-1, stable=True)
            keys = state.store.keys(layer)
            keys = keys.gather(1, order[..., None].expand_as(keys))
            score = self._score(state.queries[layer].float() * state.scale, keys, position >= 0, position <= newest)
            found[layer].scatter_(1, order, score)
        return state.least(state.marked(found), self.window)

    def _score(self, queries: Tensor, keys: Tensor, real: Tensor, old: Tensor) -> Tensor:
        """Scores of entries in the order of their positions, float32 ``[R, N]``; a row R is a KV head of a sequence.

        Args:
            queries: ``[R, G, n, d]``, times the factor of logits; one that is 0 is padding.
            keys: ``[R, N, d]``.
            real: bool ``[R, N]``, which are entries.
            old: bool ``[R, N]``, which are before all the queries.
        """
        keys, queries, old = keys.float(), queries.float(), old & real
        # 1. importance
        logits = (queries @ keys[:, None].transpose(2, 3)).amax(1)
        weights = torch.softmax(logits.masked_fill(~old[:, None], -torch.inf), -1).nan_to_num(0.0)
        asked = (queries != 0).any(-1).any(1)[..., None]
        mean = (weights * asked).sum(1) / asked.sum(1).clamp_min(1)
        importance = F.max_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)
        # 2. redundancy
        repeated = redundancy(keys, real).masked_fill(~real, -torch.inf).softmax(-1).nan_to_num(0.0)
        return self.mix * importance - (1 - self.mix) * repeated


def redundancy(keys: Tensor, real: Tensor) -> Tensor:
    """The mean cosine of each key ``[R, N, d]`` with the other real ones, where those don't count it as their newest
    twin, float32 ``[R, N]``. Keys are in the order of positions."""
    rows, count = real.shape
    unit = F.normalize(keys, dim=-1, eps=1e-8) * real[..., None]
    found = torch.zeros(rows, count, device=keys.device)
    place = torch.arange(count, device=keys.device)
    some = max(1, CHUNK // max(1, count * count))
    for first in range(0, rows, some):
        part = unit[first : first + some]
        cosines = part @ part.transpose(1, 2)
        cosines.diagonal(dim1=1, dim2=2).zero_()
        newest = torch.where(cosines > TWIN, place, -1).amax(-1, keepdim=True)
        found[first : first + some] = cosines.masked_fill_(place == newest, 0.0).sum(1)
    return found / real.sum(1, keepdim=True).clamp_min(1)
