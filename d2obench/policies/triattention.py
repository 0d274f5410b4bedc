"""TriAttention: keys are scored by what the model's mean query would pay them from many positions to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.base import Entries, Stats
from d2obench.policies.calibration import GENERATED, read
from d2obench.policies.protect import Protecting
from d2obench.policies.rotary import turned
from d2obench.policies.rules import Custom, DecodeRule, RowSizes

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

OFFSETS = 17
"""Number of positions ahead at which queries are assumed: 1, 2, 4, …, 65,536 tokens from the present one."""
LEAST = 1e-6
"""The smallest standard deviation of scores that is divided by."""


@dataclass(frozen=True)
class TriAttention(Protecting):
    """The entries whose keys score highest, per KV head; no attention is needed, and no token is protected.

    For each query head, E[q] is the mean of the queries before their rotation, and E|q_f| the mean length of their
    rotary pair f: statistics of the model, measured once on plain text. With t tokens read so far, the key k at
    position p scores, as a mean over the offsets δ = 1, 2, 4, …, 65,536,

        Σ_f |E[q_f]|·|k_f|·cos(ω_f(t − p + δ) + φ_f) + (E|q_f| − |E[q_f]|)·|k_f|,

    with φ_f the angle between E[q_f] and k_f before their rotation, and ω_f the pair's angle per position. Channels
    that are not rotated add the product of key and mean query. A head's scores are then standardised over its entries,
    and an entry has the highest of those of the query heads that share its KV head.

    The prompt is cut to the budget in this way, and then the cache, whenever ``interval`` more tokens have been
    decoded: it holds up to ``budget + interval`` entries between. Published with the whole prompt kept:
    ``protect=prompt``. The authors also choose together for all layers; here every layer and KV head chooses alone,
    which is their mode ``per_layer_perhead``.

    Args:
        stats: a file that ``d2obench calibrate`` wrote; or ``generated``: the statistics are measured when they are
            first needed, on 4,096 tokens of generated prose, which is of the kind that the tasks fidelity, recall and
            needle read. (A model without a tokenizer reads a few random tokens; only its speed means something.)
        interval: evict this many entries at once, once in as many decode steps.
        protect: ``prompt`` keeps the whole prompt (:mod:`d2obench.policies.protect`).
    """

    stats: str = GENERATED
    interval: int = 128
    name: ClassVar[str] = "triattention"
    about: ClassVar[str] = "what the model's mean query would attend to from afar; evicts at intervals"
    paper: ClassVar[str] = "TriAttention, arXiv 2604.04921"

    @property
    def calibration(self) -> str:
        return self.stats

    @property
    def files(self) -> tuple[str, ...]:
        return () if self.stats == GENERATED else (self.stats,)

    def check(self) -> None:
        if self.interval < 1:
            raise PolicyError(f"triattention: interval is {self.interval}", remedy="use 1 or more steps")
        if self.stats != GENERATED:
            read(self.stats)

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        if entries.rotary is None:
            raise _without_rotary()
        batch, heads, total, width = entries.keys.shape
        mean, size = self._of(entries.layer, heads, entries.first_head, entries.keys.device)
        mean, size = (held.repeat(batch, 1, 1) for held in (mean, size))
        now = entries.length.repeat_interleave(heads)
        real = (entries.position >= 0).flatten(0, 1)
        scores = head_scores(entries.keys.reshape(-1, total, width), now, mean, size, entries.rotary)
        return highest(scores, real).view(batch, heads, total).masked_fill(entries.position < 0, -torch.inf)

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        return Custom(None, "keys are scored by their positions", sinks=0)

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        """Keeps the statistics of each layer and row, ``[layers, rows, G, …]``."""
        batch = state.position.shape[1] // state.heads
        found = [
            self._of(state.first_layer + layer, state.heads, state.first_head, state.now.device)
            for layer in range(len(state.prompts))
        ]
        for name, held in zip(("mean", "size"), zip(*found, strict=True), strict=True):
            state.extra[name] = torch.stack(held).repeat(1, batch, 1, 1)

    def observe(self, state: DecodeState) -> None:
        """Scores depend on keys and positions only."""

    def victims(self, state: DecodeState) -> Tensor:
        if state.rotary is None:
            raise _without_rotary()
        rule = state.rule
        assert isinstance(rule, Custom)
        before = rule.sinks if isinstance(rule.sinks, Tensor) else torch.zeros_like(state.usable)
        found = torch.zeros(state.position.shape, device=state.now.device)
        now = state.now.long() + 1
        for layer, capacity in enumerate(state.store.capacities):
            position = state.position[layer, :, :capacity]
            scores = head_scores(
                state.store.keys(layer), now, state.extra["mean"][layer], state.extra["size"][layer], state.rotary
            )
            found[layer, :, :capacity] = highest(scores, position >= before[layer, :, None].clamp_min(0))
        kept = (state.position >= 0) & (state.position < before[..., None])
        return state.least(state.marked(found.masked_fill_(kept, torch.inf)), 0)

    def _of(self, layer: int, heads: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Statistics of the KV heads of a layer from ``first`` on, ``[H, G, d]`` and ``[H, G, r/2]``."""
        given = self.statistics
        if given is None and self.stats != GENERATED:
            given = read(self.stats)
        if given is None:
            raise PolicyError(
                "triattention needs statistics of the model's queries",
                why="the cache was made without its model",
                remedy="give stats=FILE, a file that d2obench calibrate wrote",
            )
        mean, size = (held[layer, first : first + heads].to(device) for held in (given.mean, given.size))
        return mean, size


def head_scores(keys: Tensor, now: Tensor, mean: Tensor, size: Tensor, rotary: Tensor) -> Tensor:
    """Scores of rotated keys for each query head, float32 ``[R, G, N]``; a row R is a KV head of a sequence.

    Args:
        keys: ``[R, N, d]``.
        now: number of tokens so far, int64 ``[R]``.
        mean: E[q], ``[R, G, d]``.
        size: E|q_f|, ``[R, G, r/2]``.
        rotary: rotation angle per position of each rotary pair, ``[r/2]``.
    """
    # 1. the mean query, turned to the positions ahead and averaged; its product with a rotated key is the sum of
    #    cosines. Angles of far positions need more digits than float32 has.
    half, keys = len(rotary), keys.float()
    ahead = now[:, None] + 2 ** torch.arange(OFFSETS, device=now.device)
    angles = ahead[..., None].double() * rotary.double()
    cos, sin = (held.mean(1)[:, None].float() for held in (angles.cos(), angles.sin()))
    scores = turned(mean, cos, sin) @ keys.transpose(1, 2)
    # 2. what the lengths of the queries' pairs exceed those of their mean by
    excess = size - torch.hypot(mean[..., :half], mean[..., half : 2 * half])
    return scores + excess @ torch.hypot(keys[..., :half], keys[..., half : 2 * half]).transpose(1, 2)


def highest(scores: Tensor, counted: Tensor) -> Tensor:
    """The highest standardised score of each entry, float32 ``[R, N]``.

    Args:
        scores: ``[R, G, N]``.
        counted: bool ``[R, N]``, the entries that compete.
    """
    counted = counted[:, None]
    count = counted.sum(-1, keepdim=True).clamp_min(1)
    apart = scores - (scores * counted).sum(-1, keepdim=True) / count
    spread = ((apart * counted).square().sum(-1, keepdim=True) / count).sqrt().clamp_min(LEAST)
    return (apart / spread).amax(1)


def _without_rotary() -> PolicyError:
    return PolicyError(
        "triattention: this model's positions can't be undone",
        why="its rotary angles depend on the length of the text",
        remedy="use another policy",
    )
