"""D2O, dynamic discriminative operations: layer budgets, eviction by accumulated attention, recall by merging."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.allocation import Rule, density, shares, water_fill
from d2obench.policies.base import Entries, Kept, MergeSpec, Policy, Stats, pick
from d2obench.policies.h2o import H2O
from d2obench.policies.merging import mean_over, merge_into, nearest
from d2obench.policies.released import Released
from d2obench.ranges import span
from d2obench.suite.grammar import Budget

if TYPE_CHECKING:
    from d2obench.decode.state import DecodeState

FLOOR = 0.01
"""Least share of the prompt a layer keeps."""


@dataclass(frozen=True)
class D2O(H2O):
    """Layer budgets from attention density, heavy hitters beside sinks and a window, merging of what is evicted.

    Per layer, the variance of the prompt's column sums sets the budget (Eq. 5). Per KV head, the sinks, the highest
    accumulated scores and a recent window are kept, 3 important to 1 recent (Eq. 6–7). An evicted entry is merged into
    its nearest kept one when their similarity reaches a threshold that starts as the mean at the prompt's end and
    follows an EMA while decoding (Eq. 8–12).

    Args:
        preset: ``paper``; ``released`` for the authors' code with its deviations (for validation); ``tuned`` for the
            setting that strays least from the full cache on a small model (``reports/ablation-cpu``): uniform layers,
            no merging, 1:1, which is H2O with sinks. Other parameters given beside ``tuned`` go first.
        recent: share of a layer's budget that is the recent window (paper: 3:1).
        sinks: tokens at the start that are never evicted; they count as important.
        allocate: rule of the layer budgets, see :func:`d2obench.policies.allocation.shares`.
        alpha: factor of the ``threshold`` rule.
        exempt: layers that keep the whole prompt; the others share what is left, so that the total stays as asked.
        merge: what is merged: keys and values, values only, nothing.
        beta: weight of the newest similarity in the threshold's EMA.
        threshold: one per KV head, or one per layer.
        hosts: all kept entries, or only those that are neither sinks nor recent.
        inherit: whether a host also takes the score of what it absorbs.
        interval: evict and merge this many tokens at once, every so many steps.
    """

    preset: Literal["paper", "released", "tuned"] = "paper"
    recent: float = 0.25
    sinks: int = 4
    allocate: Rule = "softmax"
    alpha: float = 2.0
    exempt: tuple[int, ...] = ()
    merge: Literal["kv", "values", "none"] = "kv"
    beta: float = 0.7
    threshold: Literal["head", "layer"] = "head"
    hosts: Literal["all", "important"] = "all"
    inherit: bool = False
    interval: int = 1
    presets: ClassVar = {"tuned": {"allocate": "uniform", "merge": "none", "recent": 0.5}}
    name: ClassVar[str] = "d2o"
    about: ClassVar[str] = "layer budgets, accumulated attention, and merging of what is evicted"
    paper: ClassVar[str] = "D2O, arXiv 2406.13035"

    @property
    def budgets_need_stats(self) -> bool:
        return self.allocate != "uniform" or bool(self.exempt)

    @property
    def judges_heads_together(self) -> bool:
        return self.threshold == "layer" and self.merge != "none"

    @property
    def merge_spec(self) -> MergeSpec | None:
        if self.merge == "none" or self.interval > 1:
            return None
        return MergeSpec(self.beta, self.merge == "kv", self.threshold == "layer", self.hosts, self.inherit)

    def resolved(self) -> Policy:
        if self.preset != "released":
            return self
        if replace(self, preset="paper", bits=None) != D2O():
            raise PolicyError("d2o(preset=released) has no other parameters", why="the authors' code fixes them all")
        return Released(bits=self.bits)

    def check(self) -> None:
        super().check()
        if not 0 <= self.beta <= 1:
            raise PolicyError(f"d2o: beta is {self.beta}", remedy="use a weight in [0, 1]")
        if self.interval < 1:
            raise PolicyError(f"d2o: interval is {self.interval}", remedy="use 1 or more steps")
        if self.alpha < 1:
            raise PolicyError(f"d2o: alpha is {self.alpha}", remedy="use 1 or more")

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        if self.allocate == "uniform" and not self.exempt:
            return super().layer_budgets(stats, length, budget)
        layers = len(stats)
        spread = torch.stack([density(stat["sum"].mean(1), length).cpu() for stat in stats])
        exempt = {layer % layers for layer in self.exempt if -layers <= layer < layers}
        columns = []
        for sequence, tokens in enumerate(length.tolist()):
            total = budget.of(tokens) * layers if budget.ratio is None else round(budget.ratio * tokens * layers)
            others = [layer for layer in range(layers) if layer not in exempt]
            most = self._cap(budget, tokens)
            if not others:
                columns.append([most] * layers)
                continue
            floor = max(math.ceil(FLOOR * tokens), self.sinks + 2)
            share = shares(spread[others, sequence], self.allocate, self.alpha).tolist()
            rest = max(len(others), total - len(exempt) * most)
            parts = iter(water_fill(share, rest, floor, most))
            columns.append([most if layer in exempt else next(parts) for layer in range(layers)])
        return torch.tensor(columns).T

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        batch, heads, slots = kept.index.shape
        tau = torch.full((batch, heads), -math.inf, device=kept.index.device)
        if self.merge == "none" or kept.evicted.shape[2] == 0:
            return {"tau": tau}
        leaving, hosts = kept.leaving.flatten(0, 1), self._hosts(entries, kept, keep).flatten(0, 1)
        keys, values = (pick(rows, kept.evicted).flatten(0, 1) for rows in (entries.keys, entries.values))
        with span("similarity"):
            similarity, host = nearest(keys, kept.keys.flatten(0, 1), hosts)
        leaving = leaving & (similarity > -math.inf)
        tau = mean_over(similarity, leaving, heads if self.threshold == "layer" else 0)
        passed = leaving & (similarity >= tau[:, None])
        weight = torch.where(passed, similarity.exp(), 0.0)
        own_keys, own_values = kept.keys.flatten(0, 1), kept.values.flatten(0, 1)
        pairs = [(own_values, values), (own_keys, keys)] if self.merge == "kv" else [(own_values, values)]
        merged = [rows.view(batch, heads, slots, -1) for rows in merge_into(host, weight, *pairs)]
        kept.values = merged[0]
        kept.keys = merged[1] if self.merge == "kv" else kept.keys
        if self.inherit:
            score = entries.stats["sum"]
            gained = score.gather(2, kept.evicted.clamp_max(kept.total - 1)) * passed.view(kept.evicted.shape)
            score.scatter_add_(2, kept.index.gather(2, host.view(kept.evicted.shape)).clamp_max(kept.total - 1), gained)
        return {"tau": tau.view(batch, heads), "merged": passed.sum(1).view(batch, heads).float()}

    def begin(self, state: DecodeState, memory: list[dict[str, Tensor]], scores: list[Stats]) -> None:
        super().begin(state, memory, scores)
        if self.merge == "none":
            return
        none = torch.full((state.store.rows,), -math.inf, device=state.store.device)
        tau = torch.stack([remembered["tau"].flatten() if remembered else none for remembered in memory])
        state.extra["tau"] = tau
        state.extra["merged"] = torch.zeros(len(tau), dtype=torch.long, device=tau.device)

    def absorb_step(self, state: DecodeState, victims: Tensor) -> None:
        """Merges the ``interval`` entries just evicted, layer by layer; τ follows the mean of their similarities."""
        if self.merge == "none":
            return
        for layer in range(victims.shape[0]):
            self._merge_layer(state, layer, victims[layer])

    def _merge_layer(self, state: DecodeState, layer: int, victims: Tensor) -> None:
        store, tau = state.store, state.extra["tau"]
        index = store.base[layer, :, None] + victims
        leaving = state.position[layer].gather(1, victims) >= 0
        hosts = (state.position[layer] >= 0).scatter(1, victims, False)[:, : store.capacities[layer]]
        kept = store.keys(layer)
        with span("similarity"):
            similarity, host = nearest(store.read_keys(index), kept, hosts)
        leaving = leaving & (similarity > -math.inf)
        newest = mean_over(similarity, leaving, state.heads if self.threshold == "layer" else 0)
        smoothed = torch.where(tau[layer].isinf(), newest, torch.lerp(tau[layer], newest, self.beta))
        tau[layer] = torch.where(newest > -math.inf, smoothed, tau[layer])
        passed = leaving & (similarity >= tau[layer][:, None])
        weight = torch.where(passed, similarity.exp(), 0.0)
        pairs = [(store.values(layer), store.read_values(index)), (kept, store.read_keys(index))]
        merged = merge_into(host, weight, *pairs[: 2 if self.merge == "kv" else 1])
        keys, values = merged[1] if self.merge == "kv" else kept, merged[0]
        store.fill(layer, keys, values, hosts)
        state.extra["merged"][layer] += passed.sum()
        if self.inherit:
            score = state.score[layer]
            score.scatter_add_(1, host, torch.where(passed, score.gather(1, victims), 0.0))

    def _cap(self, budget: Budget, tokens: int) -> int:
        """A layer never needs more than the prompt, unless a count of tokens beyond it was asked for."""
        return tokens if budget.tokens is None else max(tokens, budget.tokens)

    def _hosts(self, entries: Entries, kept: Kept, keep: Tensor) -> Tensor:
        hosts = kept.filled
        if self.hosts == "all":
            return hosts
        position = entries.position.gather(2, kept.index.clamp_max(kept.total - 1))
        recent = entries.length[:, None, None] - self.window(keep).to(position.device)[:, None, None]
        return hosts & (position >= self.sinks) & (position < recent)
