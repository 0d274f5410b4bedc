"""The compiled loop for the diversity of entries: how far each key is from the nearest of those before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu import HEADER, Arguments, Floats, Size
from d2obench.cpu.language import LOOP, arguments, blend, fail, floats, highest, loop, next_item, record_of
from d2obench.cpu.nearest import BLOCK, COLUMNS, SIDE

_tile, _single = blend(SIDE), blend(1)


class DistanceArguments(Arguments):
    """``keys`` ``[R, count, width]``, and the same transposed, ``turned`` ``[R, width, slots]``; ``half`` ``[R,
    slots]``, −½ times their squared norms; output array ``found`` ``[R, count]``. ``slots`` is ``count`` rounded up to
    a multiple of COLUMNS."""

    _fields_ = (
        *HEADER, ("keys", Floats), ("turned", Floats), ("half", Floats), ("found", Floats), ("count", Size),
        ("slots", Size), ("width", Size),
    )  # fmt: skip


RECORD = record_of(DistanceArguments)


@njit(**LOOP)
def _distance(given: Any) -> None:
    a = arguments(given, RECORD)
    count, slots, width = a.count, a.slots, a.width
    blocks = (count + BLOCK - 1) // BLOCK
    products = np.empty(BLOCK * slots, np.float32)
    scratch = products.ctypes.data
    while True:
        item = next_item(given)
        if item < 0:
            return
        # 1. the last block of a row has the most keys before it, so it comes first
        row, first = item // blocks, (blocks - 1 - item % blocks) * BLOCK
        some = min(BLOCK, count - first)
        queries, half = a.keys + 4 * (row * count + first) * width, floats(a.half + 4 * row * slots, slots)
        # 2. k_j·k_i − ½‖k_i‖² for all keys i up to the block's last one, column by column
        for e in range(some):
            products[e * slots : (e + 1) * slots] = half
        for column in range(0, first + some, COLUMNS):
            keys, e = a.turned + 4 * (row * width * slots + column), 0
            while e < some:
                query, to = queries + 4 * e * width, scratch + 4 * (e * slots + column)
                if e + SIDE <= some:
                    _tile(keys, query, to, keys, width, slots, width, slots)
                    e += SIDE
                else:
                    _single(keys, query, to, keys, width, slots, width, slots)
                    e += 1
        # 3. the nearest of those before each key: ‖k_j − k_i‖² = ‖k_j‖² − 2·(k_j·k_i − ½‖k_i‖²)
        found = floats(a.found + 4 * row * count, count)
        for e in range(some):
            j = first + e
            nearest = highest(products[e * slots : (e + 1) * slots], j)
            found[j] = math.sqrt(max(np.float32(-2) * (half[j] + nearest), np.float32(0)))


@loop(lambda a: a.items * BLOCK * a.slots * a.width)
def distance(given: Any) -> None:
    """The distance of every key to the nearest of those before it in its row; infinite for the first. A work item is a
    block of keys of one row."""
    try:
        _distance(given)
    except Exception:
        fail(given)
