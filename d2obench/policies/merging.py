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

from d2obench import cpu

TINY = 1e-6
CACHED, CHUNK = 2**18, 2**25
"""Similarities held at once, on a CPU (they stay in a core's cache) and elsewhere (128 MiB, and few launches)."""


def nearest(evicted: Tensor, kept: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
    """The highest cosine of each evicted key and where it is (ties: the lowest index).

    Args:
        evicted: keys ``[R, E, d]``.
        kept: keys ``[R, C, d]``.
        hosts: bool ``[R, C]``, which of them may take an entry.

    Returns:
        float32 ``u`` ``[R, E]`` (−inf where there is no host) and int64 hosts ``[R, E]``.
    """
    (rows, count, _), slots = evicted.shape, kept.shape[1]
    device = kept.device
    if evicted.dtype == torch.float32 and cpu.suits(kept.dtype, device):
        return _nearest_by_team(evicted.contiguous(), kept, hosts)
    unit = _divided(kept.float(), kept)
    # every slot may host, as a rule: then there is no bias to add (elsewhere than on a CPU, asking would wait)
    free = device.type == "cpu" and bool(hosts.all())
    barred = torch.zeros(0 if free else rows, 1, slots, device=device)
    if not free:
        barred.masked_fill_(~hosts[:, None], -math.inf)
    similarity = torch.empty(rows, count, device=device)
    host = torch.empty(rows, count, dtype=torch.long, device=device)
    chunk = CACHED if device.type == "cpu" else CHUNK
    some = max(1, chunk // max(1, count * slots))
    step = max(1, chunk // (some * slots))
    for low in range(0, rows, some):
        part = slice(low, low + some)
        for first in range(0, count, step):
            at = part, slice(first, first + step)
            given, to = evicted[at].float(), unit[part].transpose(1, 2)
            products = torch.bmm(given, to) if free else torch.baddbmm(barred[part], given, to)
            similarity[at], host[at] = products.max(-1)
    # a key's own norm does not change which host is nearest
    return _divided(similarity[..., None], evicted)[..., 0], host


def _nearest_by_team(evicted: Tensor, kept: Tensor, hosts: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`nearest`, by one compiled loop: products never leave a core's cache."""
    from d2obench.cpu import nearest as loops

    (rows, count, width), slots = evicted.shape, kept.shape[1]
    room = -(-slots // loops.COLUMNS) * loops.COLUMNS
    unit, barred = torch.zeros(rows, width, room), torch.full((rows, room), -math.inf)
    unit[..., :slots] = _divided(kept, kept).transpose(1, 2)
    barred[:, :slots].masked_fill_(hosts, 0.0)
    found, host = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.long)
    if found.numel() and slots:
        words = cpu.Arguments(
            0, rows * -(-count // loops.BLOCK), evicted.data_ptr(), unit.data_ptr(), barred.data_ptr(),
            found.data_ptr(), host.data_ptr(), count, room, width,
        )  # fmt: skip
        cpu.launch(loops.nearest, words)
    return _divided(found[..., None], evicted)[..., 0], host


def _divided(rows: Tensor, keys: Tensor) -> Tensor:
    """``rows`` divided by the norms of ``keys``."""
    norm: Tensor = keys.float().norm(dim=-1, keepdim=True)
    return rows / norm.clamp_min_(TINY)


def merge_into(host: Tensor, weight: Tensor, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Hosts after merging: for each pair of kept ``[R, C, d]`` and evicted ``[R, E, d]`` (keys, or values) the new
    kept ones, in their dtype.

    Args:
        host: int64 ``[R, E]``.
        weight: float32 ``[R, E]``: exp(u) for merged entries, 0 for lost ones.
        pairs: what is merged by the same hosts and weights.
    """
    rows, slots, _ = pairs[0][0].shape
    add = _added_by_row if weight.device.type == "cpu" else _added_by_product
    total, *added = add(host, weight, rows, slots, [evicted for _, evicted in pairs])
    return [
        torch.where(total > 0, ((math.e * kept.float() + sums) / (math.e + total)).to(kept.dtype), kept)
        for sums, (kept, _) in zip(added, pairs, strict=True)
    ]


def _added_by_row(host: Tensor, weight: Tensor, rows: int, slots: int, given: list[Tensor]) -> list[Tensor]:
    """What each host is given, float32: the weights ``[R, C, 1]``, and of each of ``given`` ``[R, C, d]``; one entry
    after the other."""
    at = (host + torch.arange(rows)[:, None] * slots).view(-1)
    weighted = [weight[..., None], *(evicted.float() * weight[..., None] for evicted in given)]
    return [
        torch.zeros(rows * slots, part.shape[-1]).index_add_(0, at, part.flatten(0, 1)).view(rows, slots, -1)
        for part in weighted
    ]


def _added_by_product(host: Tensor, weight: Tensor, rows: int, slots: int, given: list[Tensor]) -> list[Tensor]:
    """The same by a product, where adding by index has no fixed order: an evicted entry has one host, so a matrix with
    one weight in a column adds them up."""
    count, device = host.shape[1], weight.device
    sums = [torch.zeros(rows, slots, width, device=device) for width in (1, *(part.shape[-1] for part in given))]
    step = max(1, CHUNK // max(1, rows * slots))
    for first in range(0, count, step):
        last = min(count, first + step)
        share = torch.zeros(rows, slots, last - first, device=device)
        share.scatter_(1, host[:, None, first:last], weight[:, None, first:last])
        sums[0] += share.sum(-1, keepdim=True)
        for total, evicted in zip(sums[1:], given, strict=True):
            total.baddbmm_(share, evicted[:, first:last].float())
    return sums


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
