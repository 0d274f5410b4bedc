"""Triton kernels of the merges: attention with the staged evictee as one more query, and the work between steps.

``d2obench.decode.merge`` (D2O's merge) and ``d2obench.decode.mass`` explain the algorithms; logits are float32. The
merge target is known only after all keys were read, so there are two passes: :func:`weigh` reads the keys and
:func:`mix` the values. The contributions of the target and of the new token to the sums are added separately.
:func:`commit` and :func:`stage`, :func:`commit_mass` and :func:`stage_mass` are parts of
``d2obench.decode.triton.update``. ``lane`` is the index ``layer · rows + row`` of a row among all layers, and ``line``
is ``lane · stride``, the start of its per-slot numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2obench.decode import merge as reference
from d2obench.decode.triton.attend import (
    SIZES,
    UNALIGNED,
    absorb,
    bias_of,
    head_row,
    head_rows,
    leave,
    product,
    share_of,
    tile,
)
from d2obench.policies import mass, merging

LEAST = tl.constexpr(mass.LEAST)
TINY = tl.constexpr(merging.TINY)
TARGET = tl.constexpr(reference.TARGET_BIAS)


@triton.jit
def toward(a, b, w):
    """``torch.lerp`` in float32, by its formula."""
    return tl.where(w < 0.5, a + w * (b - a), b - (b - a) * (1.0 - w))


@triton.jit
def inverse_norm_of(key):
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(key.to(tl.float32) * key.to(tl.float32), 0)), TINY)


@triton.jit
def commit(
    keys, key, staged_score, pending, similarity, target, weight, threshold, merged, beta, layer, lane, start_row, slot,
    D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, INHERIT: tl.constexpr,
):  # fmt: skip
    """Completes the pending merge of a row. Returns the slot of the merge target, its key and inverse norm, the inverse
    norm of the token just decoded, the new threshold, and the score that the target inherits."""
    d = tl.arange(0, DP)
    j, u, w = tl.load(target + lane), tl.load(similarity + lane) + 1.0, tl.load(weight + lane)
    old = tl.load(threshold + lane)
    followed = tl.where((old == float("inf")) | (old == -float("inf")), u, old + beta * (u - old))
    counts = (tl.load(pending + lane) != 0) & (u > -float("inf"))
    newest = tl.where(counts, followed, old)
    tl.atomic_add(merged + layer, (w > 0.0).to(tl.int64))
    fresh = tl.load(keys + (start_row + slot) * D + d, mask=d < D, other=0.0)
    absorbing = tl.load(keys + (start_row + j) * D + d, mask=d < D, other=0.0)
    if KEYS:
        lost = tl.load(key + lane * D + d, mask=d < D, other=0.0).to(tl.float32)
        share = w.to(absorbing.dtype).to(tl.float32)
        absorbing = toward(absorbing.to(tl.float32), lost, share).to(absorbing.dtype)
        tl.store(keys + (start_row + j) * D + d, absorbing, mask=d < D)
    gained = tl.zeros([], tl.float32)
    if INHERIT:
        gained = tl.where(w > 0.0, tl.load(staged_score + lane), 0.0)
    return j, absorbing, inverse_norm_of(absorbing), inverse_norm_of(fresh), newest, gained


@triton.jit
def stage(
    keys, values, unit, key, value, staged_score, pending, inverse_norm, target_bias, required, threshold, lane, line,
    start_row, slot, victim, victim_score, left, j, absorbing, target_norm, slot_norm, newest,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, KEYS: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """Copies a row's victim to the staging buffers for the merge in the next step. Values that :func:`commit` has just
    written may not be visible to loads yet, so they are passed as arguments: the target's key and norm, the norm of the
    token in ``slot``, and the threshold."""
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    leaving = tl.load(keys + (start_row + victim) * D + d, mask=d < D, other=0.0)
    leaving = tl.where(victim == j, absorbing, leaving)
    norm = tl.load(inverse_norm + line + victim)
    norm = tl.where(victim == j, target_norm, tl.where(victim == slot, slot_norm, norm))
    tl.store(inverse_norm + line + slot, slot_norm)
    if KEYS:
        tl.store(inverse_norm + line + j, target_norm, mask=j != slot)
    tl.store(key + lane * D + d, leaving, mask=d < D)
    turned = (leaving.to(tl.float32) * norm).to(leaving.dtype)
    tl.store(unit + (lane * (G + 1) + G) * D + d, turned, mask=d < D)
    gone = tl.load(values + (start_row + victim) * DV + dv, mask=dv < DV, other=0.0)
    tl.store(value + lane * DV + dv, gone, mask=dv < DV)
    tl.store(staged_score + lane, victim_score)
    tl.store(pending + lane, left)
    tl.store(target_bias + line + slot, TARGET, mask=slot != victim)
    tl.store(target_bias + line + victim, -float("inf"))
    tl.store(threshold + lane, newest)
    if SMOOTH:
        tl.store(required + lane, tl.where(left, newest - 1.0, float("inf")))
    else:
        tl.store(required + lane, tl.where(left, -float("inf"), float("inf")))


@triton.jit
def commit_mass(
    keys, bias, target, weight, merged, layer, lane, line, start_row, slot, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Completes the pending merge of a row by mass. Returns the slot of the merge target, 1 + r, and the inverse norm
    of the key of the token just decoded."""
    d = tl.arange(0, DP)
    j, r = tl.load(target + lane), tl.load(weight + lane)
    tl.atomic_add(merged + layer, (r > 0.0).to(tl.int64))
    tl.store(bias + line + j, tl.load(bias + line + j) + tl.log(1.0 + r), mask=r > 0.0)
    fresh = tl.load(keys + (start_row + slot) * D + d, mask=d < D, other=0.0)
    return j, 1.0 + r, inverse_norm_of(fresh)


@triton.jit
def stage_mass(
    keys, values, unit, value, staged_score, inverse_norm, target_bias, lane, line, start_row, slot, victim, mean, left,
    slot_norm, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """Copies a row's victim, of mean attention ``mean``, to the staging buffers for the merge in the next step."""
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    leaving = tl.load(keys + (start_row + victim) * D + d, mask=d < D, other=0.0)
    norm = tl.where(victim == slot, slot_norm, tl.load(inverse_norm + line + victim))
    tl.store(inverse_norm + line + slot, slot_norm)
    turned = (leaving.to(tl.float32) * norm).to(leaving.dtype)
    tl.store(unit + (lane * (G + 1) + G) * D + d, turned, mask=d < D)
    gone = tl.load(values + (start_row + victim) * DV + dv, mask=dv < DV, other=0.0)
    tl.store(value + lane * DV + dv, gone, mask=dv < DV)
    tl.store(staged_score + lane, tl.where(left, mean, 0.0))
    tl.store(target_bias + line + slot, TARGET, mask=slot != victim)
    tl.store(target_bias + line + victim, -float("inf"))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def weigh(
    logits, best, place, query, unit, new_key, keys, bias, inverse_norm, target_bias, target, base, ends, scale,
    heads, stride, splits, query_b, query_h, key_b, key_h,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits of the query heads, and for each split the slot most similar to the evictee: u − 1 (−inf if none may be a
    target) and its index; ties go to the first.

    Grid (rows, splits). The last row of ``unit`` ``[rows, G + 1, D]`` is the evictee's unit vector; ``best`` float32
    and ``place`` int64 ``[rows, splits]``; ``inverse_norm`` and ``target_bias`` float32 ``[rows, stride]``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, n = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, BLOCK)
    start_row, slots = tl.load(base + row), tl.load(ends + row).to(tl.int32)
    slot = tl.load(target + row) - start_row
    first, last = share_of(split, 0, slots, splits, BLOCK)
    own = (slot >= first) & (slot < last)
    # 1. the new token: write its key, compute its logits; it can't be a merge target
    q = head_rows(query, row, heads, query_b, query_h, G, D, M, DP)
    key = head_row(new_key, row, heads, key_b, key_h, D, DP)
    tl.store(keys + (start_row + slot) * D + d, key, mask=d < tl.where(own, D, 0))
    fresh = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    tl.store(logits + (row * G + g) * stride + slot, fresh, mask=g < tl.where(own, G, 0))
    # 2. all other slots: logits, and the cosine with the evictee, which is query number G
    evictee = tl.load(unit + (row * (G + 1) + G) * D + d, mask=d < D, other=0.0)
    q = tl.where((g == G)[:, None], evictee[None, :], q)
    nearest = tl.full([], -float("inf"), tl.float32)
    found = tl.zeros([], tl.int32)
    for start in range(first, last, BLOCK):
        at = start + n
        inside = (at < last) & (at != slot)
        dots = product(q, tl.trans(tile(keys, start_row, at, last, D, DP)), WIDE)
        shown = dots * scale + bias_of(bias, row, stride, at, inside, HAS_BIAS)[None, :]
        where = (row * G + g)[:, None] * stride + at[None, :]
        tl.store(logits + where, shown, mask=(g < G)[:, None] & inside[None, :])
        inverse = tl.load(inverse_norm + row * stride + at, mask=inside, other=0.0)
        may = tl.load(target_bias + row * stride + at, mask=inside, other=-float("inf"))
        cosine = tl.sum(tl.where((g == G)[:, None], dots, 0.0), 0) * inverse + may
        top, index = tl.max(cosine, 0, return_indices=True, return_indices_tie_break_left=True)
        found = tl.where(top > nearest, start + index, found)
        nearest = tl.maximum(top, nearest)
    tl.store(best + row * splits + split, nearest)
    tl.store(place + row * splits + split, found.to(tl.int64))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def mix(
    out, part, high, total, logits, attention, best, place, required, similarity, weight, merge_target, staged_score,
    score, position, now, query, old_key, old_value, new_value, values, target, base, ends, scale,
    heads, stride, splits, query_b, query_h, value_b, value_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, SP: tl.constexpr, WATCHED: tl.constexpr, KEYS: tl.constexpr,
    MASS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merges the evictee into its target, then softmax and the weighted sum of values; grid (rows, splits) as in
    :func:`weigh`.

    ``required``, ``similarity``, ``weight`` and ``staged_score`` float32 ``[rows]``, ``merge_target`` int64 ``[rows]``,
    as in ``PendingMerge`` and ``PendingMass``; ``score`` float32 and ``position`` int32 ``[rows, stride]``, ``now``
    int32 ``[rows]``, as in ``DecodeState``. MASS merges by mass, and uses neither ``required`` nor ``old_key``; without
    it, what begins with ``staged_score`` and ends with ``now`` is not used.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, dv, n, every = tl.arange(0, M), tl.arange(0, DVP), tl.arange(0, BLOCK), tl.arange(0, SP)
    start_row, slots = tl.load(base + row), tl.load(ends + row).to(tl.int32)
    slot = tl.load(target + row) - start_row
    first, last = share_of(split, 0, slots, splits, BLOCK)
    # 1. the merge target among all splits' best slots, and the evictee's weight
    offered = tl.load(best + row * splits + every, mask=every < splits, other=-float("inf"))
    nearest, winner = tl.max(offered, 0, return_indices=True, return_indices_tie_break_left=True)
    chosen = tl.load(place + row * splits + winner)
    if MASS:
        at_j = row * stride + tl.where(nearest > -float("inf"), chosen, 0)
        seen = (tl.load(now + row) - tl.load(position + at_j) + 1).to(tl.float32)
        mean = tl.maximum(tl.load(score + at_j) / seen, LEAST)
        w = tl.where(nearest > -float("inf"), tl.minimum(tl.load(staged_score + row) / mean, 1.0), 0.0)
        mixing = w / (1.0 + w)
    else:
        w = tl.where(nearest >= tl.load(required + row), 1.0 / (1.0 + tl.exp(-nearest)), 0.0)
        mixing = w
    if split == 0:
        tl.store(similarity + row, nearest)
        tl.store(weight + row, w)
        tl.store(merge_target + row, chosen)
    j = tl.where(nearest > -float("inf"), chosen, -1)
    own, absorbs = (slot >= first) & (slot < last), (j >= first) & (j < last)
    share = mixing.to(values.dtype.element_ty).to(tl.float32)

    # 2. merge the target's value, and write the new token's value
    kept = tl.load(values + (start_row + j) * DV + dv, mask=dv < tl.where(absorbs, DV, 0), other=0.0)
    gone = tl.load(old_value + row * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
    merged = toward(kept.to(tl.float32), gone, share).to(kept.dtype)
    tl.store(values + (start_row + j) * DV + dv, merged, mask=dv < tl.where(absorbs, DV, 0))
    value = head_row(new_value, row, heads, value_b, value_h, DV, DVP)
    tl.store(values + (start_row + slot) * DV + dv, value, mask=dv < tl.where(own, DV, 0))

    # 3. correct the target's logits: by the logarithm of its mass, or by linearity
    line = logits + (row * G + g) * stride
    fresh = tl.load(line + slot, mask=g < tl.where(own, G, 0), other=-float("inf"))
    held = tl.load(line + j, mask=g < tl.where(absorbs, G, 0), other=-float("inf"))
    if MASS:
        held = held + tl.log(1.0 + w)
        tl.store(line + j, held, mask=g < tl.where(absorbs, G, 0))
    if KEYS:
        d = tl.arange(0, DP)
        q = head_rows(query, row, heads, query_b, query_h, G, D, M, DP)
        lost = tl.load(old_key + row * D + d, mask=d < D, other=0.0)
        theirs = tl.sum(q.to(tl.float32) * lost.to(tl.float32)[None, :], 1) * scale
        held = tl.where(g < tl.where(absorbs, G, 0), toward(held, theirs, share), held)
        tl.store(line + j, held, mask=g < tl.where(absorbs, G, 0))
    # 4. start the running softmax with the new token and the target
    m = tl.maximum(fresh, held)
    floor = tl.where(m == -float("inf"), 0.0, m)
    fresh_p, held_p = tl.exp(fresh - floor), tl.exp(held - floor)
    s = fresh_p + held_p
    acc = fresh_p[:, None] * value.to(tl.float32)[None, :] + held_p[:, None] * merged.to(tl.float32)[None, :]
    # 5. add all other slots of the split, block by block
    for start in range(first, last, BLOCK):
        at = start + n
        inside = (at < last) & (at != slot) & (at != j)
        where = (row * G + g)[:, None] * stride + at[None, :]
        shown = tl.load(logits + where, mask=(g < G)[:, None] & inside[None, :], other=-float("inf"))
        m, s, acc = absorb(m, s, acc, shown, tile(values, start_row, at, last, DV, DVP), WIDE)
    leave(
        out, part, high, total, logits, attention, row, split, splits, slots, stride, m, s, acc,
        G, DV, M, DVP, BLOCK, SINGLE, WATCHED,
    )  # fmt: skip
