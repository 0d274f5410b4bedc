"""Layers that are cut while the prompt is read, although their budgets depend on all layers.

A policy may be able to bound its budgets from the layers that have read the prompt so far
(``Policy.budgets_so_far``). After each layer, all of them are cut to these bounds, and to the budgets themselves when
the last layer has read the prompt. An entry that a smaller budget keeps is kept by a larger one too, and its statistics
are those of the whole prompt, so the same entries remain as if all layers had been cut at the end. But only what the
bounds allow is held meanwhile, and the full entries of a single layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from d2obench.attention.prompt import kept_stats
from d2obench.cache.compress import to_the_right
from d2obench.policies.base import Entries, Kept, Policy, pick, select

if TYPE_CHECKING:
    from d2obench.cache.layer import PolicyLayer


def cascades(policy: Policy) -> bool:
    """Whether the policy can bound its budgets before all layers have read the prompt."""
    return type(policy).budgets_so_far is not Policy.budgets_so_far and not policy.ragged


def cut(policy: Policy, layer: PolicyLayer, entries: Entries, bound: Tensor) -> int:
    """Evicts what a layer holds beyond ``bound``, and returns the number of entries evicted.

    Args:
        policy: has described the entries.
        layer: receives what is left, with explicit positions.
        entries: those of the layer.
        bound: entries that each sequence may hold, int64 ``[B]``, on the CPU.
    """
    total, most = entries.position.shape[2], int(bound.max())
    if most >= total:
        return 0
    # 1. the entries of the highest ranks, in the order of positions, with empty ones on the left
    index, evicted = select(policy.rank(entries, bound), bound, most)
    kept = to_the_right(Kept(index, evicted, total, pick(entries.keys, index), pick(entries.values, index)))
    at = kept.index.clamp_max(total - 1)
    # 2. they replace the layer's entries
    layer.keys, layer.values = kept.keys, kept.values
    layer.position = entries.position.gather(2, at).masked_fill_(~kept.filled, -1)
    layer.stats = kept_stats(entries.stats, at)
    layer.starts = (~kept.filled).sum(-1).amin(1).tolist()
    return int(kept.leaving.sum())
