"""Triton kernel: everything between two decode steps, for all layers at once.

As PyTorch operators this takes about 25 launches for H2O and 70 for D2O, each of a few microseconds even in a CUDA
graph, and nine passes over the scores; at a batch of 64 that is several times the memory traffic and almost a tenth of
a step. Here it is one launch with one program per layer and row: scores, positions and attention weights are read once
and scores written once (16 bytes per slot, against 512 bytes of keys and values at 16 bits and d = 128). The order of
operations and the arithmetic are those of ``d2obench.decode.reference.Backend.update``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2obench.decode.triton.merge import LEAST, commit, commit_mass, stage, stage_mass
from d2obench.slots import dense

EMPTY = tl.constexpr(dense.EMPTY)
PROTECTED = tl.constexpr(dense.PROTECTED)


@triton.jit(do_not_specialize=["rows", "stride"])
def update(
    position, now, free, target, base, evicted, bias, ends, score, attention, factor, fresh, recent, sinks, first,
    usable, keys, values, unit, key, value, pending, staged_score, similarity, merge_target, weight, inverse_norm,
    target_bias, required, threshold, merged, beta, rows, stride,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr,
    SCORED: tl.constexpr, HAS_BIAS: tl.constexpr, MERGES: tl.constexpr, KEYS: tl.constexpr, INHERIT: tl.constexpr,
    SMOOTH: tl.constexpr, MASS: tl.constexpr, WEIGHTED: tl.constexpr, NORMALISED: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Completes the pending merge, adds the step's attention to the scores, chooses the victim, stages it for the merge
    in the next step, and reserves its slot for the next token. Grid (rows, layers).

    SCORED evicts the lowest score outside the recent window, WEIGHTED the lowest score times weight (with NORMALISED
    per query that could attend to the token; with NORMS the weight of a new token includes the norm of its value);
    otherwise the slots from ``first`` on are a ring. ``ends`` int64 ``[layers, rows]`` is each row's number of slots.
    MERGES is D2O's merge, MASS the one by mass; without either, the arguments from ``keys`` on are unused. SMOOTH means
    β < 1. ``now`` is the position of the token just decoded.
    """
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = layer * rows + row
    line = lane * stride
    n = tl.arange(0, BLOCK)
    slots = tl.load(ends + lane).to(tl.int32)
    start_row = tl.load(base + lane)
    slot = tl.load(free + lane)
    newest = tl.load(now + row)

    # 1. complete the pending merge
    gained, grown, j = 0.0, 1.0, slot
    if MERGES:
        j, absorbing, target_norm, slot_norm, followed, gained = commit(
            keys, key, staged_score, pending, similarity, merge_target, weight, threshold, merged, beta, layer, lane,
            start_row, slot, D, DP, KEYS, INHERIT,
        )  # fmt: skip
    if MASS:
        j, grown, slot_norm = commit_mass(
            keys, bias, merge_target, weight, merged, layer, lane, line, start_row, slot, D, DP
        )  # fmt: skip

    # 2. choose the victim
    if SCORED:
        if WEIGHTED:
            first_kept, newest_weight = tl.load(sinks + lane), tl.load(fresh + lane)
            if NORMS:
                dv = tl.arange(0, DVP)
                own_value = tl.load(values + (start_row + slot) * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
                newest_weight = newest_weight * tl.sqrt(tl.sum(own_value * own_value, 0))
            newest_weight = tl.maximum(newest_weight, LEAST)
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
            if MASS:
                seen = tl.where(at == j, seen * grown, seen)
            seen += tl.load(attention + line + at, mask=inside, other=0.0) / G
            tl.store(score + line + at, seen, mask=inside)
            where = tl.load(position + line + at, mask=inside, other=0)
            own = seen
            if WEIGHTED:
                weights = tl.load(factor + line + at, mask=inside, other=1.0)
                own = own * tl.where(at == slot, newest_weight, weights)
                if NORMALISED:
                    own = own / (newest - where + 1).to(tl.float32)
                own = tl.where((where >= 0) & (where < first_kept), float("inf"), own)
            shown = tl.where(where > limit, PROTECTED, own)
            shown = tl.where(inside, shown, float("inf"))
            least, index = tl.min(shown, 0, return_indices=True, return_indices_tie_break_left=True)
            lower = least < lowest
            here = tl.sum(tl.where(n == index, seen, 0.0), 0)
            victim = tl.where(lower, (begin + index).to(tl.int64), victim)
            victim_score = tl.where(lower, here, victim_score)
            lowest = tl.where(lower, least, lowest)
        tl.debug_barrier()  # another thread may have written the victim's score above; it is overwritten below
        if WEIGHTED:
            tl.store(factor + line + slot, newest_weight)
    else:
        after = slot + 1
        victim = tl.where(after > tl.load(usable + lane) - 1, tl.load(first + lane), after)
        victim_score = 0.0

    # 3. stage the victim's entry
    born = tl.load(position + line + victim)
    left = born >= 0
    if MERGES:
        stage(
            keys, values, unit, key, value, staged_score, pending, inverse_norm, target_bias, required, threshold,
            lane, line, start_row, slot, victim, victim_score, left, j, absorbing, target_norm, slot_norm, followed,
            G, D, DV, DP, DVP, KEYS, SMOOTH,
        )  # fmt: skip
    if MASS:
        mean = victim_score / (newest - born + 1).to(tl.float32)
        stage_mass(
            keys, values, unit, value, staged_score, inverse_norm, target_bias, lane, line, start_row, slot, victim,
            mean, left, slot_norm, G, D, DV, DP, DVP,
        )  # fmt: skip

    # 4. reserve its slot for the next token
    tl.atomic_add(evicted + layer, left.to(tl.int64))
    tl.store(free + lane, victim)
    tl.store(target + lane, start_row + victim)
    tl.store(position + line + victim, newest + 1)
    if SCORED:
        tl.store(score + line + victim, 0.0)
    if HAS_BIAS:
        tl.store(bias + line + victim, 0.0)
