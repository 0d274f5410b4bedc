"""CaM, cache merging: a value that leaves the recent window is now and then shared out among those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Policy, Stats, window_rank
from d2obench.policies.drawing import uniform

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


@dataclass(frozen=True)
class CaM(Policy):
    """The first tokens and the last, and while decoding a merge of values, as in the authors' code.

    When token i leaves the recent window, its attention in that step over the mean attention of the younger ones,
    clamped to [0, 1], is the chance that ``value / merged`` is added to the next ``merged`` values; keys are lost.
    Per KV head, attention as mean over its query heads. The prompt is evicted without merging. The authors' code shares
    a token out one step before it leaves; here it is the step in which it leaves.

    Args:
        start: share of the budget kept from the start; the rest is the recent window.
        merged: values that a lost one is shared out among.
        merge: whether to merge at all.
    """

    start: float = 0.5
    merged: int = 32
    merge: bool = True
    name: ClassVar[str] = "cam"
    about: ClassVar[str] = "start and recent window, with a random merge of values"
    paper: ClassVar[str] = "CaM, ICML 2024"
    needs_attention: ClassVar[bool] = True

    def check(self) -> None:
        if not 0 <= self.start < 1:
            raise PolicyError(f"cam: start is {self.start}", remedy="use a share of the budget in [0, 1)")
        if self.merged < 1:
            raise PolicyError(f"cam: merged is {self.merged}", remedy="use 1 or more")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        first = (keep * self.start).long()[:, None, None].to(entries.position.device)
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, first, keep)

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        last = state.usable - 1
        state.extra["last"], state.extra["first"] = last, (last * self.start).long()
        state.extra["merged"] = torch.zeros(len(last), dtype=torch.long, device=last.device)

    def victims(self, state: DecodeState) -> Tensor:
        """The slots are a ring behind the start, as in :class:`d2obench.policies.streaming.Streaming`."""
        after = state.slot + 1
        return torch.where(after > state.extra["last"], state.extra["first"], after)[..., None]

    def absorb_step(self, state: DecodeState, victims: Tensor) -> None:
        if not self.merge:
            return
        store, first = state.store, state.extra["first"][..., None]
        ring = state.extra["last"][..., None] - first + 1
        born = state.position.gather(2, victims)
        share = self._drawn(state, victims, born)
        step = torch.arange(1, min(self.merged, state.position.shape[-1]) + 1, device=born.device)
        slots = torch.where(step < ring, first + (victims - first + step) % ring, victims)
        index, leaving = store.base[..., None] + slots, store.base[..., None] + victims
        added = share[..., None].float() / self.merged * store.read_values(leaving).float()
        store.write_values(index, (store.read_values(index).float() + added).to(store.dtype))
        state.extra["merged"] += share.sum((1, 2))

    def _drawn(self, state: DecodeState, victims: Tensor, born: Tensor) -> Tensor:
        """Whether each leaving token is shared out, bool ``[layers, rows, 1]``."""
        younger = state.position > born
        mean = (state.attention * younger).sum(-1, keepdim=True) / younger.sum(-1, keepdim=True)
        chance = (state.attention.gather(2, victims) / mean).nan_to_num(0.0)
        return (uniform(state.seed, *state.places(), born) < chance) & (born >= 0)
