"""The loop of ``d2obench.decode.cpu.backend``: one layer's attention of a decode step, for all its rows (numba).

Importing this compiles it, or reads numba's cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu import Arguments
from d2obench.cpu.language import (  # fmt: skip
    FAST,
    LANES,
    blend,
    dots,
    exp,
    first_extreme,
    floats,
    integers,
    loop,
    take,
    words_at,
)

KEYS, VALUES = 48, 64
"""Slots whose keys, or values, stay in a core's first cache while all query heads of the group see them."""
_dots1, _dots2, _dots3, _dots4, _dot = dots(4, 1), dots(4, 2), dots(4, 3), dots(3, 4), dots(1, 1)
_blend1, _blend2, _blend3, _blend4 = blend(1), blend(2), blend(3), blend(4)


@njit(fastmath=FAST)
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


@njit(fastmath=FAST)
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


@njit(fastmath=FAST)
def _host(product: Any, inverse: Any, hosts: Any, cosine: Any, width: int) -> int:
    """The slot whose key is nearest to the pending evictee; ``cosine`` then holds u − 1."""
    for slot in range(width):
        cosine[slot] = product[slot] * inverse[slot] + hosts[slot]
    return first_extreme(cosine, width, True)


@njit(fastmath=FAST)
def _softmax(logits: Any, bias: Any, scale: Any, count: int) -> Any:
    """Logits become weights in place, with the highest at 1; the inverse of their sum."""
    high = np.float32(-np.inf)
    if len(bias):
        for slot in range(count):
            logits[slot] = logits[slot] * scale + bias[slot]
            high = max(high, logits[slot])
    else:
        for slot in range(count):
            logits[slot] = logits[slot] * scale
            high = max(high, logits[slot])
    total = np.float32(0)
    for slot in range(count):
        logits[slot] = exp(logits[slot] - high)
        total += logits[slot]
    return np.float32(1) / total


@njit(fastmath=FAST)
def _copy(source: int, to: int, count: int) -> None:
    floats(to, count)[:] = floats(source, count)


@njit(fastmath=FAST)
def _toward(held: int, other: int, count: int, share: float) -> None:
    """Moves a row towards another by a share of the way."""
    own, theirs = floats(held, count), floats(other, count)
    for i in range(count):
        own[i] += share * (theirs[i] - own[i])


@njit(fastmath=FAST)
def _product(a: int, b: int, count: int) -> Any:
    one, other, total = floats(a, count), floats(b, count), np.float32(0)
    for i in range(count):
        total += one[i] * other[i]
    return total


def _flops(words: Arguments) -> int:
    """Of the products with keys, an evictee's among them, and with values."""
    group, width, value_width = words[12:15]
    return 2 * words[1] * words[9] * ((group + bool(words[21])) * width + group * value_width)


@loop(_flops)
def attend(given: Any) -> None:
    """A piece is a row: its new token is written, its pending evictee merged, its queries attend.

    Words: query, new key, new value, out; keys, values, capacity, slots in use; target, base; query heads of a group,
    channels of keys and of values, bits of the scale; bias, attention (0 for none), their stride; room and floats of
    it a row; unit queries (0 where nothing rides along), evicted key and value, inverse norms, bias of hosts, bar,
    similarity, weight, host, whether keys merge. All of one layer.
    """
    words = words_at(given)
    query, new_key, new_value, out = words[2:6]
    keys, values, capacity, count, target, base = words[6:12]
    group, width, value_width = words[12:15]
    scale = np.float32(words[15:16].view(np.float64)[0])
    bias, attention, stride, room, share = words[16:21]
    riding, key, value, inverse, hosts, bar, similarity, weight, host, merges = words[21:31]
    rows = words[1]
    targets, bases = integers(target, rows), integers(base, rows)
    while True:
        row = take(given)
        if row < 0:
            return
        slot = targets[row] - bases[row]
        own_keys, own_values = keys + 4 * row * capacity * width, values + 4 * row * capacity * value_width
        _copy(new_key + 4 * row * width, own_keys + 4 * slot * width, width)
        _copy(new_value + 4 * row * value_width, own_values + 4 * slot * value_width, value_width)
        queries, lanes, logits = query + 4 * row * group * width, group, room + 4 * row * share
        if riding:
            lanes = group + 1
            _copy(queries, riding + 4 * row * lanes * width, group * width)
            queries = riding + 4 * row * lanes * width
        _multiply(own_keys, queries, logits, count, lanes, width, count)
        if riding:
            near = floats(inverse + 4 * row * stride, stride)
            may = floats(hosts + 4 * row * stride, stride)
            cosine = floats(logits + 4 * lanes * count, count)
            j = _host(floats(logits + 4 * group * count, count), near, may, cosine, count)
            integers(host, rows)[row], floats(similarity, rows)[row] = j, cosine[j]
            share_of = np.float32(0)
            if cosine[j] >= floats(bar, rows)[row]:
                share_of = np.float32(1 / (1 + math.exp(-cosine[j])))
                _toward(own_values + 4 * j * value_width, value + 4 * row * value_width, value_width, share_of)
                if merges:
                    for lane in range(group):
                        at = floats(logits + 4 * lane * count, count)
                        at[j] += share_of * (_product(queries + 4 * lane * width, key + 4 * row * width, width) - at[j])
            floats(weight, rows)[row] = share_of
        found = floats(out + 4 * row * group * value_width, group * value_width)
        found[:] = 0
        hidden = floats(bias + 4 * row * stride, stride if bias else 0)
        inverses = floats(logits + 4 * lanes * count, group)
        for lane in range(group):
            inverses[lane] = _softmax(floats(logits + 4 * lane * count, count), hidden, scale, count)
        _mix(own_values, logits, out + 4 * row * group * value_width, count, group, value_width, count)
        for lane in range(group):
            found[lane * value_width : (lane + 1) * value_width] *= inverses[lane]
        if attention:
            seen = floats(attention + 4 * row * stride, stride)
            for lane in range(group):
                weights, factor = floats(logits + 4 * lane * count, count), inverses[lane]
                if lane == 0:
                    for at_slot in range(count):
                        seen[at_slot] = weights[at_slot] * factor
                else:
                    for at_slot in range(count):
                        seen[at_slot] += weights[at_slot] * factor
