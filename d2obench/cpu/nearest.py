"""The compiled loop for D2O's Eq. 8–9 at the end of a prompt: the kept key that is most similar to each evicted one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from d2obench.cpu import HEADER, Arguments, Floats, Longs, Size
from d2obench.cpu.language import (
    LOOP,
    WIDE,
    arguments,
    blend,
    fail,
    first_extreme,
    floats,
    integers,
    loop,
    next_item,
    record_of,
)

SIDE = 6
"""Evicted keys per tile: with two vectors of kept keys, its twelve sums fill AVX2's registers."""
BLOCK = 3 * SIDE
"""Evicted keys per work item: their products with a few hundred kept keys fit a core's first-level cache."""
COLUMNS = 2 * WIDE
"""Kept keys per tile."""
_tile, _single = blend(SIDE, WIDE), blend(1, WIDE)


class NearestArguments(Arguments):
    """Evicted keys ``[R, E, width]``; unit vectors of the kept keys, transposed, ``[R, width, slots]``; ``bias`` ``[R,
    slots]``; output arrays ``[R, E]`` for the highest products and for their slots. ``count`` is E; ``slots`` is a
    multiple of COLUMNS."""

    _fields_ = (
        *HEADER, ("evicted", Floats), ("unit", Floats), ("bias", Floats), ("found", Floats), ("place", Longs),
        ("count", Size), ("slots", Size), ("width", Size),
    )  # fmt: skip


RECORD = record_of(NearestArguments)


@njit(**LOOP)
def _nearest(given: Any) -> None:
    a = arguments(given, RECORD)
    count, slots, width = a.count, a.slots, a.width
    blocks = (count + BLOCK - 1) // BLOCK
    products = np.empty(BLOCK * slots, np.float32)
    scratch = products.ctypes.data
    while True:
        item = next_item(given)
        if item < 0:
            return
        row, first = item // blocks, item % blocks * BLOCK
        some = min(BLOCK, count - first)
        queries, start = a.evicted + 4 * (row * count + first) * width, floats(a.bias + 4 * row * slots, slots)
        for e in range(some):
            products[e * slots : (e + 1) * slots] = start
        for column in range(0, slots, COLUMNS):
            keys, e = a.unit + 4 * (row * width * slots + column), 0
            while e < some:
                query, to = queries + 4 * e * width, scratch + 4 * (e * slots + column)
                if e + SIDE <= some:
                    _tile(keys, query, to, keys, width, slots, width, slots)
                    e += SIDE
                else:
                    _single(keys, query, to, keys, width, slots, width, slots)
                    e += 1
        values, at = floats(a.found + 4 * row * count, count), integers(a.place + 8 * row * count, count)
        for e in range(some):
            own = products[e * slots : (e + 1) * slots]
            j = first_extreme(own, slots, True)
            values[first + e], at[first + e] = own[j], j


@loop(lambda a: 2 * a.items * BLOCK * a.slots * a.width)
def nearest(given: Any) -> None:
    """The highest ``e·u + b`` of every evicted key and its slot; ties go to the lowest slot. A work item is a block of
    evicted keys of one row."""
    try:
        _nearest(given)
    except Exception:
        fail(given)
