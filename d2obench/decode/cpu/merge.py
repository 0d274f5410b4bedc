"""The merges during decoding, as parts of the compiled loops: D2O's (``d2obench.decode.merge`` explains the algorithm)
and the one by mass (``d2obench.decode.mass``).

``a`` holds the arguments of the calling loop: those of ``attend`` in :func:`merge_value` and :func:`merge_mass`, those
of ``update`` elsewhere. ``lane`` is the index ``layer · rows + row`` of a row among all layers (in :func:`merge_value`:
a query head).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu.language import LOOP, first_extreme, flags, floats, integers, shorts
from d2obench.decode.merge import TARGET_BIAS
from d2obench.policies.mass import LEAST
from d2obench.policies.merging import TINY

BY_SIMILARITY, BY_MASS = 1, 2
"""Kinds of merges; 0 stands for none."""
LEAST_MEAN = np.float32(LEAST)
LEAST_NORM, TARGET, ONE = np.float32(TINY), np.float32(TARGET_BIAS), np.float32(1)


@njit(**LOOP)
def copy(source: int, to: int, count: int) -> None:
    """Copies floats from one address to another."""
    floats(to, count)[:] = floats(source, count)


@njit(**LOOP)
def _toward(held: Any, other: Any, share: float) -> None:
    """Moves the vector ``held`` towards ``other`` by the fraction ``share`` of their difference, in place."""
    for i in range(len(held)):
        held[i] += share * (other[i] - held[i])


@njit(**LOOP)
def _product(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(**LOOP)
def _inverse_norm(key: Any) -> Any:
    return ONE / max(np.float32(math.sqrt(_product(key, key))), LEAST_NORM)


@njit(**LOOP)
def _nearest_slot(a: Any, row: int, logits: int, count: int) -> Any:
    """The slot whose key is most similar to the staged evictee's, and u − 1, from the last row of the products."""
    group = a.group
    product = floats(logits + 4 * group * count, count)
    cosine = floats(logits + 4 * (group + 1) * count, count)
    inverse = floats(a.inverse_norm + 4 * row * a.stride, count)
    may = floats(a.target_bias + 4 * row * a.stride, count)
    for slot in range(count):
        cosine[slot] = product[slot] * inverse[slot] + may[slot]
    j = first_extreme(cosine, count, True)
    integers(a.merge_target, a.items)[row], floats(a.similarity, a.items)[row] = j, cosine[j]
    return j, cosine[j]


@njit(**LOOP)
def merge_mass(a: Any, row: int, logits: int, own_values: int, count: int) -> None:
    """Finds the staged evictee's merge target, merges its value, and raises the target's logits."""
    value_width, line = a.value_width, 4 * row * a.stride
    j, nearest = _nearest_slot(a, row, logits, count)
    ratio, mean = np.float32(0), floats(a.staged_score, a.items)[row]
    if mean > 0 and nearest > -np.inf:
        scores, position = floats(a.score + line, a.stride), shorts(a.position + line, a.stride)
        seen = shorts(a.now, a.items)[row] - position[j] + 1
        ratio = min(mean / max(scores[j] / np.float32(seen), LEAST_MEAN), ONE)
        value = floats(a.staged_value + 4 * row * value_width, value_width)
        _toward(floats(own_values + 4 * j * value_width, value_width), value, ratio / (ONE + ratio))
        gain = np.float32(math.log1p(ratio) / a.scale)  # logits are multiplied by the scale afterwards
        for lane in range(a.group):
            floats(logits + 4 * lane * count, count)[j] += gain
    floats(a.weight, a.items)[row] = ratio


@njit(**LOOP)
def merge_value(a: Any, row: int, queries: int, logits: int, own_values: int, count: int) -> None:
    """Finds the staged evictee's merge target, merges its value, and corrects the target's logits."""
    group, width, value_width = a.group, a.width, a.value_width
    # 1. find the slot whose key is most similar to the evictee's, and u − 1
    j, nearest = _nearest_slot(a, row, logits, count)
    # 2. compute the evictee's weight; merge the value and, by linearity, the logits
    share = np.float32(0)
    if nearest >= floats(a.required, a.items)[row]:
        share = np.float32(1 / (1 + math.exp(-nearest)))
        value = floats(a.staged_value + 4 * row * value_width, value_width)
        _toward(floats(own_values + 4 * j * value_width, value_width), value, share)
        if a.merge_keys:
            key = floats(a.staged_key + 4 * row * width, width)
            for lane in range(group):
                at = floats(logits + 4 * lane * count, count)
                at[j] += share * (_product(floats(queries + 4 * lane * width, width), key) - at[j])
    floats(a.weight, a.items)[row] = share


@njit(**LOOP)
def commit(a: Any, layer: int, row: int, slot: int, scores: Any) -> None:
    """Completes the pending merge of a row: threshold, count, merged key, inherited score, and norms of changed
    keys."""
    lane = layer * a.rows + row
    lanes, first = a.items * a.rows, integers(a.base, a.items * a.rows)[lane]
    # 1. update the threshold
    similarity, thresholds = floats(a.similarity, lanes), floats(a.threshold, lanes)
    newest = similarity[lane]
    if a.per_layer:
        total, sequence = np.float32(0), lane - row % a.heads
        for head in range(a.heads):
            total += similarity[sequence + head]
        newest = total / np.float32(a.heads)
    if flags(a.pending, lanes)[lane] and newest > -np.inf:
        u, old = newest + ONE, thresholds[lane]
        thresholds[lane] = u if math.isinf(old) else old + np.float32(a.beta) * (u - old)
    # 2. merge the target's key and score
    norms = floats(a.inverse_norm + 4 * lane * a.stride, a.stride)
    share, j = floats(a.weight, lanes)[lane], integers(a.merge_target, lanes)[lane]
    if share > 0:
        integers(a.merged, a.items)[layer] += 1
        if a.merge_keys:
            target = floats(a.keys + 4 * (first + j) * a.width, a.width)
            _toward(target, floats(a.staged_key + 4 * lane * a.width, a.width), share)
            norms[j] = _inverse_norm(target)
        if a.inherit:
            scores[j] += floats(a.staged_score, lanes)[lane]
    # 3. allow the token just decoded as a merge target from now on
    _admit(a, lane, slot)


@njit(**LOOP)
def commit_mass(a: Any, layer: int, row: int, slot: int, scores: Any) -> None:
    """Completes the pending merge of a row by mass: count, bias, and accumulated attention."""
    lane = layer * a.rows + row
    ratio, j = floats(a.weight, a.items * a.rows)[lane], integers(a.merge_target, a.items * a.rows)[lane]
    if ratio > 0:
        integers(a.merged, a.items)[layer] += 1
        floats(a.bias + 4 * lane * a.stride, a.stride)[j] += np.float32(math.log1p(ratio))
        scores[j] *= ONE + ratio
        if a.square:
            floats(a.square + 4 * lane * a.stride, a.stride)[j] *= (ONE + ratio) * (ONE + ratio)
    _admit(a, lane, slot)


@njit(**LOOP)
def _admit(a: Any, lane: int, slot: int) -> None:
    """Allows the token in a slot as a merge target."""
    first = integers(a.base, a.items * a.rows)[lane]
    key = floats(a.keys + 4 * (first + slot) * a.width, a.width)
    floats(a.inverse_norm + 4 * lane * a.stride, a.stride)[slot] = _inverse_norm(key)
    _targets(a, lane)[slot] = TARGET


@njit(**LOOP)
def norm_of(values: int, width: int) -> Any:
    """The norm of a vector at an address."""
    held = floats(values, width)
    return np.float32(math.sqrt(_product(held, held)))


@njit(**LOOP)
def _copy_victim(a: Any, lane: int, victim: int) -> None:
    """Copies the unit vector and the value of a row's victim to the staging buffers."""
    first, width = integers(a.base, a.items * a.rows)[lane], a.width
    norm = floats(a.inverse_norm + 4 * lane * a.stride, a.stride)[victim]
    leaving = floats(a.keys + 4 * (first + victim) * width, width)
    unit = floats(a.queries + 4 * ((lane + 1) * (a.group + 1) - 1) * width, width)
    for i in range(width):
        unit[i] = leaving[i] * norm
    source = a.values + 4 * (first + victim) * a.value_width
    copy(source, a.staged_value + 4 * lane * a.value_width, a.value_width)


@njit(**LOOP)
def stage_mass(a: Any, lane: int, victim: int, seen: int, real: bool, scores: Any) -> None:
    """Copies a row's victim to the staging buffers for the merge by mass in the next step; ``seen`` queries could
    attend to it."""
    _copy_victim(a, lane, victim)
    mean = scores[victim] / np.float32(seen)
    floats(a.staged_score, a.items * a.rows)[lane] = mean if real else np.float32(0)
    _targets(a, lane)[victim] = -np.inf


@njit(**LOOP)
def stage(a: Any, lane: int, victim: int, real: bool, score: float, position: Any, sinks: int, limit: int) -> None:
    """Copies a row's victim to the staging buffers for D2O's merge in the next step; ``limit`` is the last position
    before the recent window, ``real`` is False if the victim's slot was empty."""
    lanes, first, width = a.items * a.rows, integers(a.base, a.items * a.rows)[lane], a.width
    # 1. copy its key, unit vector, value and score
    _copy_victim(a, lane, victim)
    copy(a.keys + 4 * (first + victim) * width, a.staged_key + 4 * lane * width, width)
    floats(a.staged_score, lanes)[lane] = score
    # 2. mark the slots that may be merge targets
    may = _targets(a, lane)
    if a.important:
        for slot in range(a.stride):
            may[slot] = TARGET if max(sinks, 0) <= position[slot] <= limit else -np.inf
    may[victim] = -np.inf
    # 3. set the similarity required for the merge
    flags(a.pending, lanes)[lane] = real
    least = floats(a.threshold, lanes)[lane] - ONE if a.beta < 1 else np.float32(-np.inf)
    floats(a.required, lanes)[lane] = least if real else np.float32(np.inf)


@njit(inline="always")
def _targets(a: Any, lane: int) -> Any:
    return floats(a.target_bias + 4 * lane * a.stride, a.stride)
