"""StreamingLLM and the plain local window: sinks and the most recent tokens, independent of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Needs, Stats, window_rank
from d2obench.policies.mass import MassMerging
from d2obench.policies.protect import Protecting
from d2obench.policies.rotary import rotate
from d2obench.policies.rules import Custom, DecodeRule, Ring, RowSizes

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState


@dataclass(frozen=True)
class Streaming(MassMerging, Protecting):
    """The first ``sinks`` tokens and the last ``budget − sinks``.

    With re-indexed positions, a token's position is its place in the cache, so that no distance exceeds the budget.
    Rotary attention depends only on distances, and the window is one contiguous run of tokens; so only the sinks move
    closer, by the number of tokens evicted so far. Before each step their keys are rotated by that amount (always from
    the original keys, so no error accumulates); all other keys stay as they are. The prompt itself is read with true
    positions.

    Args:
        sinks: tokens at the start that are never evicted.
        positions: ``true``, the original positions; ``cache``, positions within the cache, as in the authors' code.
        merge: ``none``, as published, or ``mass`` (:mod:`d2obench.policies.mass`).
        equal: with ``merge=mass``, what a budget stands for, ``slots`` or ``bytes``:
            :mod:`d2obench.policies.biased`.
        protect: ``prompt`` keeps the whole prompt (:mod:`d2obench.policies.protect`).
    """

    sinks: int = 4
    positions: Literal["true", "cache"] = "true"
    name: ClassVar[str] = "streaming"
    about: ClassVar[str] = "attention sinks and a recent window"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    def check(self) -> None:
        super().check()
        if self.sinks < 0:
            raise PolicyError(f"{self.name}: sinks is {self.sinks}", remedy="use 0 or more")
        if self.positions == "cache":
            self.refuse_protection("positions=cache", "only sinks are moved closer, not a whole prompt")
        if self.merge == "mass" and self.positions == "cache":
            raise PolicyError(
                f"{self.name}: merge=mass needs true positions",
                why="keys that are rotated anew in every step can't be compared with others",
                remedy="leave positions at true",
            )

    @property
    def needs(self) -> Needs:
        return Needs(columns=self.merge == "mass")

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(torch.zeros_like(entries.position, dtype=torch.float32), entries, self.sinks, keep)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        ring = Ring(sizes.leading(sizes.budget.clamp_max(self.sinks)))
        return Custom(ring, "sinks are rotated to new positions") if self.positions == "cache" and self.sinks else ring

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        if self.positions == "cache" and self.sinks:
            if state.rotary is None:
                raise PolicyError(
                    f"{self.name}: this model's positions can't be re-indexed", remedy="leave positions at true"
                )
            state.extra["read"] = state.store.read_keys(self._sinks(state))
            self._move(state)

    def recall(self, state: DecodeState) -> Stats:
        """As of every policy, after the sinks' keys were rotated back to their original positions."""
        if "read" in state.extra:
            self._write(state, state.extra["read"])
        return super().recall(state)

    def victims(self, state: DecodeState) -> Tensor:
        """The ring's victim, after the sinks were rotated; used only for re-indexed positions."""
        self._move(state)
        return super().victims(state)

    def _sinks(self, state: DecodeState) -> Tensor:
        """Rows of the sinks' slots, ``[layers, rows, sinks]``."""
        slots = torch.arange(min(self.sinks, min(state.store.capacities)), device=state.now.device)
        return state.store.base[..., None] + slots

    def _move(self, state: DecodeState) -> None:
        """Rotates the sinks' keys to the positions at which the next token should see them."""
        assert state.rotary is not None
        nearer = (state.now + 2 - state.usable).clamp_min(0)[..., None, None]
        read = state.extra["read"]
        # a sink that was decoded, not part of the prompt, is added as long as nothing has been evicted
        read.copy_(torch.where(nearer == 0, state.store.read_keys(self._sinks(state)), read))
        self._write(state, rotate(read, nearer * state.rotary))

    def _write(self, state: DecodeState, keys: Tensor) -> None:
        index = self._sinks(state)
        slots = torch.arange(index.shape[-1], device=index.device)
        mine = (slots < (state.usable - 1).clamp_max(self.sinks)[..., None])[..., None]
        state.store.write_keys(index, torch.where(mine, keys, state.store.read_keys(index)))


@dataclass(frozen=True)
class Local(Streaming):
    """The last ``budget`` tokens only."""

    sinks: int = 0
    name: ClassVar[str] = "local"
    about: ClassVar[str] = "a recent window only"
    paper: ClassVar[str] = "the usual sliding window"
