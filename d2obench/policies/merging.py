"""Similarity-weighted merging of evicted entries (D2O, arXiv 2406.13035, Eq. 8–12), for any number at once.

Each evicted entry i looks for its nearest kept one by cosine of the keys, ``u_i = max_j cos(k_i, k_j)``. It is merged
if ``u_i ≥ τ``, and lost otherwise. With ``P_j`` the merged entries whose nearest is j,

    k_j ← (e·k_j + Σ_{i∈P_j} exp(u_i) k_i) / D_j,   v_j alike,   D_j = e + Σ_{i∈P_j} exp(u_i),

where e = exp(1) = exp(cos(k_j, k_j)). Sums are float32; a host without evicted entries is left as it is, bit by bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-6
CHUNK = 2**22
"""Similarities held at once."""


def nearest(evicted: Tensor, kept: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
    """The highest cosine of each evicted key and where it is (ties: the lowest index).

    Args:
        evicted: keys ``[R, E, d]``.
        kept: keys ``[R, C, d]``.
        hosts: bool ``[R, C]``, which of them may take an entry.

    Returns:
        float32 ``u`` ``[R, E]`` (−inf where there is no host) and int64 hosts ``[R, E]``.
    """
    rows, count, _ = evicted.shape
    unit = kept.float() / kept.float().norm(dim=-1, keepdim=True).clamp_min(TINY)
    barred = torch.zeros(hosts.shape, device=hosts.device).masked_fill_(~hosts, -math.inf)[:, None]
    similarity = torch.empty(rows, count, device=kept.device)
    host = torch.empty(rows, count, dtype=torch.long, device=kept.device)
    step = max(1, CHUNK // max(1, rows * kept.shape[1]))
    for first in range(0, count, step):
        part = evicted[:, first : first + step].float()
        part = part / part.norm(dim=-1, keepdim=True).clamp_min(TINY)
        cosine = torch.baddbmm(barred, part, unit.transpose(1, 2))
        similarity[:, first : first + step], host[:, first : first + step] = cosine.max(-1)
    return similarity, host


def merge_into(host: Tensor, weight: Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Hosts after merging: for each pair of kept ``[R, C, d]`` and evicted ``[R, E, d]`` (keys, or values) the new
    kept ones, in their dtype.

    Args:
        host: int64 ``[R, E]``.
        weight: float32 ``[R, E]``: exp(u) for merged entries, 0 for lost ones.
        pairs: what is merged by the same hosts and weights.
    """
    rows, slots, _ = pairs[0][0].shape
    total = torch.zeros(rows, slots, 1, device=weight.device)
    added = [torch.zeros(kept.shape, device=weight.device) for kept, _ in pairs]
    count = host.shape[1]
    step = max(1, CHUNK // max(1, rows * slots))
    share = torch.zeros(rows, slots, min(step, count), device=weight.device)
    for first in range(0, count, step):
        # an evicted entry has one host: a matrix with one weight in a column adds them up, in a fixed order
        last = min(count, first + step)
        part = (share if first == 0 else share.zero_())[..., : last - first]
        part.scatter_(1, host[:, None, first:last], weight[:, None, first:last])
        total += part.sum(-1, keepdim=True)
        for sums, (_, evicted) in zip(added, pairs, strict=True):
            sums.baddbmm_(part, evicted[:, first:last].float())
    return [
        torch.where(total > 0, ((math.e * kept.float() + sums) / (math.e + total)).to(kept.dtype), kept)
        for sums, (kept, _) in zip(added, pairs, strict=True)
    ]


def mean_over(similarity: Tensor, real: Tensor, per_layer: int = 0) -> Tensor:
    """Mean of u over the real evicted entries of a row ``[R]``; with ``per_layer`` heads, over those of a sequence.
    −inf where there is none."""
    total = torch.where(real, similarity, 0.0).sum(1)
    count = real.sum(1)
    if per_layer:
        total, count = (
            part.view(-1, per_layer).sum(1, keepdim=True).expand(-1, per_layer).reshape(-1) for part in (total, count)
        )
    return torch.where(count > 0, total / count.clamp_min(1), -math.inf)
