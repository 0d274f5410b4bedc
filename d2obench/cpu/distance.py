"""The compiled loop for the diversity of entries: how far each key is from the nearest of those before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu import HEADER, Arguments, Floats, Size
from d2obench.cpu.language import LOOP, WIDE, arguments, blend, fail, floats, highest, loop, next_item, record_of
from d2obench.cpu.nearest import COLUMNS, SIDE

BLOCK = 8 * SIDE
"""Keys per work item."""
CHUNK = 64
"""Keys that those of a block are compared with before it is asked which of them must go on; a multiple of COLUMNS."""
_tile = blend(SIDE, WIDE)


class DistanceArguments(Arguments):
    """``keys`` ``[R, count, width]``, and the same transposed, ``turned`` ``[R, width, slots]``; ``half`` ``[R,
    slots]``, −½ times their squared norms; ``weight`` ``[R, count]``; ``cut`` and ``most`` ``[R]``; and ``found`` ``[R,
    count]``, which is updated for the keys from ``first`` up to ``last``. ``slots`` is ``count`` rounded up to a
    multiple of CHUNK."""

    _fields_ = (
        *HEADER, ("keys", Floats), ("turned", Floats), ("half", Floats), ("weight", Floats), ("cut", Floats),
        ("most", Floats), ("found", Floats), ("count", Size), ("slots", Size), ("width", Size), ("first", Size),
        ("last", Size),
    )  # fmt: skip


RECORD = record_of(DistanceArguments)


@njit(**LOOP)
def _distance(given: Any) -> None:
    a = arguments(given, RECORD)
    count, slots, width = a.count, a.slots, a.width
    blocks = (a.last - a.first + BLOCK - 1) // BLOCK
    products, queries = np.empty(BLOCK * CHUNK, np.float32), np.zeros((BLOCK, width), np.float32)
    place, best = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.float32)
    to, held = products.ctypes.data, queries.ctypes.data
    while True:
        item = next_item(given)
        if item < 0:
            return
        # 1. the last block of a row has the most keys before it, so it comes first
        row, first = item // blocks, a.first + (blocks - 1 - item % blocks) * BLOCK
        last = min(a.last, first + BLOCK)
        keys, half = floats(a.keys + 4 * row * count * width, count * width), floats(a.half + 4 * row * slots, slots)
        weight, found = floats(a.weight + 4 * row * count, count), floats(a.found + 4 * row * count, count)
        cut, most = floats(a.cut + 4 * row, 1)[0], floats(a.most + 4 * row, 1)[0]
        # 2. the keys of the block whose distance is not known and may matter
        some = 0
        for j in range(first, last):
            if found[j] < 0 and not (weight[j] * -found[j] < cut and -found[j] <= most):
                place[some], best[some] = j, -np.inf
                queries[some] = keys[j * width : (j + 1) * width]
                some += 1
        # 3. k_j·k_i − ½‖k_i‖² for the next keys i
        column = 0
        while some > 0:
            for e in range(-(-some // SIDE) * SIDE):
                products[e * CHUNK : (e + 1) * CHUNK] = half[column : column + CHUNK]
            for c in range(0, CHUNK, COLUMNS):
                at = a.turned + 4 * (row * width * slots + column + c)
                for e in range(0, some, SIDE):
                    _tile(at, held + 4 * e * width, to + 4 * (e * CHUNK + c), at, width, slots, width, CHUNK)
            column += CHUNK
            # 4. ‖k_j − k_i‖² = ‖k_j‖² − 2·(k_j·k_i − ½‖k_i‖²) of the nearest so far; a key is done with if it was
            #    compared with all before it, or if it no longer matters
            for e in range(some - 1, -1, -1):
                j = place[e]
                best[e] = max(best[e], highest(products[e * CHUNK : (e + 1) * CHUNK], min(CHUNK, j - column + CHUNK)))
                nearest = np.float32(math.sqrt(max(np.float32(-2) * (half[j] + best[e]), np.float32(0))))
                whole = j <= column
                if whole or (weight[j] * nearest < cut and nearest <= most):
                    found[j] = nearest if whole else -nearest
                    some -= 1
                    if e < some:
                        place[e], best[e], queries[e] = place[some], best[some], queries[some]


@loop(lambda a: a.items * BLOCK * a.slots * a.width)
def distance(given: Any) -> None:
    """The distance of keys to the nearest of those before them in their row, as far as it matters.

    ``found`` is the distance of a key, or where it is not known, −1 times a bound that it does not exceed (−inf if
    nothing is known). Of the keys from ``first`` on that are not known, those are left with such a bound whose weight
    times bound is less than ``cut`` and whose bound is at most ``most``; the others get their distance. Key 0 has none.
    A work item is a block of keys of one row.
    """
    try:
        _distance(given)
    except Exception:
        fail(given)
