"""StreamingLLM and the plain local window: sinks and the most recent tokens, nothing by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Policy, Stats, window_rank

if TYPE_CHECKING:
    from d2obench.engine.state import DecodeState


@dataclass(frozen=True)
class Streaming(Policy):
    """The first ``sinks`` tokens and the last ``budget − sinks``.

    Keys keep the rotary position they were read at ("true positions"). The paper's demo re-indexes positions inside
    the cache.

    Args:
        sinks: tokens at the start that are never evicted.
    """

    sinks: int = 4
    name: ClassVar[str] = "streaming"
    about: ClassVar[str] = "attention sinks and a recent window"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    def check(self) -> None:
        if self.sinks < 0:
            raise PolicyError(f"{self.name}: sinks is {self.sinks}", remedy="use 0 or more")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, self.sinks, keep)

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        state.extra["last"] = state.usable - 1
        state.extra["first"] = (state.usable - 1).clamp_max(self.sinks)

    def victims(self, state: DecodeState) -> Tensor:
        """The slots are a ring behind the sinks: the oldest token stands one slot after the newest."""
        after = state.slot + 1
        return torch.where(after > state.extra["last"], state.extra["first"], after)[..., None]


@dataclass(frozen=True)
class Local(Streaming):
    """The last ``budget`` tokens only."""

    sinks: int = 0
    name: ClassVar[str] = "local"
    about: ClassVar[str] = "a recent window only"
    paper: ClassVar[str] = "the usual sliding window"
