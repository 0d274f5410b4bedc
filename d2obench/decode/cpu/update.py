"""The loop of ``d2obench.decode.cpu.backend`` between two decode steps, for all layers and rows (numba).

What ``PendingMerge.settle``, H2O's scores, ``DecodeState.least``, ``PendingMerge.take`` and the booking of the freed
slot do one after the other over all layers is done row by row here: a row's scores, positions and norms are read once.
Order and arithmetic are theirs. Importing this compiles it, or reads numba's cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu.language import FAST, first_extreme, flags, floats, integers, loop, shorts, take, words_at

TINY, PROTECTED, HOST = np.float32(1e-6), np.float32(3e38), np.float32(-1)
"""As in ``PendingMerge`` and ``DecodeState``."""


@njit(fastmath=FAST)
def _inverse_norm(row: Any) -> Any:
    total = row[0] * row[0]
    for i in range(1, row.shape[0]):
        total += row[i] * row[i]
    return 1 / max(np.float32(math.sqrt(total)), TINY)


@njit(fastmath=FAST)
def _settle(
    u: float, share: float, waits: bool, taus: Any, lane: int, beta: float, hosting: Any, evicted: Any, merges: bool,
) -> None:  # fmt: skip
    """The threshold's EMA, and the merge of the evicted key into its host."""
    if waits:
        old = taus[lane]
        taus[lane] = u if math.isinf(old) else old + np.float32(beta) * (u - old)
    if share > 0 and merges:
        for i in range(len(hosting)):
            hosting[i] += share * (evicted[i] - hosting[i])


@njit(fastmath=FAST)
def _least(score: Any, seen: Any, position: Any, limit: int, group: float, shown: Any, count: int) -> int:
    """Adds a row of attention to the scores; the slot of the lowest outside the recent window."""
    for c in range(count):
        score[c] += seen[c] / group
        own = score[c]
        shown[c] = PROTECTED if position[c] > limit else own
    return first_extreme(shown, count, False)


@loop(lambda words: 0)
def turn(given: Any) -> None:
    """A piece is a layer.

    Words: rows, slots of a line, capacities, base, free, target, now, position, evicted, bias (0 for none), score,
    attention, recent, query heads of a group; then, 0 where nothing is carried: keys, values (all rows of the store),
    channels of both, queries, evicted key and value, similarity, weight, host, pending, τ, merged, scores of evictees,
    inverse norms, bias of hosts, bar, bits of β, whether keys merge, whether scores are inherited.
    """
    words = words_at(given)
    rows, stride, capacities, base, free, target, now, position, evicted, bias, score, attention, recent, group = words[
        2:16
    ]
    keys, values, width, value_width, queries, key, value, similarity, weight, host = words[16:26]
    pending, tau, merged, gains, inverse, hosts, bar = words[26:33]
    beta, merges, inherits = words[33:34].view(np.float64)[0], words[34], words[35]
    layers = words[1]
    lanes = layers * rows
    shown = np.empty(stride, np.float32)
    frees, targets, bases = integers(free, lanes), integers(target, lanes), integers(base, lanes)
    nows, windows, counts = shorts(now, rows), shorts(recent, lanes), integers(capacities, layers)
    gone, absorbed = integers(evicted, layers), integers(merged, layers if keys else 0)
    held = lanes if keys else 0
    best, shares, places = floats(similarity, held), floats(weight, held), integers(host, held)
    waits, taus, gained, bars = flags(pending, held), floats(tau, held), floats(gains, held), floats(bar, held)
    while True:
        layer = take(given)
        if layer < 0:
            return
        count = counts[layer]
        for row in range(rows):
            lane = layer * rows + row
            line = 4 * lane * stride
            slot, first = frees[lane], bases[lane]
            scores, places_of = floats(score + line, stride), shorts(position + line, stride)
            if keys:
                norms, may = floats(inverse + line, stride), floats(hosts + line, stride)
                j, share = places[lane], shares[lane]
                hosting = floats(keys + 4 * (first + j) * width, width)
                lost = floats(key + 4 * lane * width, width)
                _settle(
                    best[lane] + np.float32(1), share, waits[lane] != 0, taus, lane, beta, hosting, lost, merges != 0
                )
                if share > 0:
                    absorbed[layer] += 1
                    if merges:
                        norms[j] = _inverse_norm(hosting)
                    if inherits:
                        scores[j] += gained[lane]
                norms[slot] = _inverse_norm(floats(keys + 4 * (first + slot) * width, width))
                may[slot] = HOST
            limit = max(nows[row] - windows[lane], -1)
            seen = floats(attention + line, stride)
            victim = _least(scores, seen, places_of, limit, np.float32(group), shown, count)
            left = places_of[victim] >= 0
            if keys:
                leaving = floats(keys + 4 * (first + victim) * width, width)
                unit = floats(queries + 4 * ((lane + 1) * (group + 1) - 1) * width, width)
                lost = floats(key + 4 * lane * width, width)
                for i in range(width):
                    lost[i] = leaving[i]
                    unit[i] = leaving[i] * norms[victim]
                floats(value + 4 * lane * value_width, value_width)[:] = floats(
                    values + 4 * (first + victim) * value_width, value_width
                )
                gained[lane], waits[lane], may[victim] = scores[victim], left, -np.inf
                if not left:
                    bars[lane] = np.inf
                else:
                    bars[lane] = -np.inf if beta >= 1 else taus[lane] - np.float32(1)
            gone[layer] += left
            places_of[victim] = nows[row] + 1
            frees[lane], targets[lane] = victim, first + victim
            scores[victim] = 0
            if bias:
                floats(bias + line, stride)[victim] = 0
