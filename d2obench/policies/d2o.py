"""D2O, dynamic discriminative operations: layer budgets, eviction by accumulated attention, merging of evicted
entries."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies import allocation, mass
from d2obench.policies.allocation import Rule, density, shares, water_fill
from d2obench.policies.base import Entries, Kept, Needs, Policy, Stats, per_row, pick, window_rank
from d2obench.policies.biased import Biased
from d2obench.policies.diversity import deferrable, deferred, diversity, settle
from d2obench.policies.h2o import HeavyHitters
from d2obench.policies.merging import merge_evicted
from d2obench.policies.released import Released
from d2obench.policies.rules import DecodeRule, LowestWeightedScore, MassSpec, MergeSpec, RowSizes
from d2obench.suite.grammar import Budget

FLOOR = 0.01
"""Smallest share of the prompt that a layer keeps."""


@dataclass(frozen=True)
class D2O(Biased, HeavyHitters):
    """Layer budgets from attention density; heavy hitters, sinks and a recent window are kept; evicted entries are
    merged.

    Per layer, the variance of the prompt's column sums sets the budget (Eq. 5). Per KV head, the sinks, the highest
    accumulated scores and a recent window are kept, at a ratio of 3 important to 1 recent (Eq. 6–7). An evicted entry
    is merged into the most similar kept one if their similarity reaches a threshold. The threshold starts as the mean
    similarity at the prompt's end and follows a moving average during decoding (Eq. 8–12).

    ``preset=mass`` keeps the paper's two ideas, budgets from measured attention and recall of evicted entries by
    merging, in another form. Entries are ranked by mean attention times the norm of their value times the distance of
    their key from those ranked higher; every evicted entry is merged by mass (:mod:`d2obench.policies.mass`); and a
    layer's budget follows from the error that compression causes in its output. Each part is a parameter.

    Args:
        preset: ``paper``; ``mass``, see above; ``released``, the authors' code including its deviations from the paper
            (for validation); ``tuned``, the ideas switched off: uniform layers, 1:1, no merging, which is H2O with
            sinks. Parameters given together with ``mass`` or ``tuned`` take precedence.
        recent: share of a layer's budget that is the recent window (paper: 3:1, that is 0.25).
        sinks: tokens at the start that are never evicted; they count as important.
        normalised: divide a score by the number of queries that could attend to the token.
        value_norms: multiply a score by the norm of the entry's value.
        diversity: multiply a score by the distance of the entry's key from those of higher score
            (:mod:`d2obench.policies.diversity`).
        allocate: rule of the layer budgets, see :func:`d2obench.policies.allocation.shares`.
        heads: with ``allocate=error``, a budget for every KV head instead of every layer. A head is stored in as many
            slots as it has entries (:mod:`d2obench.slots.ragged`), so that memory follows the budgets.
        alpha: factor of the ``threshold`` rule.
        exempt: layers that keep the whole prompt; the others share the rest, so that the total stays as requested.
        merge: what is merged: keys and values, values only, mass instead of keys, or nothing. ``beta``, ``threshold``,
            ``hosts`` and ``inherit`` do not apply to ``mass``.
        mass_share: for ``merge=mass``: how much of its attention an evicted entry of the prompt hands on to its merge
            target.
        beta: weight of the newest similarity in the threshold's moving average.
        threshold: one per KV head, or one per layer.
        hosts: which kept entries may be merge targets: all, or only those that are neither sinks nor recent.
        inherit: whether the score of an evicted entry is added to that of its merge target.
        equal: what a budget stands for, ``slots`` or ``bytes``: with ``merge=mass``, a slot has a bias, and ``bytes``
            gives it fewer slots for that (:mod:`d2obench.policies.biased`).
        interval: evict and merge this many tokens at once, once in as many steps.
        protect: ``prompt`` keeps the whole prompt (:mod:`d2obench.policies.protect`).
        carry_threshold: for ``released`` only: thresholds are kept from one prompt to the next, see
            :mod:`d2obench.policies.released`.
    """

    preset: Literal["paper", "mass", "released", "tuned"] = "paper"
    recent: float = 0.25
    sinks: int = 4
    value_norms: bool = False
    diversity: bool = False
    allocate: Rule = "softmax"
    heads: bool = False
    alpha: float = 2.0
    exempt: tuple[int, ...] = ()
    merge: Literal["kv", "values", "mass", "none"] = "kv"
    mass_share: float = 1.0
    beta: float = 0.7
    threshold: Literal["head", "layer"] = "head"
    hosts: Literal["all", "important"] = "all"
    inherit: bool = False
    interval: int = 1
    carry_threshold: bool = False
    presets: ClassVar = {
        "mass": {
            "allocate": "error", "merge": "mass", "recent": 0.2, "normalised": True, "value_norms": True,
            "diversity": True, "mass_share": 0.5,
        },
        "tuned": {"allocate": "uniform", "merge": "none", "recent": 0.5},
    }  # fmt: skip
    name: ClassVar[str] = "d2o"
    about: ClassVar[str] = "layer budgets, accumulated attention, and merging of what is evicted"
    paper: ClassVar[str] = "D2O, arXiv 2406.13035"

    @property
    def needs(self) -> Needs:
        return Needs(columns=True, errors=self.allocate == "error")

    @property
    def budgets_need_stats(self) -> bool:
        return self.allocate != "uniform" or bool(self.exempt)

    @property
    def judges_heads_together(self) -> bool:
        return super().judges_heads_together or (self.threshold == "layer" and self.merge in ("kv", "values"))

    @property
    def ragged(self) -> bool:
        return self.heads or super().ragged

    @property
    def merge_spec(self) -> MergeSpec | MassSpec | None:
        if self.merge == "none":
            return None
        if self.merge == "mass":
            return MassSpec()
        return MergeSpec(self.beta, self.merge == "kv", self.threshold == "layer", self.hosts, self.inherit)

    def resolved(self) -> Policy:
        if self.preset != "released":
            return self
        if replace(self, preset="paper", bits=None, carry_threshold=False) != D2O():
            raise PolicyError(
                "d2o(preset=released) has no other parameters than carry_threshold",
                why="the authors' code fixes them all",
            )
        return Released(carry_threshold=self.carry_threshold, bits=self.bits)

    def check(self) -> None:
        super().check()
        if not 0 <= self.beta <= 1:
            raise PolicyError(f"d2o: beta is {self.beta}", remedy="use a weight in [0, 1]")
        if self.carry_threshold and self.preset != "released":
            raise PolicyError("d2o: carry_threshold is for preset=released", why="the paper resets it with each prompt")
        if self.interval < 1:
            raise PolicyError(f"d2o: interval is {self.interval}", remedy="use 1 or more steps")
        if self.exempt:
            self.refuse_protection("exempt", "every layer keeps the whole prompt")
        if self.heads:
            self.refuse_protection("heads=true", "heads share out what they keep of the prompt")
        if self.alpha < 1:
            raise PolicyError(f"d2o: alpha is {self.alpha}", remedy="use 1 or more")
        if self.heads and self.allocate != "error":
            raise PolicyError(
                "d2o: heads=true is for allocate=error",
                why="no other rule tells the KV heads of a layer apart",
                remedy="write d2o(preset=mass,heads=true), or leave heads out",
            )
        if not 0 < self.mass_share <= 1:
            raise PolicyError(f"d2o: mass_share is {self.mass_share}", remedy="use a share in (0, 1]")
        if self.merge == "mass" and (self.threshold != "head" or self.hosts != "all" or self.inherit):
            raise PolicyError(
                "d2o: merge=mass has no threshold, hosts or inherit",
                why="every evicted entry is merged, any kept one may be its target, and mass is always inherited",
                remedy="leave them out, or use merge=kv",
            )

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        if self.allocate == "uniform" and not self.exempt:
            return super().layer_budgets(stats, length, budget)
        # 1. what every layer, or every KV head of it, costs: [layers, B, 1 or H]
        cost = torch.stack([self._cost(stat, length) for stat in stats]).cpu()
        layers, _, heads = cost.shape
        exempt = {layer % layers for layer in self.exempt if -layers <= layer < layers}
        others = [layer for layer in range(layers) if layer not in exempt]
        budgets = torch.zeros(cost.shape, dtype=torch.long)
        for sequence, tokens in enumerate(length.tolist()):
            # 2. exempt layers keep the whole prompt, and what is left is divided among the others
            total = budget.of(tokens) * layers if budget.ratio is None else round(budget.ratio * tokens * layers)
            budgets[:, sequence] = most = self._cap(budget, tokens)
            if not others:
                continue
            count = len(others) * heads
            rest = max(count, (total - len(exempt) * most) * heads)
            floor, cap = max(math.ceil(FLOOR * tokens), self.sinks + 2), most
            if self.allocate == "error":
                mean = rest / count
                floor, cap = max(1, round(allocation.FLOOR * mean)), min(most, math.ceil(allocation.CAP * mean))
            # 3. whole numbers in proportion to the shares
            share = shares(cost[others, sequence].flatten(), self.allocate, self.alpha).tolist()
            parts = torch.tensor(water_fill(share, rest, floor, cap))
            budgets[others, sequence] = parts.view(len(others), heads)
        return budgets if self.heads else budgets[..., 0]

    def describe(self, entries: Entries) -> None:
        if not self.diversity or "diversity" in entries.stats:
            return
        real = entries.position >= 0
        if self.sharing is None and deferrable(entries.keys):  # then ``rank`` computes what it needs
            entries.stats["diversity"] = deferred(real)
        else:
            entries.stats["diversity"] = diversity(entries.keys, self._weighed(entries), real)

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        score, recent = self._weighed(entries), self.window(keep)
        if self.diversity:
            position, known = entries.position, entries.stats["diversity"]
            if self.sharing is None and deferrable(entries.keys):
                newest = entries.length[:, None, None] - per_row(recent, position.device)
                certain = (position < self.sinks) | (position >= newest)
                settle(known, entries.keys, score, position >= 0, certain, keep)
            score = score * known
        return window_rank(score, entries, self.sinks, recent)

    def _weighed(self, entries: Entries) -> Tensor:
        """The score without diversity."""
        score = self.score(entries)
        return score * entries.values.float().norm(dim=-1) if self.value_norms else score

    def decode_rule(self, sizes: RowSizes) -> DecodeRule:
        if self.value_norms or self.diversity:
            return LowestWeightedScore(self.window(sizes.budget), self.sinks, self.normalised, self.value_norms)
        return super().decode_rule(sizes)

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        if self.merge == "mass":
            return mass.absorb(entries, kept, self.mass_share)
        batch, heads, slots = kept.index.shape
        threshold = torch.full((batch * heads,), -math.inf, device=kept.index.device)
        spec = self.merge_spec
        if not isinstance(spec, MergeSpec) or kept.evicted.shape[2] == 0:
            return {"threshold": threshold.view(batch, heads)}
        merged = merge_evicted(
            spec,
            (kept.keys.flatten(0, 1), kept.values.flatten(0, 1)),
            (pick(entries.keys, kept.evicted).flatten(0, 1), pick(entries.values, kept.evicted).flatten(0, 1)),
            self._targets(entries, kept, keep).flatten(0, 1),
            kept.leaving.flatten(0, 1),
            heads,
            threshold,
            prompt=True,
        )
        kept.keys, kept.values = (rows.view(batch, heads, slots, -1) for rows in (merged.keys, merged.values))
        passed, target = (held.view(kept.evicted.shape) for held in (merged.passed, merged.target))
        kept.target = torch.where(passed, target, -1)
        if spec.inherit:
            score = entries.stats["sum"]
            gained = score.gather(2, kept.evicted.clamp_max(kept.total - 1)) * passed
            index = kept.index.gather(2, target).clamp_max(kept.total - 1)
            entries.stats["sum"] = score.scatter_add(2, index, gained)
        return {"threshold": merged.threshold.view(batch, heads), "merged": passed.sum(2).float()}

    def _cost(self, stat: Stats, length: Tensor) -> Tensor:
        """What budgets are derived from: the measured error of each KV head, ``[B, H]``; that of the layer, or F,
        ``[B, 1]``."""
        if self.allocate != "error":
            return density(stat["sum"].mean(1), length)[:, None]
        error = stat["error"].double()
        return error if self.heads else error.sum(1, keepdim=True)

    def _cap(self, budget: Budget, tokens: int) -> int:
        """Largest useful budget of a layer: the prompt's length, or the requested number of tokens if that is
        larger."""
        return tokens if budget.tokens is None else max(tokens, budget.tokens)

    def _targets(self, entries: Entries, kept: Kept, keep: Tensor) -> Tensor:
        """Which kept entries may be merge targets, bool ``[B, H, C]``."""
        if self.hosts == "all":
            return kept.filled
        position = entries.position.gather(2, kept.index.clamp_max(kept.total - 1))
        recent = entries.length[:, None, None] - per_row(self.window(keep), position.device)
        return kept.filled & (position >= self.sinks) & (position < recent)
