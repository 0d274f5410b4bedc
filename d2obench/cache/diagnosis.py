"""Why a compressed prompt differs from the full one: what each layer lost, and what its merges did with it.

The prompt is read in full, then every layer is compressed on trial, by the policy's own rules and to the budget that
the policy gives it, and the prompt's last queries attend to what was kept (``d2obench.cache.budgets``). Let ``A_j`` be
the attention that they pay to entry j of the full prompt, as a mean over the queries and the query heads of a KV head.
Per layer, as means over its KV heads:

* *evicted*: Σ A_j over the entries that were evicted.
* *due*: what the merge targets should draw after the merge: Σ A_j over the targets and over the entries that were
  merged into them. *own* is the first of these sums.
* *drawn*: what the targets do draw in the compressed cache.
* *error*: ‖(ô − o) W_O‖² ÷ ‖o W_O‖², summed over the queries: how far the output of the attention block moves.
* *cost*: ‖(ô − o) W_O‖² if all layers got the same budget, the figure that ``allocate=error`` divides budgets by.
* *density*: F, the variance of the column sums, by whose ``exp(−F)`` D2O divides budgets (Eq. 5).

Quantisation of what is kept is not part of a trial.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2obench.cache.budgets import attention, by_head, compress_on_trial, projected
from d2obench.cache.policy_cache import PolicyCache
from d2obench.cache.session import Session
from d2obench.policies.allocation import density


@dataclass(frozen=True)
class LayerDiagnosis:
    """The figures of a layer, float32 ``[B]`` each, as the module defines them; ``density`` is None for a policy that
    does not ask for column sums."""

    evicted: Tensor
    own: Tensor
    due: Tensor
    drawn: Tensor
    error: Tensor
    cost: Tensor
    density: Tensor | None


class DiagnosingSession(Session):
    """A session that can say what compression would do to the prompt that it has read."""

    @torch.inference_mode()
    def diagnose(self) -> list[LayerDiagnosis]:
        """The figures of every compressed layer, after :meth:`prefill` and before :meth:`compress`; nothing changes.

        Raises:
            UsageError: no prompt was read.
        """
        self._check_begun("diagnose")
        return _diagnose(self.cache)

    def _new_cache(self, longest: int) -> PolicyCache:
        cache: PolicyCache = super()._new_cache(longest)
        cache.keeps_last = True
        return cache


def _diagnose(cache: PolicyCache) -> list[LayerDiagnosis]:
    budgets, found = cache.plan(), []
    for layer, keep in zip(cache.own, budgets, strict=True):
        assert layer.last is not None and cache.lengths is not None
        entries = layer.entries(len(cache.own), cache.lengths, cache.seed, cache.layout.first_head)
        cache.policy.describe(entries)
        last, projection = layer.last, cache.output_projection(layer)
        heads, total = entries.position.shape[1:]
        trial = compress_on_trial(cache.policy, entries, keep, last)
        # 1. attention to the full prompt, one column more for "no entry"
        hidden = (entries.position[:, :, None] > trial.asked[:, None, :, None]) | (entries.position < 0)[:, :, None]
        paid = trial.mean(attention(last, entries.keys, hidden).mean(2).transpose(2, 3))
        paid = torch.cat((paid, torch.zeros_like(paid[..., :1])), 2)
        evicted = paid.gather(2, trial.kept.evicted.clamp_max(total))
        # 2. the merge targets: what they drew, should draw and do draw
        target = torch.full_like(trial.kept.evicted, -1) if trial.kept.target is None else trial.kept.target
        taken = target >= 0
        absorbed = torch.zeros_like(trial.kept.index).scatter_add_(2, target.clamp_min(0), taken.long())
        own = torch.where(absorbed > 0, paid.gather(2, trial.kept.index), 0.0)
        due = own.sum(2) + torch.where(taken, evicted, 0.0).sum(2)
        drawn = torch.where(absorbed > 0, trial.mean(trial.weights.mean(2).transpose(2, 3)), 0.0)
        # 3. the output of the attention block, over all heads together
        moved = projected(trial.difference, projection).sum(1).square().sum(-1)
        full = projected(by_head(last.outputs.transpose(1, 2), heads), projection).sum(1).square().sum(-1)
        sums = entries.stats.get("sum")
        found.append(
            LayerDiagnosis(
                evicted=evicted.sum(2).mean(1),
                own=own.sum(2).mean(1),
                due=due.mean(1),
                drawn=drawn.sum(2).mean(1),
                error=trial.mean(moved) / trial.mean(full).clamp_min(1e-30),
                cost=cache.cost(layer).sum(1),
                density=None if sums is None else density(sums.mean(1), cache.lengths).float(),
            )
        )
    return found
