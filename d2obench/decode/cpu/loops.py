"""The compiled loops of ``d2obench.decode.cpu.native``; importing this imports numba.

Arrays are the storage of the tensors of the same name in ``DecodeState``; everything is done in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int32, int64

from d2obench.cpu.language import compiled, first_extreme

I4, I8, F4 = int32, int64, float32
PROTECTED = np.float32(3e38)
"""As in ``DecodeState``."""


@compiled(F4[:, :, ::1], I4[:, :, ::1], I4[::1], I4[:, ::1], F4[::1], I8[:, ::1])
def least(score: Any, position: Any, now: Any, recent: Any, shown: Any, slot: Any) -> None:
    """The lowest score of every row outside its last ``recent`` tokens."""
    layers, rows, width = score.shape
    for layer in range(layers):
        for r in range(rows):
            limit = np.int32(max(now[r] - recent[layer, r], -1))
            own, at = score[layer, r], position[layer, r]
            for c in range(width):
                seen = own[c]
                shown[c] = PROTECTED if at[c] > limit else seen
            slot[layer, r] = first_extreme(shown, width, False)


@compiled(I8[:, ::1], I8[:, ::1], I8[:, ::1], I4[:, :, ::1], I4[::1], I8[::1], F4[:, :, ::1], F4[:, :, ::1])
def place(slot: Any, base: Any, target: Any, position: Any, now: Any, evicted: Any, score: Any, bias: Any) -> None:
    """Books the freed slots for the token to come; an empty ``score`` or ``bias`` is one that isn't kept."""
    layers, rows = slot.shape
    for layer in range(layers):
        for r in range(rows):
            j = slot[layer, r]
            evicted[layer] += position[layer, r, j] >= 0
            position[layer, r, j] = now[r] + 1
            target[layer, r] = base[layer, r] + j
            if score.size:
                score[layer, r, j] = 0
            if bias.size:
                bias[layer, r, j] = 0
