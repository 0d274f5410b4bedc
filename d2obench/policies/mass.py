"""Merging by mass: a kept entry goes on to receive the attention of the evicted entries that it stands for.

Let ``s`` be the mean attention of an entry: the attention it has received, divided by the number of queries that could
attend to it. An evicted entry e is merged into the kept entry c whose key has the highest cosine with its own, whatever
that cosine is. With ``r_e = min(1, s_e ÷ s_c)``, summed over the entries that are merged into c,

    v_c ← (v_c + Σ r_e v_e) ÷ (1 + Σ r_e),   b_c ← b_c + ln(1 + Σ r_e),   S_c ← S_c · (1 + Σ r_e).

``b`` is a bias that is added to the entry's logit from then on, so that ``exp(q·k_c + b_c)`` stands for the mass of all
that the entry has absorbed. ``S``, the entry's accumulated attention, grows in the same proportion, as if it had
received that mass from the start. Keys are not changed: averages of keys that were rotated to different positions are
short and point elsewhere, and a merge with normalised weights leaves an entry only the attention of a single one.
KeepKV (arXiv 2504.09936) adds votes to logits for the same reason.

:func:`absorb` merges the evicted entries of a prompt. There, r may be multiplied with a constant ``share``: what an
entry received from the prompt overstates what it would receive from the tokens to come. ``d2obench.decode.mass`` merges
during decoding, with r itself.

Variants that lost no less, on texts that the form was not chosen on: merging into the two nearest entries; a threshold
on the similarity; targets that exclude sinks or the window; averaged keys beside the biases; distances of decoded keys;
budgets by the attention mass of a layer, or by errors measured at several budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2obench.policies.base import Entries, Kept, pick
from d2obench.policies.biased import Biased
from d2obench.policies.merging import nearest, sums_by_target
from d2obench.policies.rules import MassSpec, Merge

LEAST = 1e-20
"""Smallest mean attention that another one is divided by."""


@dataclass(frozen=True)
class MassMerging(Biased):
    """A policy that can merge what it evicts by mass.

    Args:
        merge: ``none``, as published, or ``mass``: see :mod:`d2obench.policies.mass`. The policy must ask for column
            sums then.
    """

    merge: Literal["none", "mass"] = "none"

    @property
    def merge_spec(self) -> Merge | None:
        return MassSpec() if self.merge == "mass" else None

    def absorb(self, entries: Entries, kept: Kept, keep: Tensor) -> dict[str, Tensor]:
        return absorb(entries, kept) if self.merge == "mass" else {}


def mean_attention(entries: Entries) -> Tensor:
    """``s`` of every entry, float32 ``[B, H, N]``."""
    return entries.stats["sum"] / (entries.length[:, None, None] - entries.position).clamp_min(1)


def mass_ratio(evicted: Tensor, kept: Tensor) -> Tensor:
    """``r`` from the mean attention of evicted entries and of their merge targets."""
    return (evicted / kept.clamp_min(LEAST)).clamp_max(1.0)


def absorb(entries: Entries, kept: Kept, share: float = 1.0) -> dict[str, Tensor]:
    """Merges the evicted entries of a layer into ``kept.values``; the statistics "bias", "sum" and "square" of the kept
    entries change with them. Returns how many were merged, float32 ``[B, H]``."""
    batch, heads, slots = kept.index.shape
    stats, at, gone = entries.stats, *(index.clamp_max(kept.total - 1) for index in (kept.index, kept.evicted))
    stats.setdefault("bias", torch.zeros_like(stats["sum"]))
    if kept.evicted.shape[2] == 0:
        return {}
    # 1. the merge target of each evicted entry
    keys = pick(entries.keys, kept.evicted)
    _, flat = nearest(keys.flatten(0, 1), kept.keys.flatten(0, 1), kept.filled.flatten(0, 1), prompt=True)
    target = flat.view(batch, heads, -1)
    # 2. its mass, relative to that of its target
    score = mean_attention(entries)
    ratio = mass_ratio(score.gather(2, gone), score.gather(2, at).gather(2, target))
    ratio = torch.where(kept.leaving, share * ratio, 0.0)
    kept.target = torch.where(ratio > 0, target, -1)
    # 3. mix the values
    leaving = pick(entries.values, kept.evicted).flatten(0, 1)
    total, summed = sums_by_target(flat, ratio.flatten(0, 1), slots, [leaving], prompt=True)
    kept.values = mixed(kept.values.flatten(0, 1), total, summed).view(batch, heads, slots, -1)
    # 4. biases and accumulated attention of the targets; an empty slot adds 0 to an arbitrary entry
    gained = total.view(batch, heads, slots)
    stats["bias"] = stats["bias"].scatter_add(2, at, gained.log1p())
    factor = torch.ones_like(stats["sum"]).scatter_add_(2, at, gained)
    stats["sum"] = stats["sum"] * factor
    if "square" in stats:
        stats["square"] = stats["square"] * factor * factor
    return {"merged": (ratio > 0).sum(2).float()}


def mixed(values: Tensor, total: Tensor, summed: Tensor) -> Tensor:
    """Values ``[R, C, d_v]`` of kept entries after merging.

    Args:
        total: Σ r of each kept entry, float32 ``[R, C, 1]``.
        summed: Σ r·v, float32 ``[R, C, d_v]``.
    """
    return torch.where(total > 0, ((values.float() + summed) / (1 + total)).to(values.dtype), values)
