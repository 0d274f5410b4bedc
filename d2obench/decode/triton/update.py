"""Triton kernel: everything between two decode steps, for all layers at once.

As PyTorch operators this is some 25 launches for H2O and 70 for D2O, each a few microseconds even in a graph, and nine
passes over the scores; at a batch of 64 that is several times the memory traffic and near a tenth of a step. Here it is
one launch, one program per layer and row: scores, positions and the row of attention are read once, scores written
once (16 bytes a slot against 512 of keys and values at 16 bits and d = 128). Order and arithmetic are those of
``DecodeState.advance`` and ``PendingMerge.settle``, ``PendingMerge.take``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2obench.decode.triton.merge import toward

EMPTY = tl.constexpr(-1)
PROTECTED = tl.constexpr(3e38)
TINY = tl.constexpr(1e-6)
HOST = tl.constexpr(-1.0)


@triton.jit
def inverse_norm_of(key):
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(key.to(tl.float32) * key.to(tl.float32), 0)), TINY)


@triton.jit(do_not_specialize=["rows", "stride"])
def turn(
    position, now, free, target, base, evicted, bias, slots_of, score, attention, recent, first, last,
    keys, values, unit, key, value, pending, carried, similarity, host, weight, inverse_norm, host_bias, bar, tau,
    merged, beta, rows, stride,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr,
    SCORED: tl.constexpr, HAS_BIAS: tl.constexpr, CARRIES: tl.constexpr, KEYS: tl.constexpr, INHERIT: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """Settles the merge of this step, adds the row of attention to the scores, picks the victim, holds it aside for
    the next merge, and books its slot for the token to come. Grid (rows, layers).

    SCORED takes the lowest score outside the recent window; otherwise the slots are a ring from ``first`` to
    ``last``. ``slots_of`` int64 ``[layers]`` are the layers' capacities. Without CARRIES everything from ``keys`` on is
    unused; SMOOTH is β < 1. ``now`` is the position of the token just decoded.
    """
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = layer * rows + row
    line = lane * stride
    d, dv, n = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, BLOCK)
    slots = tl.load(slots_of + layer).to(tl.int32)
    start_row = tl.load(base + lane)
    slot = tl.load(free + lane)
    newest = tl.load(now + row)

    gained, j = 0.0, slot
    if CARRIES:
        u, w, waits = tl.load(similarity + lane) + 1.0, tl.load(weight + lane), tl.load(pending + lane) != 0
        j = tl.load(host + lane)
        old = tl.load(tau + lane)
        mean = tl.where((old == float("inf")) | (old == -float("inf")), u, old + beta * (u - old))
        threshold = tl.where(waits, mean, old)
        tl.atomic_add(merged + layer, (w > 0.0).to(tl.int64))
        fresh = tl.load(keys + (start_row + slot) * D + d, mask=d < D, other=0.0)
        slot_norm = inverse_norm_of(fresh)
        hosting = tl.load(keys + (start_row + j) * D + d, mask=d < D, other=0.0)
        if KEYS:
            lost = tl.load(key + lane * D + d, mask=d < D, other=0.0).to(tl.float32)
            share = w.to(hosting.dtype).to(tl.float32)
            hosting = toward(hosting.to(tl.float32), lost, share).to(hosting.dtype)
            tl.store(keys + (start_row + j) * D + d, hosting, mask=d < D)
        host_norm = inverse_norm_of(hosting)
        if INHERIT:
            gained = tl.where(w > 0.0, tl.load(carried + lane), 0.0)

    if SCORED:
        window = tl.load(recent + lane)
        limit = tl.maximum(newest - window, EMPTY)
        lowest = tl.full([], float("inf"), tl.float32)
        victim_score = tl.full([], float("inf"), tl.float32)
        victim = tl.zeros([], tl.int64)
        for begin in range(0, slots, BLOCK):
            at = begin + n
            inside = at < slots
            seen = tl.load(score + line + at, mask=inside, other=float("inf"))
            if INHERIT:
                seen = tl.where(at == j, seen + gained, seen)
            seen += tl.load(attention + line + at, mask=inside, other=0.0) / G
            tl.store(score + line + at, seen, mask=inside)
            where = tl.load(position + line + at, mask=inside, other=0)
            shown = tl.where(where > limit, PROTECTED, seen)
            shown = tl.where(inside, shown, float("inf"))
            least, index = tl.min(shown, 0, return_indices=True, return_indices_tie_break_left=True)
            lower = least < lowest
            here = tl.sum(tl.where(n == index, seen, 0.0), 0)
            victim = tl.where(lower, (begin + index).to(tl.int64), victim)
            victim_score = tl.where(lower, here, victim_score)
            lowest = tl.where(lower, least, lowest)
        tl.debug_barrier()  # the victim's score, written above by some thread, is written again below
    else:
        after = slot + 1
        victim = tl.where(after > tl.load(last + lane), tl.load(first + lane), after)
        victim_score = 0.0

    left = tl.load(position + line + victim) >= 0
    if CARRIES:
        leaving = tl.load(keys + (start_row + victim) * D + d, mask=d < D, other=0.0)
        leaving = tl.where(victim == j, hosting, leaving)
        norm = tl.load(inverse_norm + line + victim)
        norm = tl.where(victim == j, host_norm, tl.where(victim == slot, slot_norm, norm))
        tl.store(inverse_norm + line + slot, slot_norm)
        if KEYS:
            tl.store(inverse_norm + line + j, host_norm, mask=j != slot)
        tl.store(key + lane * D + d, leaving, mask=d < D)
        turned = (leaving.to(tl.float32) * norm).to(leaving.dtype)
        tl.store(unit + (lane * (G + 1) + G) * D + d, turned, mask=d < D)
        gone = tl.load(values + (start_row + victim) * DV + dv, mask=dv < DV, other=0.0)
        tl.store(value + lane * DV + dv, gone, mask=dv < DV)
        tl.store(carried + lane, victim_score)
        tl.store(pending + lane, left)
        tl.store(host_bias + line + slot, HOST, mask=slot != victim)
        tl.store(host_bias + line + victim, -float("inf"))
        tl.store(tau + lane, threshold)
        if SMOOTH:
            tl.store(bar + lane, tl.where(left, threshold - 1.0, float("inf")))
        else:
            tl.store(bar + lane, tl.where(left, -float("inf"), float("inf")))

    tl.atomic_add(evicted + layer, left.to(tl.int64))
    tl.store(free + lane, victim)
    tl.store(target + lane, start_row + victim)
    tl.store(position + line + victim, newest + 1)
    if SCORED:
        tl.store(score + line + victim, 0.0)
    if HAS_BIAS:
        tl.store(bias + line + victim, 0.0)
