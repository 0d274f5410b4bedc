"""Attention of one layer in a decode step, as a compiled loop (numba). Importing this module compiles the loop, or
loads it from numba's cache. A *lane* in this file is one query vector of a row: a query head, or the evictee's unit
vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu import HEADER, Arguments, Floats, Ints, Longs, Real, Size
from d2obench.cpu.language import (
    LANES,
    LOOP,
    arguments,
    blend,
    dots,
    exp,
    fail,
    floats,
    highest,
    integers,
    loop,
    next_item,
    record_of,
)
from d2obench.decode.cpu.merge import BY_MASS, copy, merge_mass, merge_value

KEYS, VALUES = 48, 64
"""Number of slots whose keys (or values) fit a core's first-level cache while all query heads of the group use them."""
_dots1, _dots2, _dots3, _dots4, _dot = dots(4, 1), dots(4, 2), dots(4, 3), dots(3, 4), dots(1, 1)
_blend1, _blend2, _blend3, _blend4 = blend(1), blend(2), blend(3), blend(4)


@njit(**LOOP)
def _multiply(keys: int, queries: int, logits: int, count: int, lanes: int, width: int, stride: int) -> None:
    """Products of ``lanes`` queries with ``count`` keys, ``logits[lane·stride + slot]``."""
    for start in range(0, count, KEYS):
        end = min(count, start + KEYS)
        lane = 0
        while lane < lanes:
            some = min(4, lanes - lane)
            side = 3 if some == 4 else 4
            query, slot = queries + 4 * lane * width, start
            while slot + side <= end:
                key, to = keys + 4 * slot * width, logits + 4 * (lane * stride + slot)
                ahead = key + 4 * KEYS * width
                if some == 4:
                    _dots4(key, query, to, ahead, width, width, width, stride)
                elif some == 3:
                    _dots3(key, query, to, ahead, width, width, width, stride)
                elif some == 2:
                    _dots2(key, query, to, ahead, width, width, width, stride)
                else:
                    _dots1(key, query, to, ahead, width, width, width, stride)
                slot += side
            while slot < end:
                key = keys + 4 * slot * width
                for one in range(some):
                    to = logits + 4 * ((lane + one) * stride + slot)
                    _dot(key, query + 4 * one * width, to, key, width, width, width, stride)
                slot += 1
            lane += some


@njit(**LOOP)
def _mix(values: int, weights: int, out: int, count: int, lanes: int, width: int, stride: int) -> None:
    """Adds ``count`` values, weighted by ``weights[lane·stride + slot]``, to ``out[lane·width + …]``."""
    for start in range(0, count, VALUES):
        some = min(VALUES, count - start)
        for column in range(0, width, 2 * LANES):
            value = values + 4 * (start * width + column)
            ahead = value + 4 * VALUES * width
            lane = 0
            while lane < lanes:
                weight, to = weights + 4 * (lane * stride + start), out + 4 * (lane * width + column)
                if lanes - lane >= 4:
                    _blend4(value, weight, to, ahead, some, width, stride, width)
                elif lanes - lane == 3:
                    _blend3(value, weight, to, ahead, some, width, stride, width)
                elif lanes - lane == 2:
                    _blend2(value, weight, to, ahead, some, width, stride, width)
                else:
                    _blend1(value, weight, to, ahead, some, width, stride, width)
                lane += 4


@njit(**LOOP)
def _softmax(logits: Any, bias: Any, scale: Any, count: int) -> Any:
    """Turns logits into softmax weights in place, unnormalised (the largest is 1); returns 1 ÷ their sum."""
    if len(bias):
        for slot in range(count):
            logits[slot] = logits[slot] * scale + bias[slot]
    else:
        for slot in range(count):
            logits[slot] = logits[slot] * scale
    high = highest(logits, count)
    total = np.float32(0)
    for slot in range(count):
        logits[slot] = exp(logits[slot] - high)
        total += logits[slot]
    return np.float32(1) / total


class AttendArguments(Arguments):
    """Arguments of the loop for one layer; a work item is one row.

    ``query``, ``new_key``, ``new_value`` and ``out`` belong to the current step. ``keys`` and ``values`` are the
    store's flat tensors; a row has the slots from its ``begins`` to its ``ends`` (in a cache that ``grows``, to that of
    the new token), ``slots`` in all rows together. ``group`` is the number of query heads per row; ``width`` and
    ``value_width`` are the channels of a key and of a value. ``bias`` and ``attention`` (0 if unused),
    ``inverse_norm`` and ``target_bias`` have ``stride`` numbers per row. ``scratch`` has ``scratch_row`` floats per
    row. The fields from ``merging`` on describe a pending merge: those up to ``merge_target`` as in
    ``d2obench.decode.merge``, the others for a merge by mass, named after those of ``DecodeState`` and ``PendingMass``.
    """

    _fields_ = (
        *HEADER, ("query", Floats), ("new_key", Floats), ("new_value", Floats), ("out", Floats), ("keys", Floats),
        ("values", Floats), ("slots", Size), ("grows", Size), ("begins", Longs), ("ends", Longs), ("target", Longs),
        ("base", Longs), ("group", Size), ("width", Size), ("value_width", Size), ("scale", Real), ("bias", Floats),
        ("attention", Floats), ("stride", Size), ("scratch", Floats), ("scratch_row", Size), ("merging", Size),
        ("merge_keys", Size), ("queries", Floats), ("staged_key", Floats), ("staged_value", Floats),
        ("inverse_norm", Floats), ("target_bias", Floats), ("required", Floats), ("similarity", Floats),
        ("weight", Floats), ("merge_target", Longs), ("staged_score", Floats), ("score", Floats), ("position", Ints),
        ("now", Ints),
    )  # fmt: skip


RECORD = record_of(AttendArguments)


def _flops(a: Any) -> int:
    """Operations of the products with keys (including a staged evictee's) and with values."""
    found: int = 2 * a.slots * ((a.group + (a.merging > 0)) * a.width + a.group * a.value_width)
    return found


@njit(**LOOP)
def _attend(given: Any) -> None:
    a = arguments(given, RECORD)
    group, width, value_width = a.group, a.width, a.value_width
    stride, rows, scale = a.stride, a.items, np.float32(a.scale)
    targets, bases = integers(a.target, rows), integers(a.base, rows)
    begins, ends = integers(a.begins, rows), integers(a.ends, rows)
    while True:
        row = next_item(given)
        if row < 0:
            return
        # 1. write the new token to its slot; slots are counted from the row's first one (0 where anything is merged)
        begin, first = begins[row], bases[row] + begins[row]
        slot, line = targets[row] - first, 4 * (row * stride + begin)
        count = slot + 1 if a.grows else ends[row] - begin
        own_keys, own_values = a.keys + 4 * first * width, a.values + 4 * first * value_width
        copy(a.new_key + 4 * row * width, own_keys + 4 * slot * width, width)
        copy(a.new_value + 4 * row * value_width, own_values + 4 * slot * value_width, value_width)
        # 2. multiply the queries with all keys; a staged evictee's unit vector is one more query
        queries, lanes, logits = a.query + 4 * row * group * width, group, a.scratch + 4 * row * a.scratch_row
        if a.merging:
            lanes = group + 1
            copy(queries, a.queries + 4 * row * lanes * width, group * width)
            queries = a.queries + 4 * row * lanes * width
        _multiply(own_keys, queries, logits, count, lanes, width, count)
        if a.merging == BY_MASS:
            merge_mass(a, row, logits, own_values, count)
        elif a.merging:
            merge_value(a, row, queries, logits, own_values, count)
        # 3. softmax, then the weighted sum of values
        found = floats(a.out + 4 * row * group * value_width, group * value_width)
        found[:] = 0
        hidden = floats(a.bias + line, count if a.bias else 0)
        inverses = floats(logits + 4 * lanes * count, group)
        for lane in range(group):
            inverses[lane] = _softmax(floats(logits + 4 * lane * count, count), hidden, scale, count)
        _mix(own_values, logits, a.out + 4 * row * group * value_width, count, group, value_width, count)
        for lane in range(group):
            found[lane * value_width : (lane + 1) * value_width] *= inverses[lane]
        # 4. attention weights per slot, summed over the query heads
        if a.attention:
            seen = floats(a.attention + line, count)
            for lane in range(group):
                weights, factor = floats(logits + 4 * lane * count, count), inverses[lane]
                if lane == 0:
                    for at_slot in range(count):
                        seen[at_slot] = weights[at_slot] * factor
                else:
                    for at_slot in range(count):
                        seen[at_slot] += weights[at_slot] * factor


@loop(_flops)
def attend(given: Any) -> None:
    """Computes the attention of one new query over a layer's slots; ``given`` is the address of
    :class:`AttendArguments`."""
    try:
        _attend(given)
    except Exception:
        fail(given)
