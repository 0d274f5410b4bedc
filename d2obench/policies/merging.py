"""D2O's merge of evicted entries (arXiv 2406.13035, Eq. 8–12): the rule, for any number of entries at once.

Each evicted entry i is compared with all kept entries by the cosine of their keys. The most similar one is its merge
target, with ``u_i = max_j cos(k_i, k_j)``. Entry i is merged if ``u_i`` reaches a threshold, and dropped otherwise.
With ``P_j`` the merged entries whose target is j,

    k_j ← (e·k_j + Σ_{i∈P_j} exp(u_i) k_i) / D_j,   v_j likewise,   D_j = e + Σ_{i∈P_j} exp(u_i),

where e = exp(1) = exp(cos(k_j, k_j)). Sums are float32; a kept entry into which nothing is merged stays identical, bit
by bit. The threshold is the mean of the first similarities and then follows a moving average of later ones.

:func:`merge_evicted` is used when a prompt is compressed and when a step evicts several entries. For a single evicted
entry of a decode step, ``d2obench.decode.merge`` implements the same rule in a form that reads the cache only once.

For a prompt, a GPU uses the kernels of ``merging_triton``; where they can't run, PyTorch operators do the same, and the
row says so (:func:`kernel_fallback`). Decode steps don't use them, since a step may be captured in a CUDA graph, which
no kernel may be loaded in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2obench import cpu
from d2obench.compiler import missing, off
from d2obench.errors import in_a_line, is_device_fault, is_out_of_memory
from d2obench.policies.rules import MergeSpec
from d2obench.ranges import span

TINY = 1e-6
"""Smallest norm that a key is divided by."""
CACHED, CHUNK = 2**18, 2**25
"""Number of similarities computed at once: on a CPU (they fit a core's cache), and elsewhere (128 MiB, few
launches)."""
WIDEST = 256
"""The most channels of a key for which there is a kernel."""
_refused: dict[tuple[torch.device, torch.dtype], str] = {}
"""Why the kernels can't be used."""


class Merged(NamedTuple):
    """The result of :func:`merge_evicted`.

    Args:
        keys: keys of the kept entries, ``[R, C, d]``.
        values: their values, ``[R, C, d_v]``.
        threshold: float32 ``[R]``, after these entries.
        passed: which evicted entries were merged, bool ``[R, E]``.
        target: the merge target of each evicted entry, int64 ``[R, E]``; meaningful if it passed.
    """

    keys: Tensor
    values: Tensor
    threshold: Tensor
    passed: Tensor
    target: Tensor


def merge_evicted(
    spec: MergeSpec,
    kept: tuple[Tensor, Tensor],
    evicted: tuple[Tensor, Tensor],
    targets: Tensor,
    real: Tensor,
    heads: int,
    threshold: Tensor,
    prompt: bool = False,
) -> Merged:
    """Merges evicted entries into kept ones.

    Args:
        spec: the rule's parameters.
        kept: keys ``[R, C, d]`` and values ``[R, C, d_v]``; a row is a KV head of a sequence.
        evicted: keys ``[R, E, d]`` and values ``[R, E, d_v]``.
        targets: bool ``[R, C]``, which kept entries may be merge targets.
        real: bool ``[R, E]``, which of ``evicted`` are entries; the others are padding.
        heads: KV heads per sequence.
        threshold: float32 ``[R]``, before these entries; −inf before the first eviction.
        prompt: whether the entries are a prompt's.
    """
    # 1. the merge target and similarity of each evicted entry
    with span("similarity"):
        similarity, target = nearest(evicted[0], kept[0], targets, prompt)
    # 2. the threshold, and the entries that reach it
    real = real & (similarity > -math.inf)
    threshold = follow(threshold, mean_over(similarity, real, heads if spec.per_layer else 0), spec.beta)
    passed = real & (similarity >= threshold[:, None])
    # 3. merge them into their targets, with weight exp(u)
    weight = torch.where(passed, similarity.exp(), 0.0)
    pairs = [(kept[1], evicted[1]), (kept[0], evicted[0])]
    values, *keys = merge_into(target, weight, *pairs[: 2 if spec.keys else 1], prompt=prompt)
    return Merged(keys[0] if keys else kept[0], values, threshold, passed, target)


def follow(threshold: Tensor, newest: Tensor, beta: float) -> Tensor:
    """The threshold after similarities with the mean ``newest`` (Eq. 10). The first ones set it; −inf (none) leaves it
    as it is."""
    smoothed = torch.where(threshold.isinf(), newest, torch.lerp(threshold, newest, beta))
    return torch.where(newest.isinf(), threshold, smoothed)


def merge_weight(similarity: Tensor) -> Tensor:
    """The weight ``exp(u) ÷ (e + exp(u))`` of a single evicted entry, computed from ``similarity`` = u − 1."""
    return torch.sigmoid(similarity)


def nearest(evicted: Tensor, kept: Tensor, targets: Tensor, prompt: bool = False) -> tuple[Tensor, Tensor]:
    """The highest cosine of each evicted key with the kept keys, and its index (ties: the lowest).

    Args:
        evicted: keys ``[R, E, d]``.
        kept: keys ``[R, C, d]``.
        targets: bool ``[R, C]``, which kept entries may be merge targets.
        prompt: whether the entries are a prompt's.

    Returns:
        float32 ``u`` ``[R, E]`` (−inf where there is no target) and int64 targets ``[R, E]``.
    """
    (rows, count, _), slots = evicted.shape, kept.shape[1]
    device = kept.device
    if evicted.dtype == torch.float32 and cpu.suits(kept.dtype, device):
        return _nearest_by_loop(evicted.contiguous(), kept, targets)
    if prompt and device.type != "cpu" and evicted.dtype == kept.dtype and kept.shape[2] <= WIDEST:
        by_kernel: tuple[Tensor, Tensor] | None = _by_kernel(
            kept, lambda kernels: kernels.nearest_keys(evicted, kept, targets, TINY)
        )
        if by_kernel is not None:
            return by_kernel
    unit = _divided(kept.float(), kept)
    # usually every slot may be a target; then no bias is needed. Only checked on a CPU, since a GPU would have to be
    # waited for
    free = device.type == "cpu" and bool(targets.all())
    barred = torch.zeros(0 if free else rows, 1, slots, device=device)
    if not free:
        barred.masked_fill_(~targets[:, None], -math.inf)
    similarity = torch.empty(rows, count, device=device)
    target = torch.empty(rows, count, dtype=torch.long, device=device)
    chunk = CACHED if device.type == "cpu" else CHUNK
    some = max(1, chunk // max(1, count * slots))
    step = max(1, chunk // (some * slots))
    for low in range(0, rows, some):
        part = slice(low, low + some)
        for first in range(0, count, step):
            at = part, slice(first, first + step)
            given, to = evicted[at].float(), unit[part].transpose(1, 2)
            products = torch.bmm(given, to) if free else torch.baddbmm(barred[part], given, to)
            similarity[at], target[at] = products.max(-1)
    # the evicted key's own norm does not change which target is nearest, so it is divided out at the end
    return _divided(similarity[..., None], evicted)[..., 0], target


def _by_kernel(keys: Tensor, compute: Callable[[Any], Any]) -> Any:
    """What ``compute`` makes with the Triton kernels; None if they can't be used, which is tried once for a device and
    dtype."""
    if kernel_fallback(keys.device, keys.dtype):
        return None
    try:
        from d2obench.policies import merging_triton

        return compute(merging_triton)
    except Exception as problem:  # a compiler may raise anything; PyTorch's operators are the fallback
        if is_out_of_memory(problem) or is_device_fault(problem):
            raise
        _refused[keys.device, keys.dtype] = f"the kernels did not compile ({in_a_line(problem)})"
        return None


def kernel_fallback(device: torch.device, dtype: torch.dtype) -> str:
    """Why PyTorch's operators merge what a prompt evicts; empty if the kernels do."""
    return _refused.get((device, dtype), "") or off("kernels") or _missing(device)


@functools.cache
def _missing(device: torch.device) -> str:
    """As ``missing``, asked once."""
    return missing(device)


def _nearest_by_loop(evicted: Tensor, kept: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`nearest`, in one compiled loop whose products never leave a core's cache."""
    from d2obench.cpu import nearest as loops

    (rows, count, width), slots = evicted.shape, kept.shape[1]
    padded = -(-slots // loops.COLUMNS) * loops.COLUMNS
    unit, barred = torch.zeros(rows, width, padded), torch.full((rows, padded), -math.inf)
    unit[..., :slots] = _divided(kept, kept).transpose(1, 2)
    barred[:, :slots].masked_fill_(targets, 0.0)
    found, target = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.long)
    if found.numel() and slots:
        arguments = loops.NearestArguments(
            items=rows * -(-count // loops.BLOCK), count=count, slots=padded, width=width
        )  # fmt: skip
        arguments.point(evicted=evicted, unit=unit, bias=barred, found=found, place=target)
        cpu.launch(loops.nearest, arguments)
    else:
        found.fill_(-math.inf), target.zero_()
    return _divided(found[..., None], evicted)[..., 0], target


def _divided(rows: Tensor, keys: Tensor) -> Tensor:
    """Each of ``rows`` divided by the norm of the key in ``keys``."""
    norm: Tensor = keys.float().norm(dim=-1, keepdim=True)
    return rows / norm.clamp_min_(TINY)


def merge_into(target: Tensor, weight: Tensor, *pairs: tuple[Tensor, Tensor], prompt: bool = False) -> list[Tensor]:
    """The kept keys or values after merging: for each pair of kept ``[R, C, d]`` and evicted ``[R, E, d]``, the new
    kept ones in their dtype.

    Args:
        target: int64 ``[R, E]``, merge target of each evicted entry.
        weight: float32 ``[R, E]``: exp(u) for merged entries, 0 for dropped ones.
        pairs: keys, values, or both; all use the same targets and weights.
        prompt: whether the entries are a prompt's.
    """
    total, *added = sums_by_target(target, weight, pairs[0][0].shape[1], [evicted for _, evicted in pairs], prompt)
    return [
        torch.where(total > 0, ((math.e * kept.float() + sums) / (math.e + total)).to(kept.dtype), kept)
        for sums, (kept, _) in zip(added, pairs, strict=True)
    ]


def sums_by_target(
    target: Tensor, weight: Tensor, slots: int, given: list[Tensor], prompt: bool = False
) -> list[Tensor]:
    """For each merge target, the sum of the weights of its evicted entries, and their weighted sums.

    Args:
        target: int64 ``[R, E]``, merge target of each evicted entry.
        weight: float32 ``[R, E]``.
        slots: number of kept entries of each row.
        given: vectors of the evicted entries, each ``[R, E, d]``.
        prompt: whether the entries are a prompt's.

    Returns:
        float32 ``[R, slots, 1]``, then ``[R, slots, d]`` for each of ``given``.
    """
    if prompt and weight.device.type != "cpu" and given and max(part.shape[2] for part in given) <= WIDEST:
        by_kernel: list[Tensor] | None = _by_kernel(
            given[0], lambda kernels: kernels.segment_sums(target, weight, slots, given)
        )
        if by_kernel is not None:
            return by_kernel
    add = _added_by_row if weight.device.type == "cpu" else _added_by_product
    return add(target, weight, weight.shape[0], slots, given)


def _added_by_row(target: Tensor, weight: Tensor, rows: int, slots: int, given: list[Tensor]) -> list[Tensor]:
    """As :func:`sums_by_target`; adds entry by entry."""
    at = (target + torch.arange(rows)[:, None] * slots).view(-1)
    weighted = [weight[..., None], *(evicted.float() * weight[..., None] for evicted in given)]
    return [
        torch.zeros(rows * slots, part.shape[-1]).index_add_(0, at, part.flatten(0, 1)).view(rows, slots, -1)
        for part in weighted
    ]


def _added_by_product(target: Tensor, weight: Tensor, rows: int, slots: int, given: list[Tensor]) -> list[Tensor]:
    """As :func:`sums_by_target`, by a matrix product, because on a GPU adding by index has no fixed order: each
    evicted entry has one target, so a matrix with one weight per column computes the sums."""
    count, device = target.shape[1], weight.device
    sums = [torch.zeros(rows, slots, width, device=device) for width in (1, *(part.shape[-1] for part in given))]
    step = max(1, CHUNK // max(1, rows * slots))
    for first in range(0, count, step):
        last = min(count, first + step)
        share = torch.zeros(rows, slots, last - first, device=device)
        share.scatter_(1, target[:, None, first:last], weight[:, None, first:last])
        sums[0] += share.sum(-1, keepdim=True)
        for total, evicted in zip(sums[1:], given, strict=True):
            total.baddbmm_(share, evicted[:, first:last].float())
    return sums


def mean_over(similarity: Tensor, real: Tensor, per_layer: int = 0) -> Tensor:
    """Mean of u over the real evicted entries of a row, ``[R]``; if ``per_layer`` is the number of heads, over all rows
    of a sequence. −inf if there is none."""
    total = torch.where(real, similarity, 0.0).sum(1)
    count = real.sum(1)
    if per_layer:
        total, count = (
            part.view(-1, per_layer).sum(1, keepdim=True).expand(-1, per_layer).reshape(-1) for part in (total, count)
        )
    return torch.where(count > 0, total / count.clamp_min(1), -math.inf)
