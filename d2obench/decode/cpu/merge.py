"""D2O's merge during decoding, as parts of the compiled loops; ``d2obench.decode.merge`` explains the algorithm.

``a`` holds the arguments of the calling loop: those of ``attend`` in :func:`merge_value`, those of ``update``
elsewhere. ``lane`` is the index ``layer · rows + row`` of a row among all layers (in :func:`merge_value`: a query
head).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu.language import LOOP, first_extreme, flags, floats, integers
from d2obench.decode.merge import TARGET_BIAS
from d2obench.policies.merging import TINY

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
def merge_value(a: Any, row: int, queries: int, logits: int, own_values: int) -> None:
    """Finds the staged evictee's merge target from the last row of the logits, merges its value, and corrects the
    target's logits."""
    group, width, value_width, count = a.group, a.width, a.value_width, a.filled
    # 1. find the slot whose key is most similar to the evictee's, and u − 1
    product = floats(logits + 4 * group * count, count)
    cosine = floats(logits + 4 * (group + 1) * count, count)
    inverse = floats(a.inverse_norm + 4 * row * a.stride, count)
    may = floats(a.target_bias + 4 * row * a.stride, count)
    for slot in range(count):
        cosine[slot] = product[slot] * inverse[slot] + may[slot]
    j = first_extreme(cosine, count, True)
    integers(a.merge_target, a.items)[row], floats(a.similarity, a.items)[row] = j, cosine[j]
    # 2. compute the evictee's weight; merge the value and, by linearity, the logits
    share = np.float32(0)
    if cosine[j] >= floats(a.required, a.items)[row]:
        share = np.float32(1 / (1 + math.exp(-cosine[j])))
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
    norms, may = floats(a.inverse_norm + 4 * lane * a.stride, a.stride), _targets(a, lane)
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
    norms[slot] = _inverse_norm(floats(a.keys + 4 * (first + slot) * a.width, a.width))
    may[slot] = TARGET


@njit(**LOOP)
def stage(a: Any, lane: int, victim: int, real: bool, score: float, position: Any, scores: Any, limit: int) -> None:
    """Copies a row's victim to the staging buffers for the merge in the next step; ``limit`` is the last position
    before the recent window, ``real`` is False if the victim's slot was empty."""
    lanes, first, width = a.items * a.rows, integers(a.base, a.items * a.rows)[lane], a.width
    # 1. copy its key, unit vector, value and score
    norm = floats(a.inverse_norm + 4 * lane * a.stride, a.stride)[victim]
    leaving = floats(a.keys + 4 * (first + victim) * width, width)
    unit = floats(a.queries + 4 * ((lane + 1) * (a.group + 1) - 1) * width, width)
    held = floats(a.staged_key + 4 * lane * width, width)
    for i in range(width):
        held[i] = leaving[i]
        unit[i] = leaving[i] * norm
    source = a.values + 4 * (first + victim) * a.value_width
    copy(source, a.staged_value + 4 * lane * a.value_width, a.value_width)
    floats(a.staged_score, lanes)[lane] = score
    # 2. mark the slots that may be merge targets
    may = _targets(a, lane)
    if a.important:
        for slot in range(a.stride):
            inside = 0 <= position[slot] <= limit and not math.isinf(scores[slot])
            may[slot] = TARGET if inside else -np.inf
    may[victim] = -np.inf
    # 3. set the similarity required for the merge
    flags(a.pending, lanes)[lane] = real
    least = floats(a.threshold, lanes)[lane] - ONE if a.beta < 1 else np.float32(-np.inf)
    floats(a.required, lanes)[lane] = least if real else np.float32(np.inf)


@njit(inline="always")
def _targets(a: Any, lane: int) -> Any:
    return floats(a.target_bias + 4 * lane * a.stride, a.stride)
