"""The loop behind D2O's Eq. 8–9 at the end of a prompt: the kept key that is nearest to each evicted one."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2obench.cpu.language import LANES, blend, first_extreme, floats, integers, loop, take, words_at

SIDE = 6
"""Evicted keys of a tile: with two vectors of kept ones its twelve sums fill AVX2's registers."""
BLOCK = 3 * SIDE
"""Evicted keys of one piece: their products with a few hundred kept keys stay in a core's first cache."""
COLUMNS = 2 * LANES
"""Kept keys of a tile."""
_tile, _single = blend(SIDE), blend(1)


@loop(lambda words: 2 * words[1] * BLOCK * words[8] * words[9])
def nearest(given: Any) -> None:
    """Highest ``e·u + b`` of every evicted key, and where; the first of equals wins. A piece is a block of a row's.

    Words: evicted ``[R, E, d]``, unit vectors of the kept, channel by channel, ``[R, d, C]``, b ``[R, C]``; found
    ``[R, E]``, places (int64) ``[R, E]``; E, C (a multiple of COLUMNS), d.
    """
    words = words_at(given)
    evicted, unit, bias, found, places, count, slots, width = words[2:10]
    blocks = (count + BLOCK - 1) // BLOCK
    products = np.empty(BLOCK * slots, np.float32)
    room = products.ctypes.data
    while True:
        piece = take(given)
        if piece < 0:
            return
        row, first = piece // blocks, piece % blocks * BLOCK
        some = min(BLOCK, count - first)
        queries, start = evicted + 4 * (row * count + first) * width, floats(bias + 4 * row * slots, slots)
        for e in range(some):
            products[e * slots : (e + 1) * slots] = start
        for column in range(0, slots, COLUMNS):
            keys, e = unit + 4 * (row * width * slots + column), 0
            while e < some:
                query, to = queries + 4 * e * width, room + 4 * (e * slots + column)
                if e + SIDE <= some:
                    _tile(keys, query, to, keys, width, slots, width, slots)
                    e += SIDE
                else:
                    _single(keys, query, to, keys, width, slots, width, slots)
                    e += 1
        values, at = floats(found + 4 * row * count, count), integers(places + 8 * row * count, count)
        for e in range(some):
            line = products[e * slots : (e + 1) * slots]
            j = first_extreme(line, slots, True)
            values[first + e], at[first + e] = line[j], j
