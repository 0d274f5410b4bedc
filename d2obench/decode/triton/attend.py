"""Triton kernels: attention of one new query per head over the slots of a layer.

Design. The cache of a KV head (a *row*) can be split over several programs, so that a small batch also occupies the
whole device ("flash-decoding"). A program computes all query heads of the row's group, padded to 16 rows for the tensor
cores, and reads every key and value of its split once. Softmax and sums are float32. With a single split the program
writes the final output; otherwise :func:`join` combines the partial results. The attention weights that policies use
are computed from the logits, which stay in the second-level cache until then (4·G bytes per slot, against 4·d bytes of
keys and values at 16 bits).

The new token's key and value come directly from the model. They are written to their slot, and their contribution to
the sums is added separately, so that the loads of all other slots can be pipelined straight into the products.

Every address is computed from the arguments and from tensors on the device, so that a CUDA graph can replay a launch:
the length of a growing cache is its newest slot + 1. Integer arguments are not specialised, so one compilation works
for all sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = [
    "heads", "stride", "splits", "query_b", "query_h", "key_b", "key_h", "value_b", "value_h",
]  # fmt: skip
UNALIGNED = [
    "query", "new_key", "new_value", "logits", "attention", "bias", "target", "base", "begins", "ends", "now",
    "position", "score", "required", "similarity", "weight", "merge_target", "staged_score",
    "inverse_norm", "target_bias",
]  # fmt: skip
"""Pointers that are compiled for any alignment: the model's own tensors, which may begin anywhere in a fused
projection, and rows of one number per slot, whose length is not specialised, so that alignment would gain nothing."""


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """``a·b`` with float32 sums; WIDE multiplies in float32, too (float32 caches, and Triton's interpreter)."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def share_of(split, begin, end, splits, BLOCK: tl.constexpr):
    """First slot of a split, and the slot behind its last one. Splits consist of whole blocks of a row's slots."""
    blocks = tl.cdiv(tl.cdiv(end - begin, BLOCK), splits)
    first = begin + split * blocks * BLOCK
    return first, tl.minimum(first + blocks * BLOCK, end)


@triton.jit
def head_rows(query, row, heads, query_b, query_h, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr):
    """The query heads of a row, ``[M, DP]``; rows from G on are zero."""
    g, d = tl.arange(0, M), tl.arange(0, DP)
    at = (row // heads) * query_b + ((row % heads) * G + g)[:, None] * query_h + d[None, :]
    return tl.load(query + at, mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def head_row(new, row, heads, stride_b, stride_h, D: tl.constexpr, DP: tl.constexpr):
    """The row's new key or value, ``[DP]``."""
    d = tl.arange(0, DP)
    return tl.load(new + (row // heads) * stride_b + (row % heads) * stride_h + d, mask=d < D, other=0.0)


@triton.jit
def tile(held, start_row, at, last, D: tl.constexpr, DP: tl.constexpr):
    """Keys or values of the slots ``at`` of the row whose slot 0 is ``start_row`` in the store, ``[BLOCK, DP]``; zeros
    from ``last`` on."""
    d = tl.arange(0, DP)
    where = (start_row + at)[:, None] * D + d[None, :]
    return tl.load(held + where, mask=(at < last)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def bias_of(bias, row, stride, at, inside, HAS_BIAS: tl.constexpr):
    """Bias of the logits of the slots ``at``: −inf for a slot that is empty or not ``inside``."""
    if HAS_BIAS:
        return tl.load(bias + row * stride + at, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(inside, 0.0, -float("inf"))


@triton.jit
def absorb(m, s, acc, shown, v, WIDE: tl.constexpr):
    """Adds one tile to a running softmax: updates the maxima m, the totals s and the weighted sums acc."""
    higher = tl.maximum(m, tl.max(shown, 1))
    floor = tl.where(higher == -float("inf"), 0.0, higher)
    p, fade = tl.exp(shown - floor[:, None]), tl.exp(m - floor)
    return higher, s * fade + tl.sum(p, 1), acc * fade[:, None] + product(p.to(v.dtype), v, WIDE)


@triton.jit
def leave(
    out, part, high, total, logits, attention, row, split, splits, slots, stride, m, s, acc,
    G: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr,
    SINGLE: tl.constexpr, WATCHED: tl.constexpr,
):  # fmt: skip
    """Writes the output and the attention weights of the row's first ``slots`` slots if there is a single split;
    otherwise the split's partial result."""
    g, dv = tl.arange(0, M), tl.arange(0, DVP)
    real = (g < G)[:, None] & (dv < DV)[None, :]
    if SINGLE:
        mixed = acc / s[:, None]
        tl.store(out + (row * G + g)[:, None] * DV + dv[None, :], mixed.to(out.dtype.element_ty), mask=real)
        if WATCHED:
            tl.debug_barrier()  # the logits were written by other threads of this program
            for start in range(0, slots, BLOCK):
                at = start + tl.arange(0, BLOCK)
                shown = tl.load(
                    logits + (row * G + g)[:, None] * stride + at[None, :],
                    mask=(g < G)[:, None] & (at < slots)[None, :], other=-float("inf"),
                )  # fmt: skip
                weights = tl.where((g < G)[:, None], tl.exp(shown - m[:, None]) / s[:, None], 0.0)
                tl.store(attention + row * stride + at, tl.sum(weights, 0), mask=at < slots)
    else:
        where = (row * splits + split) * G + g
        tl.store(part + where[:, None] * DV + dv[None, :], acc, mask=real)
        tl.store(high + where, m, mask=g < G)
        tl.store(total + where, s, mask=g < G)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def attend(
    out, part, high, total, logits, attention, query, new_key, new_value, keys, values, bias, target, base, begins,
    ends, scale, heads, stride, splits, query_b, query_h, key_b, key_h, value_b, value_h,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, GROWS: tl.constexpr, HAS_BIAS: tl.constexpr, WATCHED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attention in one pass over keys and values; grid (rows, splits).

    ``out`` ``[rows, G, DV]``; ``part`` float32 ``[rows, splits, G, DV]``, ``high`` and ``total`` float32
    ``[rows, splits, G]``; ``logits`` float32 ``[rows, G, stride]``; ``attention`` float32 and ``bias``
    ``[rows, stride]``; ``keys`` ``[…, D]``, those of all layers; ``target``, ``base``, ``begins`` and ``ends`` int64
    ``[rows]`` as in ``DenseStore``. Only a cache that grows has rows that do not begin at slot 0.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, dv, n = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, BLOCK)
    start_row, begin, slots = tl.load(base + row), tl.load(begins + row).to(tl.int32), tl.load(ends + row).to(tl.int32)
    slot = tl.load(target + row) - start_row
    if GROWS:
        slots = (slot + 1).to(tl.int32)
    first, last = share_of(split, begin, slots, splits, BLOCK)
    # 1. write the new token to its slot, and start the running softmax with it (in the split that contains the slot)
    own = (slot >= first) & (slot < last)
    q = head_rows(query, row, heads, query_b, query_h, G, D, M, DP)
    key = head_row(new_key, row, heads, key_b, key_h, D, DP)
    value = head_row(new_value, row, heads, value_b, value_h, DV, DVP)
    tl.store(keys + (start_row + slot) * D + d, key, mask=d < tl.where(own, D, 0))
    tl.store(values + (start_row + slot) * DV + dv, value, mask=dv < tl.where(own, DV, 0))
    m = tl.where(own, tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale, -float("inf"))
    if WATCHED:
        tl.store(logits + (row * G + g) * stride + slot, m, mask=g < tl.where(own, G, 0))
    s = tl.where(own, 1.0, 0.0) + tl.zeros([M], tl.float32)
    acc = s[:, None] * value.to(tl.float32)[None, :]
    # 2. add all other slots of the split, block by block
    for start in range(first, last, BLOCK):
        at = start + n
        inside = (at < last) & (at != slot)
        k = tile(keys, start_row, at, last, D, DP)
        shown = product(q, tl.trans(k), WIDE) * scale + bias_of(bias, row, stride, at, inside, HAS_BIAS)[None, :]
        if WATCHED:
            where = (row * G + g)[:, None] * stride + at[None, :]
            tl.store(logits + where, shown, mask=(g < G)[:, None] & inside[None, :])
        m, s, acc = absorb(m, s, acc, shown, tile(values, start_row, at, last, DV, DVP), WIDE)
    # 3. write the result, or the partial result of this split
    leave(
        out, part, high, total, logits, attention, row, split, splits, slots, stride, m, s, acc,
        G, DV, M, DVP, BLOCK, SINGLE, WATCHED,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def join(
    out, part, high, total, logits, attention, ends, stride, splits,
    G: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr,
    WATCHED: tl.constexpr,
):  # fmt: skip
    """Combines the partial results of all splits; if WATCHED, also computes a chunk of the attention weights (sum over
    the query heads). Grid (rows, chunks), SP ≥ splits."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    every, dv = tl.arange(0, SP), tl.arange(0, DVP)
    c = chunk * CHUNK + tl.arange(0, CHUNK)
    summed = tl.zeros([CHUNK], tl.float32)
    slots = tl.load(ends + row).to(tl.int32)
    for g in range(G):
        at = (row * splits + every) * G + g
        highs = tl.load(high + at, mask=every < splits, other=-float("inf"))
        m = tl.max(highs, 0)
        fade = tl.exp(highs - m)
        s = tl.sum(tl.load(total + at, mask=every < splits, other=0.0) * fade, 0)
        if chunk == 0:
            where = at[:, None] * DV + dv[None, :]
            parts = tl.load(part + where, mask=(every < splits)[:, None] & (dv < DV)[None, :], other=0.0)
            joined = tl.sum(parts * fade[:, None], 0) / s
            tl.store(out + (row * G + g) * DV + dv, joined.to(out.dtype.element_ty), mask=dv < DV)
        if WATCHED:
            shown = tl.load(logits + (row * G + g) * stride + c, mask=c < slots, other=-float("inf"))
            summed += tl.exp(shown - m) / s
    if WATCHED:
        tl.store(attention + row * stride + c, summed, mask=c < slots)
