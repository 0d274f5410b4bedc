"""Triton kernels for merging what a prompt evicts: the nearest kept key of every evicted one, and sums by merge target.

:func:`nearest_keys` multiplies keys as they are, in 16 bits by tensor cores with float32 sums, and divides by norms in
float32 afterwards; so a product of 16-bit keys is as exact as one in float32. A program holds a block of evicted keys
and walks over the kept ones, and the similarities never reach memory.

:func:`segment_sums` adds the entries of each target in one program, in the order of the entries, since atomic additions
would come in another order each time. It reads an entry once, where a matrix product with one weight per column does as
much work for the weights that are zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2obench.compiler import interpreted, launch

BLOCK = 16
"""Entries that a program of ``add`` reads at once."""


@triton.jit
def _keys(held, row, at, count, D: tl.constexpr, DP: tl.constexpr):
    """Keys ``at`` of a row, ``[BLOCK, DP]``; zeros from ``count`` on."""
    d = tl.arange(0, DP)
    places = (row * count + at)[:, None] * D + d[None, :]
    return tl.load(held + places, mask=(at < count)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _norm(keys, least):
    """The norm of each of the keys, at least ``least``."""
    wide = keys.to(tl.float32)
    return tl.maximum(tl.sqrt_rn(tl.sum(wide * wide, 1)), least)


@triton.jit(do_not_specialize=["count", "slots"])
def nearest(
    evicted, kept, targets, found, place, count, slots, least,
    D: tl.constexpr, DP: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The highest cosine of a block of evicted keys, and where it is; grid (blocks, rows)."""
    # 1. the evicted keys
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BE + tl.arange(0, BE)
    mine = _keys(evicted, row, i, count, D, DP)
    best = tl.full((BE,), -float("inf"), tl.float32)
    at = tl.zeros((BE,), tl.int32)
    # 2. all kept keys, block by block; of equal ones the first stays
    for start in range(0, slots, BC):
        j = start + tl.arange(0, BC)
        keys = _keys(kept, row, j, slots, D, DP)
        free = tl.load(targets + row * slots + j, mask=j < slots, other=0) != 0
        if WIDE:
            product = tl.dot(mine.to(tl.float32), tl.trans(keys.to(tl.float32)), input_precision="ieee")
        else:
            product = tl.dot(mine, tl.trans(keys))
        cosine = tl.where(free[None, :], product / _norm(keys, least)[None, :], -float("inf"))
        highest = tl.max(cosine, 1)
        first = tl.min(tl.where(cosine == highest[:, None], j[None, :], slots), 1)
        at = tl.where(highest > best, first, at)
        best = tl.maximum(best, highest)
    # 3. their own norms change no order
    inside = i < count
    tl.store(found + row * count + i, best / _norm(mine, least), mask=inside)
    tl.store(place + row * count + i, at.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["count", "slots"])
def add(
    given, weight, order, starts, out, total, count, slots, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The weighted sum of the entries of one target; grid (targets, rows)."""
    slot, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(starts + row * (slots + 1) + slot)
    last = tl.load(starts + row * (slots + 1) + slot + 1)
    d = tl.arange(0, DP)
    summed = tl.zeros((DP,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        e = start + tl.arange(0, BLOCK)
        entry = row * count + tl.load(order + row * count + e, mask=e < last, other=0)
        share = tl.load(weight + entry, mask=e < last, other=0.0)
        inside = (e < last)[:, None] & (d < D)[None, :]
        vectors = tl.load(given + entry[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        summed += tl.sum(vectors * share[:, None], 0)
        weights += share
    at = row * slots + slot
    tl.store(out + at * D + d, summed, mask=d < D)
    tl.store(total + at, tl.sum(weights, 0))


def nearest_keys(evicted: Tensor, kept: Tensor, targets: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """As :func:`d2obench.policies.merging.nearest`; ``least`` is the smallest norm that a key is divided by."""
    rows, count, width = evicted.shape
    found = torch.empty(rows, count, device=kept.device)
    place = torch.empty(rows, count, dtype=torch.long, device=kept.device)
    padded, wide = max(16, triton.next_power_of_2(width)), kept.dtype == torch.float32
    side = 32 if wide or padded > 128 else 64
    launch(
        nearest, (triton.cdiv(count, side), rows), evicted.contiguous(), kept.contiguous(), targets.contiguous(), found,
        place, count, kept.shape[1], least, D=width, DP=padded, BE=side, BC=side, WIDE=wide or interpreted(),
        num_stages=2 if wide else 3, num_warps=8 if wide else 4,
    )  # fmt: skip
    return found, place


def segment_sums(target: Tensor, weight: Tensor, slots: int, given: list[Tensor]) -> list[Tensor]:
    """As :func:`d2obench.policies.merging.sums_by_target`."""
    rows, count = target.shape
    device = weight.device
    # 1. the entries by target, and where those of each begin; an entry without weight has none
    ordered, order = torch.where(weight == 0, slots, target).sort(dim=1, stable=True)
    bounds = torch.arange(slots + 1, device=device).expand(rows, -1).contiguous()
    starts = torch.searchsorted(ordered, bounds)
    # 2. the sums
    total = torch.empty(rows, slots, 1, device=device)
    sums = [total]
    for vectors in given:
        width = vectors.shape[2]
        out = torch.empty(rows, slots, width, device=device)
        launch(
            add, (slots, rows), vectors.contiguous(), weight.contiguous(), order, starts, out, total, count, slots,
            D=width, DP=triton.next_power_of_2(width), BLOCK=BLOCK,
        )  # fmt: skip
        sums.append(out)
    return sums
