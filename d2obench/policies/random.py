"""Random eviction: the floor that every rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from d2obench.policies.base import Entries, Policy, Stats
from d2obench.policies.drawing import uniform

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


@dataclass(frozen=True)
class Random(Policy):
    """A uniform sample of all tokens so far, drawn per layer and KV head.

    Every token draws a number once, from the seed and its place; the ``budget`` highest are held at any time, which is
    a uniform sample without replacement of whatever was read. Nothing is protected, the newest token neither.
    """

    name: ClassVar[str] = "random"
    about: ClassVar[str] = "a uniform random sample: the floor"
    paper: ClassVar[str] = "none"

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        heads = entries.first_head + torch.arange(entries.position.shape[1], device=entries.position.device)[:, None]
        draw = uniform(entries.seed, entries.layer, heads, entries.position)
        return draw.masked_fill(entries.position < 0, -torch.inf)

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        held = self._draw(state, state.position)
        slots = torch.arange(held.shape[-1], device=held.device)
        held.masked_fill_(state.position < 0, -torch.inf)
        # slots beyond the usable ones are never taken
        state.extra["draw"] = held.masked_fill_(slots >= state.usable[..., None], torch.inf)

    def victims(self, state: DecodeState) -> Tensor:
        draw, at = state.extra["draw"], state.slot[..., None]
        draw.scatter_(2, at, self._draw(state, state.now[None, :, None].expand(at.shape)))
        return state.least(draw, 0)

    def _draw(self, state: DecodeState, position: Tensor) -> Tensor:
        return uniform(state.seed, *state.places(), position)
