"""One prefill for several policies: prompts that were read once, from which the caches of all of them begin.

The full keys and values of a prompt do not depend on the policy; only the statistics that are gathered on the way do.
So a :class:`d2obench.cache.session.Reading` holds the union of what several policies need (``Needs`` of each, joined by
``|``). Every cache that begins from it takes the same entries, which nothing changes, with the statistics that it would
have gathered itself (``PolicyCache.begin_from``), and then compresses its own copy.

The numbers are those of a prefill of its own, bit for bit on a CPU. There, attention with column sums and attention
without them round differently (``d2obench.attention.prompt``), and so does a policy that keeps keys per query head.
:class:`Way` tells these apart: policies share a reading if their own prefill would take the same way.

At most one reading is held at a time, in the device's memory, and none where it would take more than its share of what
is free: then each policy reads for itself. Beside it there is one compressed cache. Reading for one policy alone is
left to its session, which may free each layer as soon as it is compressed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor

from d2obench.attention import interface
from d2obench.cache.session import Reading, Session
from d2obench.policies.base import Needs, Policy
from d2obench.suite.grammar import Budget

if TYPE_CHECKING:
    from d2obench.models import LoadedModel

SHARE = 0.5
"""Largest share of the device's free memory that a reading may be predicted to take."""


class Way(NamedTuple):
    """What a policy's prefill computes, as far as the rounding of its results depends on it.

    Args:
        columns: column sums of the attention map are gathered.
        heads: they are kept per query head.
        query_heads: keys and values are cached per query head.
    """

    columns: bool
    heads: bool
    query_heads: bool


def needs_of(policy: Policy, budget: Budget | None) -> Needs:
    """The statistics that a policy's prefill gathers: none if the budget keeps everything."""
    everything = not policy.takes_budget or (budget is not None and budget.ratio == 1.0)
    return Needs() if everything else policy.needs


def way_of(policy: Policy, budget: Budget | None) -> Way | None:
    """The way that a policy's own prefill takes; None if it cuts the prompt while it reads it, so that what it reads is
    its own."""
    needs, everything = needs_of(policy, budget), budget is not None and budget.ratio == 1.0
    if policy.block and not everything:
        return None
    return Way(needs.columns or needs.squares, needs.heads, policy.caches_query_heads)


@dataclass(frozen=True)
class Reader(Policy):
    """Compresses nothing: reads prompts for other policies.

    Args:
        asked: the union of the statistics that they need.
        query_heads: whether they cache keys and values per query head.
    """

    asked: Needs = field(default_factory=Needs)
    query_heads: bool = False

    @property
    def needs(self) -> Needs:
        # the sums over last queries are computed from these queries, for each window apart
        return replace(self.asked, window=0, queries=max(self.asked.queries, self.asked.window))

    @property
    def caches_query_heads(self) -> bool:
        return self.query_heads

    @property
    def budgets_need_stats(self) -> bool:
        return True  # so that every layer keeps its entries


class Readings:
    """Reads prompts once for the sessions of several policies that are opened one after the other.

    Args:
        asked: the policies and budgets of all of these sessions.
        share: largest share of the device's free memory that a reading may be predicted to take.
    """

    def __init__(self, asked: Iterable[tuple[Policy, Budget | None]], share: float = SHARE) -> None:
        self._share = share
        self._needs: dict[Way, Needs] = {}
        self._users: Counter[Way] = Counter()
        for policy, budget in asked:
            way = way_of(policy, budget)
            if way is None:
                continue
            self._needs[way] = self._needs.get(way, Needs()) | needs_of(policy, budget)
            self._users[way] += 1
        self._held: tuple[Any, Reading] | None = None

    def prefill(self, session: Session, prompts: Sequence[list[int]]) -> Tensor:
        """As :meth:`Session.prefill`, from prompts that were read before, if they can be shared."""
        given = [list(prompt) for prompt in prompts]
        if type(session) is not Session or session.policy is None:
            return session.prefill(given)
        way = way_of(session.policy, session.budget)
        if way is None or self._users[way] < 2:
            return session.prefill(given)
        key = (way, [*map(tuple, given)])
        if self._held is None or self._held[0] != key:
            self._held = None  # freed before the next one is read
            if not self._fits(session.loaded, way, given):
                return session.prefill(given)
            self._held = key, self._read(session.loaded, way, given)
        return session.begin(self._held[1])

    def _read(self, loaded: LoadedModel, way: Way, prompts: list[list[int]]) -> Reading:
        session = Session(loaded, Reader(self._needs[way], way.query_heads), Budget(tokens=1), max_new=0)
        return session.read(prompts)

    def _fits(self, loaded: LoadedModel, way: Way, prompts: list[list[int]]) -> bool:
        """Whether the entries and statistics of these prompts are predicted to take no more than their share."""
        heads, group = interface.kv_heads(loaded.model)
        rows = heads * group if way.query_heads else heads
        entry = 2 * loaded.head_dim * loaded.dtype.itemsize + 2 * torch.float32.itemsize  # key, value, two sums
        needed = len(prompts) * max(map(len, prompts)) * loaded.layers * rows * entry
        if loaded.device.type == "cuda":
            free = torch.cuda.mem_get_info(loaded.device)[0]
        else:
            free = psutil.virtual_memory().available
        return bool(needed <= self._share * free)
