"""LagKV: keeps the entries that vary most when they are scaled by the entries that follow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import RECENT, Entries
from d2obench.policies.prompt_only import PromptOnly
from d2obench.policies.roco import places

TINY = 1e-12


@dataclass(frozen=True)
class LagKV(PromptOnly):
    """Sinks, the last tokens, and of every chunk of the prompt the entries that stand out against the next chunk.

    Behind the ``sinks``, the entries are divided into chunks of ``lag``. In each channel, a chunk is scaled by the
    minimum and the maximum of the chunk after it; an entry's score is the standard deviation over its channels, softmax
    over its chunk, as the mean of its key's and its value's. An entry is ranked by its place within its chunk, so that
    every chunk keeps about the same share. The last whole chunk and what is behind it are kept first, then the rest by
    place. A prompt of less than two chunks keeps sinks and its newest tokens. No attention is needed. Decoding evicts
    nothing by itself (``decode``).

    Args:
        window, decode, block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
        lag: number of entries in a chunk.
        sinks: tokens at the start that are kept first.
    """

    lag: int = 128
    sinks: int = 4
    name: ClassVar[str] = "lagkv"
    about: ClassVar[str] = "what stands out against the next chunk; the prompt only"
    paper: ClassVar[str] = "LagKV, arXiv 2504.04704"

    @property
    def protected(self) -> int:
        return self.sinks

    def check(self) -> None:
        super().check()
        if self.lag < 2:
            raise PolicyError(f"lagkv: lag is {self.lag}", remedy="use 2 or more")
        if self.sinks < 0:
            raise PolicyError(f"lagkv: sinks is {self.sinks}", remedy="use 0 or more")

    def importance(self, entries: Entries) -> Tensor:
        position = entries.position
        total = position.shape[2]
        score = RECENT + 1e14 * position.float()
        counts = (position >= 0).sum(-1)
        for sequence, head in itertools.product(*map(range, counts.shape)):
            # entries are sorted by position, padding first
            count = int(counts[sequence, head])
            first, chunks = total - count + self.sinks, (count - self.sinks) // self.lag
            if chunks < 2:
                continue
            last = first + chunks * self.lag
            parts = (held[sequence, head, first:last].float() for held in (entries.keys, entries.values))
            keys, values = (self._outstanding(part, chunks) for part in parts)
            place = places(keys + values, descending=False)
            score[sequence, head, first : last - self.lag] = place.flatten() / self.lag
        return score

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        first = (entries.position >= 0) & (entries.position < self.sinks)
        rank = self.importance(entries).masked_fill(first, torch.inf)
        return rank.masked_fill(entries.position < 0, -torch.inf)

    def _outstanding(self, held: Tensor, chunks: int) -> Tensor:
        """Scores ``[chunks − 1, lag]`` of keys or values ``[chunks·lag, d]``."""
        parts = held.view(chunks, self.lag, -1)
        low, high = (bound[1:, None] for bound in (parts.amin(1), parts.amax(1)))
        scaled = (parts[:-1] - low) / (high - low).clamp_min(TINY)
        return scaled.std(-1).softmax(-1)
