"""Everything between two decode steps, for all layers and rows, as a compiled loop (numba).

``d2obench.decode.reference.Backend.update`` performs each operation over all layers before the next one. This loop
performs all operations row by row, so that a row's scores, positions and norms are read once. The order of operations
and the arithmetic are the same. ``lane`` is the index ``layer · rows + row`` of a row among all layers. Importing this
module compiles the loop, or loads it from numba's cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import int32, njit

from d2obench.cpu import HEADER, Arguments, Flags, Floats, Ints, Longs, Real, Size
from d2obench.cpu.language import (
    LOOP,
    arguments,
    fail,
    first_extreme,
    floats,
    integers,
    loop,
    next_item,
    record_of,
    shorts,
    smallest,
)
from d2obench.decode.cpu.merge import BY_MASS, commit, commit_mass, norm_of, stage, stage_mass
from d2obench.policies.mass import LEAST
from d2obench.policies.random import FACTOR, MASK
from d2obench.policies.rules import (
    LatestAttention,
    LowestDraw,
    LowestScore,
    LowestWeightedScore,
    MeanOfLowDeviation,
    Ring,
)
from d2obench.slots.dense import NEVER, PROTECTED

RULES = (LowestScore, LowestWeightedScore, Ring, LatestAttention, MeanOfLowDeviation, LowestDraw)
"""The rules that this loop knows. A field of a rule is a field of :class:`UpdateArguments` with the same name: a flag,
or one number per row."""
LOWEST_SCORE, LOWEST_WEIGHTED_SCORE, RING, LATEST_ATTENTION, MEAN_OF_LOW_DEVIATION, LOWEST_DRAW = range(len(RULES))
SHIELD, INFINITE, ONE, LEAST_WEIGHT = np.float32(PROTECTED), np.float32(NEVER), np.float32(1), np.float32(LEAST)


class UpdateArguments(Arguments):
    """Arguments of the loop for all layers; a work item is one layer.

    The fields are named after those of ``DecodeState``, of its rule and of ``PendingMerge``. Per-slot fields have
    ``stride`` numbers per row; ``ends`` is the number of slots of each row; ``free`` is the slot that
    the current step filled. ``parts`` is CaM's ``SpreadSpec.parts``, 0 without it. The fields from ``merging`` on
    describe a pending merge; ``keys`` and ``values`` are the store's flat tensors.
    """

    _fields_ = (
        *HEADER, ("rule", Size), ("rows", Size), ("heads", Size), ("group", Size), ("stride", Size),
        ("ends", Longs), ("base", Longs), ("free", Longs), ("target", Longs), ("now", Ints), ("position", Ints),
        ("evicted", Longs), ("merged", Longs), ("usable", Longs), ("stream", Longs), ("bias", Floats),
        ("score", Floats), ("square", Floats), ("factor", Floats), ("fresh", Floats), ("attention", Floats),
        ("recent", Longs), ("sinks", Longs), ("normalised", Size), ("value_norms", Size), ("first", Longs),
        ("safe", Longs), ("newest", Longs), ("parts", Size), ("keys", Floats), ("values", Floats), ("width", Size),
        ("value_width", Size), ("merging", Size), ("merge_keys", Size), ("inherit", Size), ("important", Size),
        ("per_layer", Size), ("beta", Real), ("queries", Floats), ("staged_key", Floats), ("staged_value", Floats),
        ("staged_score", Floats), ("pending", Flags), ("similarity", Floats), ("weight", Floats),
        ("merge_target", Longs), ("threshold", Floats), ("required", Floats), ("inverse_norm", Floats),
        ("target_bias", Floats),
    )  # fmt: skip


RECORD = record_of(UpdateArguments)


@njit(**LOOP)
def _lowest_score(a: Any, seen: Any, scores: Any, position: Any, now: int, limit: int, shown: Any, count: int) -> int:
    """Adds a row of attention to the scores; returns the slot of the lowest score outside the recent window."""
    group = np.float32(a.group)
    if a.normalised:
        for c in range(count):
            scores[c] += seen[c] / group
            own = scores[c] / np.float32(now - position[c] + 1)
            shown[c] = SHIELD if position[c] > limit else own
    else:
        for c in range(count):
            scores[c] += seen[c] / group
            own = scores[c]
            shown[c] = SHIELD if position[c] > limit else own
    return first_extreme(shown, count, False)


@njit(**LOOP)
def _lowest_weighted_score(
    a: Any,
    seen: Any,
    scores: Any,
    factors: Any,
    position: Any,
    now: int,
    sinks: int,
    limit: int,
    shown: Any,
    count: int,
) -> int:
    """Adds a row of attention to the scores; returns the slot of the lowest score times weight outside sinks and the
    recent window."""
    group = np.float32(a.group)
    for c in range(count):
        scores[c] += seen[c] / group
        own = scores[c] * factors[c]
        if a.normalised:
            own /= np.float32(now - position[c] + 1)
        own = INFINITE if 0 <= position[c] < sinks else own
        shown[c] = SHIELD if position[c] > limit else own
    return first_extreme(shown, count, False)


@njit(**LOOP)
def _accumulate(a: Any, seen: Any, scores: Any, count: int) -> None:
    """Adds a row of attention to the scores, for a merge by mass under a rule that does not need them."""
    group = np.float32(a.group)
    for c in range(count):
        scores[c] += seen[c] / group


@njit(**LOOP)
def _latest(a: Any, layer: int, row: int, shown: Any, count: int) -> int:
    """The slot that the newest query attends to least, by the mean over the KV heads of a sequence."""
    group, heads = np.float32(a.group), np.float32(a.heads)
    shown[:count] = 0
    for head in range(a.heads):
        seen = floats(a.attention + 4 * (layer * a.rows + row + head) * a.stride, a.stride)
        for c in range(count):
            shown[c] += seen[c] / group
    scores = floats(a.score + 4 * (layer * a.rows + row) * a.stride, a.stride)
    for c in range(count):
        shown[c] = scores[c] if abs(scores[c]) == INFINITE else shown[c] / heads
    return first_extreme(shown, count, False)


@njit(**LOOP)
def _lowest_mean(
    a: Any, seen: Any, scores: Any, squares: Any, position: Any, now: int, newest: int, candidates: int, shown: Any,
    deviation: Any, scratch: Any, count: int,
) -> int:  # fmt: skip
    """The slot of the lowest mean attention among the ``candidates`` of lowest deviation."""
    group = np.float32(a.group)
    # 1. sums, means and variances
    for c in range(count):
        own = seen[c] / group
        scores[c] += own
        squares[c] += own * own
        times = np.float32(max(now - position[c] + 1, 1))
        mean = scores[c] / times
        spread = max(squares[c] / times - mean * mean, np.float32(0))
        spread = INFINITE if position[c] > now - newest else spread
        spread = -ONE if scores[c] == -INFINITE else spread
        deviation[c] = INFINITE if scores[c] == INFINITE else spread
        shown[c] = mean
    # 2. entries of higher deviation than the candidates are safe; among equals, the later ones
    if candidates < count:
        bound = smallest(deviation, scratch, count, max(candidates - 1, 0))
        left = candidates
        for c in range(count):
            left -= deviation[c] < bound
        for c in range(count):
            if deviation[c] < bound:
                continue
            if deviation[c] == bound and left > 0:
                left -= 1
            else:
                shown[c] = INFINITE
    # 3. any slot may be the victim, except closed ones
    victim = first_extreme(shown, count, False)
    squares[victim] = 0
    return victim


@njit(inline="always")
def _mixed(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


@njit(**LOOP)
def _drawn(stream: int, position: int) -> Any:
    """As ``d2obench.policies.random.drawn``."""
    return np.float32(_mixed(stream ^ (((position + 1) * FACTOR) & MASK)) >> 8) / np.float32(2**24)


@njit(**LOOP)
def _spread(a: Any, lane: int, victim: int, first: int, usable: int, position: Any, count: int) -> bool:
    """CaM's merge: with a certain probability, divides the evicted value among the next slots; returns whether it
    did."""
    born = position[victim]
    if born < 0:
        return False
    # 1. draw: the probability is the evicted token's attention ÷ the mean attention of the younger tokens
    seen = floats(a.attention + 4 * lane * a.stride, a.stride)
    group, total, younger = np.float32(a.group), np.float32(0), 0
    for c in range(count):
        if position[c] > born:
            total += seen[c] / group
            younger += 1
    own = seen[victim] / group
    if younger == 0 or math.isnan(total) or math.isnan(own):
        return False
    mean = total / np.float32(younger)
    stream = integers(a.stream, a.items * a.rows)[lane]
    if not (_drawn(stream, born) * mean < own if mean == 0 else _drawn(stream, born) < own / mean):
        return False
    # 2. add the value's shares to the next slots of the ring
    ring, base, width = usable - first, integers(a.base, a.items * a.rows)[lane], a.value_width
    leaving, share = floats(a.values + 4 * (base + victim) * width, width), ONE / np.float32(a.parts)
    for step in range(1, min(a.parts, ring - 1) + 1):
        slot = first + (victim - first + step) % ring
        held = floats(a.values + 4 * (base + slot) * width, width)
        for i in range(width):
            held[i] += share * leaving[i]
    return True


@njit(**LOOP)
def _update(given: Any) -> None:
    a = arguments(given, RECORD)
    rows, stride, layers = a.rows, a.stride, a.items
    lanes = layers * rows
    shown, deviation, scratch = np.empty(stride, np.float32), np.empty(stride, np.float32), np.empty(stride, np.float32)
    frees, targets, bases = integers(a.free, lanes), integers(a.target, lanes), integers(a.base, lanes)
    usable, ends, nows = integers(a.usable, lanes), integers(a.ends, lanes), shorts(a.now, rows)
    none = floats(a.score, 0)
    while True:
        layer = next_item(given)
        if layer < 0:
            return
        latest = 0
        for row in range(rows):
            lane = layer * rows + row
            line, now, slot, count = 4 * lane * stride, nows[row], frees[lane], ends[lane]
            position = shorts(a.position + line, stride)
            scores = floats(a.score + line, stride) if a.score else none
            seen = floats(a.attention + line, stride) if a.attention else none
            # 1. complete the pending merge
            if a.merging == BY_MASS:
                commit_mass(a, layer, row, slot, scores)
            elif a.merging:
                commit(a, layer, row, slot, scores)
            # 2. choose the victim
            limit = now
            if a.rule == LOWEST_SCORE:
                limit = max(now - integers(a.recent, lanes)[lane], -1)
                victim = _lowest_score(a, seen, scores, position, now, limit, shown, count)
            elif a.rule == LOWEST_WEIGHTED_SCORE:
                factors, weight = floats(a.factor + line, stride), floats(a.fresh, lanes)[lane]
                if a.value_norms:
                    weight *= norm_of(a.values + 4 * (bases[lane] + slot) * a.value_width, a.value_width)
                factors[slot] = max(weight, LEAST_WEIGHT)
                limit, sinks = max(now - integers(a.recent, lanes)[lane], -1), integers(a.sinks, lanes)[lane]
                victim = _lowest_weighted_score(a, seen, scores, factors, position, now, sinks, limit, shown, count)
            elif a.rule == RING:
                victim = slot + 1
                if victim > usable[lane] - 1:
                    victim = integers(a.first, lanes)[lane]
            elif a.rule == LATEST_ATTENTION:
                if row % a.heads == 0:
                    latest = _latest(a, layer, row, shown, count)
                victim = latest
            elif a.rule == MEAN_OF_LOW_DEVIATION:
                squares = floats(a.square + line, stride)
                newest, candidates = integers(a.newest, lanes)[lane], usable[lane] - integers(a.safe, lanes)[lane]
                victim = _lowest_mean(
                    a, seen, scores, squares, position, now, newest, candidates, shown, deviation, scratch, count
                )
            else:
                scores[slot] = _drawn(integers(a.stream, lanes)[lane], now)
                victim = first_extreme(scores, count, False)
            # 3. merge or stage the victim's entry
            real = position[victim] >= 0
            if a.merging == BY_MASS:
                if a.rule == RING or a.rule == LATEST_ATTENTION:
                    _accumulate(a, seen, scores, count)
                stage_mass(a, lane, victim, now - position[victim] + 1, real, scores)
            elif a.merging:
                sinks = integers(a.sinks, lanes)[lane]
                stage(a, lane, victim, real, scores[victim], position, sinks, limit)
            elif a.parts:
                first = integers(a.first, lanes)[lane]
                if _spread(a, lane, victim, first, usable[lane], position, count):
                    integers(a.merged, layers)[layer] += 1
            # 4. reserve its slot for the next token
            integers(a.evicted, layers)[layer] += real
            position[victim] = int32(now + 1)
            frees[lane], targets[lane] = victim, bases[lane] + victim
            if a.score:
                scores[victim] = 0
            if a.bias:
                floats(a.bias + line, stride)[victim] = 0


@loop(lambda a: 0)
def update(given: Any) -> None:
    """Ends a decode step in all layers; ``given`` is the address of :class:`UpdateArguments`."""
    try:
        _update(given)
    except Exception:
        fail(given)
