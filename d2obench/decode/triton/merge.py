"""Triton kernels: attention over slots with D2O's pending evictee riding along, and its merge on the way.

Arithmetic is that of ``d2obench.decode.pending_merge``, with float32 logits: the evictee's unit vector is one more
query, the
row it gives names the nearest host, the host's value is merged and its logit corrected by linearity before the
softmax. A host is known only when all keys were read, so keys (:func:`weigh`) and values (:func:`mix`) are two passes,
each over its half of the bytes. The host's column, like the new token's, enters the sums by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from d2obench.decode.triton.attend import SIZES, absorb, bias_of, head_row, head_rows, leave, product, share_of, tile


@triton.jit
def toward(a, b, w):
    """``torch.lerp`` in float32, by its formula."""
    return tl.where(w < 0.5, a + w * (b - a), b - (b - a) * (1.0 - w))


@triton.jit(do_not_specialize=SIZES)
def weigh(
    logits, best, place, query, unit, new_key, keys, bias, inverse_norm, host_bias, target, base, scale,
    heads, slots, stride, splits, query_b, query_h, key_b, key_h,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits of the group, and each split's nearest host: u − 1 (−inf for none) and slot; the first of equals wins.

    Grid (rows, splits). ``unit`` ``[rows, G + 1, D]`` holds the evictee's unit vector in its last line; ``best``
    float32 and ``place`` int64 ``[rows, splits]``; ``inverse_norm`` and ``host_bias`` float32 ``[rows, stride]``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, n = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, BLOCK)
    slot = tl.load(target + row) - tl.load(base + row)
    first, last = share_of(split, slots, splits, BLOCK)
    own = (slot >= first) & (slot < last)
    q = head_rows(query, row, heads, query_b, query_h, G, D, M, DP)
    key = head_row(new_key, row, heads, key_b, key_h, D, DP)
    tl.store(keys + (row * slots + slot) * D + d, key, mask=d < tl.where(own, D, 0))
    fresh = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    tl.store(logits + (row * G + g) * stride + slot, fresh, mask=g < tl.where(own, G, 0))
    rider = tl.load(unit + (row * (G + 1) + G) * D + d, mask=d < D, other=0.0)
    q = tl.where((g == G)[:, None], rider[None, :], q)
    nearest = tl.full([], -float("inf"), tl.float32)
    host = tl.zeros([], tl.int32)
    for start in range(first, last, BLOCK):
        at = start + n
        inside = (at < last) & (at != slot)
        dots = product(q, tl.trans(tile(keys, row, slots, at, last, D, DP)), WIDE)
        shown = dots * scale + bias_of(bias, row, stride, at, inside, HAS_BIAS)[None, :]
        where = (row * G + g)[:, None] * stride + at[None, :]
        tl.store(logits + where, shown, mask=(g < G)[:, None] & inside[None, :])
        inverse = tl.load(inverse_norm + row * stride + at, mask=inside, other=0.0)
        hosts = tl.load(host_bias + row * stride + at, mask=inside, other=-float("inf"))
        cosine = tl.sum(tl.where((g == G)[:, None], dots, 0.0), 0) * inverse + hosts
        top, index = tl.max(cosine, 0, return_indices=True, return_indices_tie_break_left=True)
        host = tl.where(top > nearest, start + index, host)
        nearest = tl.maximum(top, nearest)
    tl.store(best + row * splits + split, nearest)
    tl.store(place + row * splits + split, host.to(tl.int64))


@triton.jit(do_not_specialize=SIZES)
def mix(
    out, part, high, total, logits, attention, best, place, bar, similarity, weight, host, query, old_key, old_value,
    new_value, values, target, base, scale,
    heads, slots, stride, splits, query_b, query_h, value_b, value_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, SP: tl.constexpr, WATCHED: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The merge into the nearest host, then softmax and values; grid (rows, splits) as in :func:`weigh`.

    ``bar``, ``similarity`` and ``weight`` float32 ``[rows]``, ``host`` int64 ``[rows]``, as in ``carry.PendingMerge``.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, dv, n, every = tl.arange(0, M), tl.arange(0, DVP), tl.arange(0, BLOCK), tl.arange(0, SP)
    slot = tl.load(target + row) - tl.load(base + row)
    first, last = share_of(split, slots, splits, BLOCK)
    offered = tl.load(best + row * splits + every, mask=every < splits, other=-float("inf"))
    nearest, winner = tl.max(offered, 0, return_indices=True, return_indices_tie_break_left=True)
    chosen = tl.load(place + row * splits + winner)
    w = tl.where(nearest >= tl.load(bar + row), 1.0 / (1.0 + tl.exp(-nearest)), 0.0)
    if split == 0:
        tl.store(similarity + row, nearest)
        tl.store(weight + row, w)
        tl.store(host + row, chosen)
    j = tl.where(nearest > -float("inf"), chosen, -1)
    own, hosting = (slot >= first) & (slot < last), (j >= first) & (j < last)
    share = w.to(values.dtype.element_ty).to(tl.float32)

    kept = tl.load(values + (row * slots + j) * DV + dv, mask=dv < tl.where(hosting, DV, 0), other=0.0)
    gone = tl.load(old_value + row * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
    merged = toward(kept.to(tl.float32), gone, share).to(kept.dtype)
    tl.store(values + (row * slots + j) * DV + dv, merged, mask=dv < tl.where(hosting, DV, 0))
    value = head_row(new_value, row, heads, value_b, value_h, DV, DVP)
    tl.store(values + (row * slots + slot) * DV + dv, value, mask=dv < tl.where(own, DV, 0))

    line = logits + (row * G + g) * stride
    fresh = tl.load(line + slot, mask=g < tl.where(own, G, 0), other=-float("inf"))
    held = tl.load(line + j, mask=g < tl.where(hosting, G, 0), other=-float("inf"))
    if KEYS:
        d = tl.arange(0, DP)
        q = head_rows(query, row, heads, query_b, query_h, G, D, M, DP)
        lost = tl.load(old_key + row * D + d, mask=d < D, other=0.0)
        theirs = tl.sum(q.to(tl.float32) * lost.to(tl.float32)[None, :], 1) * scale
        held = tl.where(g < tl.where(hosting, G, 0), toward(held, theirs, share), held)
        tl.store(line + j, held, mask=g < tl.where(hosting, G, 0))
    m = tl.maximum(fresh, held)
    floor = tl.where(m == -float("inf"), 0.0, m)
    fresh_p, held_p = tl.exp(fresh - floor), tl.exp(held - floor)
    s = fresh_p + held_p
    acc = fresh_p[:, None] * value.to(tl.float32)[None, :] + held_p[:, None] * merged.to(tl.float32)[None, :]
    for start in range(first, last, BLOCK):
        at = start + n
        inside = (at < last) & (at != slot) & (at != j)
        where = (row * G + g)[:, None] * stride + at[None, :]
        shown = tl.load(logits + where, mask=(g < G)[:, None] & inside[None, :], other=-float("inf"))
        m, s, acc = absorb(m, s, acc, shown, tile(values, row, slots, at, last, DV, DVP), WIDE)
    leave(
        out, part, high, total, logits, attention, row, split, splits, slots, stride, m, s, acc,
        G, DV, M, DVP, BLOCK, SINGLE, WATCHED,
    )  # fmt: skip
