"""The compiled loops of ``d2obench.engine.native``; importing this imports numba.

Arrays are the storage of the tensors of the same name in ``Carry`` and ``DecodeState``; everything is done in place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import boolean, float32, float64, int32, int64

from d2obench.team.language import compiled, first_extreme

I4, I8, F4, F8 = int32, int64, float32, float64
TINY, PROTECTED, HOST = np.float32(1e-6), np.float32(3e38), np.float32(-1)
"""As in ``Carry`` and ``DecodeState``."""


@compiled(F4[::1])
def inverse_norm(row: Any) -> np.float32:
    total = row[0] * row[0]
    for i in range(1, row.shape[0]):
        total += row[i] * row[i]
    return 1 / max(np.float32(math.sqrt(total)), TINY)


@compiled(
    F4[:, ::1], F4[:, ::1], I8[:, ::1], boolean[:, ::1], F4[:, ::1], I8[::1], I8[:, ::1], I8[:, ::1], F4[:, :, ::1],
    F4[:, ::1], F4[:, :, ::1], F4[:, :, ::1], F4[:, ::1], F4[:, :, ::1], F8, boolean, boolean,
)  # fmt: skip
def settle(
    best: Any, weight: Any, host: Any, pending: Any, tau: Any, merged: Any, base: Any, slot: Any, key: Any, keys: Any,
    inverse: Any, hosts: Any, gained: Any, score: Any, beta: float, merges_keys: bool, inherits: bool,
) -> None:  # fmt: skip
    """Thresholds, counts and merged keys of all layers; the norm of the key that took the freed slot."""
    layers, rows = best.shape
    for layer in range(layers):
        for r in range(rows):
            if pending[layer, r]:
                u = best[layer, r] + 1
                old = tau[layer, r]
                tau[layer, r] = u if math.isinf(old) else old + beta * (u - old)
            w = weight[layer, r]
            if w > 0:
                merged[layer] += 1
                j = host[layer, r]
                if merges_keys:
                    at = base[layer, r] + j
                    for i in range(key.shape[2]):
                        keys[at, i] += w * (key[layer, r, i] - keys[at, i])
                    inverse[layer, r, j] = inverse_norm(keys[at])
                if inherits:
                    score[layer, r, j] += gained[layer, r]
            new = slot[layer, r]
            inverse[layer, r, new] = inverse_norm(keys[base[layer, r] + new])
            hosts[layer, r, new] = HOST


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


@compiled(
    I8[:, ::1], I8[:, ::1], F4[:, ::1], F4[:, ::1], I4[:, :, ::1], F4[:, :, ::1], F4[:, ::1], F4[:, :, ::1],
    F4[:, :, ::1], F4[:, :, ::1], F4[:, :, :, ::1], F4[:, ::1], boolean[:, ::1], F4[:, :, ::1], F4[:, ::1], boolean,
)  # fmt: skip
def take(
    victim: Any, base: Any, keys: Any, values: Any, position: Any, score: Any, tau: Any, inverse: Any, key: Any,
    value: Any, queries: Any, gained: Any, pending: Any, hosts: Any, bar: Any, always: bool,
) -> None:  # fmt: skip
    """Holds the evicted entries of all layers aside."""
    layers, rows = victim.shape
    lane = queries.shape[2] - 1
    for layer in range(layers):
        for r in range(rows):
            j = victim[layer, r]
            at = base[layer, r] + j
            for i in range(key.shape[2]):
                key[layer, r, i] = keys[at, i]
                queries[layer, r, lane, i] = keys[at, i] * inverse[layer, r, j]
            for i in range(value.shape[2]):
                value[layer, r, i] = values[at, i]
            gained[layer, r] = score[layer, r, j]
            pending[layer, r] = position[layer, r, j] >= 0
            hosts[layer, r, j] = -math.inf
            if not pending[layer, r]:
                bar[layer, r] = math.inf
            else:
                bar[layer, r] = -math.inf if always else tau[layer, r] - 1


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
