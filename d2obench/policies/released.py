"""``d2o(preset=released)``: D2O as its authors' code of March 2025 does it, for validation at batch 1.

Differences from the paper: every query head has its own cache; the prompt is compressed after the first decode step;
the variance of the column sums is min–max normalised over the heads of a layer, so it carries no information about
layers; the first two layers and the last are never compressed and grow; heavy and recent tokens get equal shares; there
is one threshold per layer, compared with a mean over heads of the similarities of unrelated entries (those with the
same rank among each head's evicted entries); the threshold's moving average has β = 0.5; a merge is the mean of
cosine-scaled vectors.

Not reproduced: float16 sums, and what raises an error at other sizes. In a batch each sequence is treated as the
authors' code treats a single one.

The authors' module never resets its thresholds between prompts. It equals this policy on the first prompt of a process
and merges far less later (on the same prompt again, 4,275 of 58,941 evicted entries instead of 27,882).
``carry_threshold=true`` reproduces that too, for data sets as the authors' script runs them: one prompt at a time, with
results that depend on the order of the prompts.

What the authors' code does silently, and this policy does not:

* A layer whose cache size (from budget and prompt) is at least the prompt's length is never compressed and grows
  without limit; at exactly the prompt's length its scores stay those of the prompt in every step.
* With fewer than four heavy tokens the four sinks, whose scores are infinite, tie, and some of them are dropped.
* Heavy and recent shares may differ there (.05 and .15 in an older README); here both are half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.allocation import density
from d2obench.policies.base import Entries, Kept, Needs, Policy, Stats, window_rank
from d2obench.policies.merging import nearest
from d2obench.policies.rules import Custom, DecodeRule, LowestScore, RowSizes
from d2obench.suite.grammar import Budget

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

SINKS = 4
BETA = 0.5
FLOOR = 0.01


@dataclass(frozen=True)
class Released(Policy):
    """D2O as in its authors' code; the module's docstring lists the differences from the paper.

    Args:
        carry_threshold: whether thresholds are kept from one prompt to the next.
    """

    carry_threshold: bool = False
    carried: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The last prompt's thresholds, ``[layers, rows]``, for ``carry_threshold``."""
    name: ClassVar[str] = "d2o"
    about: ClassVar[str] = "D2O as released"
    paper: ClassVar[str] = "D2O, arXiv 2406.13035; github.com/AIoT-MLSys-Lab/D2O"
    needs_attention: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return Needs(columns=True)

    @property
    def caches_query_heads(self) -> bool:
        return True

    @property
    def judges_heads_together(self) -> bool:
        return True

    @property
    def carries_over(self) -> bool:
        return self.carry_threshold

    @property
    def compresses_after_first_step(self) -> bool:
        return True

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        layers = len(stats)
        skew = torch.stack([_skew(stat["sum"], length) for stat in stats]).cpu()
        ratio = torch.tensor([budget.ratio or budget.of(n) / n for n in length.tolist()])
        shares = (torch.softmax(-skew, 0) * layers * ratio).clamp(FLOOR, 1.0)
        # at least one heavy token and one recent one: with none, the authors' code raises an error
        budgets = 2 * ((length.cpu() + 1) * shares / 2).long().clamp_min(1)
        exempt = [layer for layer in (0, 1, layers - 1) if layer < layers]
        budgets[exempt] = -1
        return budgets

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        half = (keep // 2).to(entries.position.device)
        sinks = half.clamp_max(SINKS)[:, None, None]
        return window_rank(entries.stats["sum"], entries, sinks, half)

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        batch, heads, slots = kept.index.shape
        leaving = kept.leaving
        at = kept.evicted.clamp_max(kept.total - 1)[..., None]
        keys = entries.keys.gather(2, at.expand(-1, -1, -1, entries.keys.shape[-1])).flatten(0, 1)
        values = entries.values.gather(2, at.expand(-1, -1, -1, entries.values.shape[-1])).flatten(0, 1)
        similarity, target = nearest(keys, kept.keys.flatten(0, 1), kept.filled.flatten(0, 1))
        aligned = similarity.view(batch, heads, -1).mean(1)
        real = leaving[:, 0]
        tau = torch.where(real, aligned, 0.0).sum(1) / real.sum(1)
        if self.carry_threshold:
            tau = self._followed(entries.layer, heads, tau)
        passed = ((aligned >= tau[:, None]) & real)[:, None].expand_as(leaving).flatten(0, 1)
        shape = (batch, heads, slots, -1)
        kept.keys = scaled_mean(kept.keys.flatten(0, 1), keys, target, similarity, passed).view(shape)
        kept.values = scaled_mean(kept.values.flatten(0, 1), values, target, similarity, passed).view(shape)
        return {
            "threshold": tau[:, None].expand(batch, heads),
            "merged": passed.sum(1).view(batch, heads).float(),
        }

    def _followed(self, layer: int, heads: int, newest: Tensor) -> Tensor:
        """The threshold of a prompt, ``[1]``, updated from that of the previous prompt."""
        if len(newest) > 1:
            raise PolicyError(
                "d2o(preset=released,carry_threshold=true) runs one prompt at a time",
                why="each prompt's threshold follows that of the prompt before",
                remedy="use a batch of 1",
            )
        last = self.carried.get("last")
        if last is None or layer >= len(last) or last.shape[1] != heads or bool(last[layer, 0].isnan()):
            return newest
        return BETA * newest + (1 - BETA) * last[layer, :1]

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        half = sizes.budget // 2
        return Custom(LowestScore(half, half.clamp_max(SINKS)), "the released code's own merge")

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        none = torch.full((state.store.rows,), math.nan, device=state.store.device)
        state.extra["threshold"] = torch.stack(
            [remembered["threshold"].flatten() if remembered else none for remembered in memory]
        )
        if self.carry_threshold:
            self.carried["last"] = state.extra["threshold"]  # decoding changes it in place

    def absorb_step(self, state: DecodeState, victims: Tensor) -> None:
        store, tau = state.store, state.extra["threshold"]
        for layer in range(victims.shape[0]):
            leaving = state.position[layer].gather(1, victims[layer])
            index = store.base[layer, :, None] + victims[layer]
            targets = (state.position[layer] >= 0).scatter(1, victims[layer], False)[:, : store.capacities[layer]]
            similarity, target = nearest(store.read_keys(index), store.keys(layer), targets)
            grouped = similarity.view(-1, state.heads)
            newest = grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)
            old, gone = tau[layer], leaving[:, 0] >= 0
            smoothed = torch.where(old.isnan(), newest, BETA * newest + (1 - BETA) * old)
            tau[layer] = torch.where(gone, smoothed, old)
            passed = (gone & (newest >= smoothed))[:, None]
            keys, values = store.read_keys(index), store.read_values(index)
            at = store.base[layer, :, None] + target
            for read, write, evicted in (
                (store.read_keys, store.write_keys, keys),
                (store.read_values, store.write_values, values),
            ):
                kept = read(at)
                mixed = (kept.float() + similarity[..., None] * evicted.float()) / 2
                write(at, torch.where(passed[..., None], mixed.to(kept.dtype), kept))
            state.merged[layer] += passed.sum()


def scaled_mean(kept: Tensor, evicted: Tensor, target: Tensor, similarity: Tensor, passed: Tensor) -> Tensor:
    """``(x_j + Σ u_i x_i) / (1 + n_j)`` over the n_j merged entries of each merge target.

    Args:
        kept: ``[R, C, d]``.
        evicted: ``[R, E, d]``.
        target: int64 ``[R, E]``.
        similarity: u, float32 ``[R, E]``.
        passed: bool ``[R, E]``.
    """
    count = torch.zeros(kept.shape[:2], device=kept.device).scatter_add_(1, target, passed.float())
    scaled = (similarity * passed)[..., None] * evicted.float()
    total = kept.float().scatter_add(1, target[..., None].expand_as(scaled), scaled)
    return torch.where(count[..., None] > 0, (total / (1 + count[..., None])).to(kept.dtype), kept)


def _skew(column_sums: Tensor, length: Tensor) -> Tensor:
    """Mean over heads of the min–max normalised variances ``[B, Hq, L]`` → float32 ``[B]``."""
    spread = torch.stack([density(column_sums[:, head], length) for head in range(column_sums.shape[1])], 1)
    low, high = spread.amin(1, keepdim=True), spread.amax(1, keepdim=True)
    return ((spread - low) / (high - low + 1e-6)).mean(1).float()
