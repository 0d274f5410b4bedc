"""CAKE: layer budgets from how widely and how changeably attention is spread; entries by mean and variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d2obench.errors import PolicyError
from d2obench.policies.allocation import water_fill
from d2obench.policies.base import Entries, Needs, Stats, window_rank
from d2obench.policies.prompt_only import PromptOnly
from d2obench.policies.window import window_attention
from d2obench.suite.grammar import Budget

KERNEL = 5
"""Number of neighbours that scores are pooled over."""
TINY = 1e-10
FACTORS = ("entropy", "variance")
"""Names of the statistics that a preference is made of."""


@dataclass(frozen=True)
class CAKE(PromptOnly):
    """The last ``window`` tokens, and those with the highest mean and variance of attention, in layers of unequal size.

    Both follow from the attention A of the last ``window`` queries to the tokens before them. A layer's preference is
    ``(−Σ A ln A)^(1/tau1) · (Σ_j variance of A_j over the queries)^(1/tau2)``, over all its query heads. Of what the
    budgets of all layers hold beside the windows, a layer gets its share of the preferences, at most the whole prompt;
    what that leaves over is spread evenly over the other layers. A token's score is the mean of A over the queries plus
    ``gamma`` times their variance, as a mean over the query heads of a KV head, averaged with its neighbours.

    Layers are cut in a cascade while the prompt is read: the layers that have read it share the budgets of all layers
    by their preferences, and their shares fall as further layers join in. Where a share rises again, because a later
    layer leaves much over, the layer keeps what it had, and less than the budget is held. A prompt that comes in
    several blocks is cut at its end, to the same tokens. Decoding evicts nothing by itself (``decode``); the authors'
    code has a rule for it that pools the newest query's attention.

    Args:
        window: number of queries whose attention counts, and of tokens kept as the recent window.
        decode, block: see :class:`d2obench.policies.prompt_only.PromptOnly`.
        tau1, tau2: temperatures of the two factors of a preference; the authors fitted them to each model.
        gamma: weight of the variance in a token's score.
        allocate: ``preference``, as published, or ``uniform`` layers.
    """

    tau1: float = 1.0
    tau2: float = 1.0
    gamma: float = 200.0
    allocate: Literal["preference", "uniform"] = "preference"
    name: ClassVar[str] = "cake"
    about: ClassVar[str] = "layer budgets by how attention is spread and changes; the prompt only"
    paper: ClassVar[str] = "CAKE, ICLR 2025"

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    @property
    def budgets_need_stats(self) -> bool:
        return self.allocate == "preference"

    def check(self) -> None:
        super().check()
        for word in ("tau1", "tau2"):
            if not getattr(self, word) > 0:
                raise PolicyError(f"cake: {word} is {getattr(self, word)}", remedy="use a number above 0")
        if self.gamma < 0:
            raise PolicyError(f"cake: gamma is {self.gamma}", remedy="use 0 or more")

    def describe(self, entries: Entries) -> None:
        """Adds "cake", the score of each entry, and "entropy" and "variance", the shares of its KV head in the two
        factors of the layer's preference."""
        if "cake" in entries.stats:
            return
        seen, real = window_attention(entries, self.window)
        count = real.sum(1)[:, None, None, None]
        before = (entries.position >= 0) & (entries.position < entries.length[:, None, None] - self.window)
        mean = seen.sum(3) / count.clamp_min(1)
        apart = (seen - mean[:, :, :, None]) * real[:, None, None, :, None]
        variance = apart.square_().sum(3) / (count - 1).clamp_min(1)
        entropy = -(seen * (seen + TINY).log()).sum(3)
        score = (mean + self.gamma * variance).mean(2) * before
        entries.stats["cake"] = F.avg_pool1d(score, KERNEL, stride=1, padding=KERNEL // 2)
        for name, factor in zip(FACTORS, (entropy, variance), strict=True):
            share = (factor.sum(2) * before).double().sum(-1, keepdim=True)
            entries.stats[name] = share.float().expand(before.shape).contiguous()

    def importance(self, entries: Entries) -> Tensor:
        return entries.stats["cake"]

    def rank(self, entries: Entries, keep: Tensor) -> Tensor:
        return window_rank(self.importance(entries), entries, 0, keep.clamp_max(self.window))

    def layer_budgets(self, stats: list[Stats], length: Tensor, budget: Budget) -> Tensor:
        if self.allocate == "uniform":
            return super().layer_budgets(stats, length, budget)
        preference, layers = self._preference(stats), len(stats)
        so_far = [self._parts(preference[: read + 1], length, budget, layers) for read in range(layers)]
        columns = []
        for sequence, tokens in enumerate(length.tolist()):
            # what a layer got at its least: a token that was cut does not come back
            after = [parts[sequence] for parts in so_far]
            parts = [min(each[layer] for each in after[layer:]) for layer in range(layers)]
            window, most = self._room(tokens, budget)
            columns.append([window + part for part in water_fill(parts, int(sum(parts) + 1e-6), 0, most)])
        return torch.tensor(columns).T

    def budgets_so_far(self, stats: list[Stats], length: Tensor, budget: Budget, layers: int) -> Tensor:
        """Their shares of the budgets of all layers, as if there were no others; one more for the rounding."""
        columns = []
        parts = self._parts(self._preference(stats), length, budget, layers)
        for tokens, own in zip(length.tolist(), parts, strict=True):
            window, _ = self._room(tokens, budget)
            columns.append([window + math.ceil(part) + 1 for part in own])
        return torch.tensor(columns).T

    def _room(self, tokens: int, budget: Budget) -> tuple[int, int]:
        """The window of a prompt, and the largest number of tokens that a layer can keep beside it."""
        window = min(self.window, budget.of(tokens))
        return window, max(budget.of(tokens), tokens) - window

    def _preference(self, stats: list[Stats]) -> Tensor:
        """The preference of each layer with statistics, float64 ``[len(stats), B]``, on the CPU."""
        factors = [torch.stack([stat[name][..., -1] for stat in stats]).double().sum(2) for name in FACTORS]
        return (factors[0] ** (1 / self.tau1) * factors[1] ** (1 / self.tau2)).cpu()

    def _parts(self, preference: Tensor, length: Tensor, budget: Budget, layers: int) -> list[list[float]]:
        """For each sequence, how many tokens beside the window each layer with a preference gets, if these layers share
        what the budgets of all ``layers`` hold."""
        parts = []
        for own, tokens in zip(preference.T.tolist(), length.tolist(), strict=True):
            window, most = self._room(tokens, budget)
            parts.append(evenly_capped(own, (budget.of(tokens) - window) * layers, most))
        return parts


def evenly_capped(weights: list[float], total: float, cap: float) -> list[float]:
    """Parts of ``total`` in proportion to ``weights``: none is more than ``cap``, and what is above it is spread evenly
    over the others, until nothing is above. Weights that are no numbers, or all 0, count as equal."""
    if total >= cap * len(weights):
        return [cap] * len(weights)
    if not 0 < sum(weights) < math.inf:
        return [total / len(weights)] * len(weights)
    parts = [weight / sum(weights) * total for weight in weights]
    while (excess := sum(max(0.0, part - cap) for part in parts)) > 1e-9 * total:
        parts = [min(part, cap) for part in parts]
        room = sum(part < cap for part in parts)
        if not room:
            break
        parts = [part + excess / room if part < cap else part for part in parts]
    return [min(part, cap) for part in parts]
