"""Layer budgets from attention density (D2O, arXiv 2406.13035, Eq. 5), or from what compression is measured to cost.

``F_ℓ`` is the variance over key positions of the column sums of the head-mean attention map. It is low where attention
is dense, and such a layer needs more cache. Eq. 5 gives layer ℓ the share ``exp(−F_ℓ) / Σ exp(−F_k)`` of all entries. F
spans orders of magnitude, so on raw F this softmax gives nearly everything to one layer. The paper does not state how F
is scaled; here ``F`` is min–max normalised over the layers first, after which no layer gets more than e times another.

Measured instead (the rule ``error``): each layer is compressed to an equal budget, the error of its attention block's
output is measured (``d2obench.cache.budgets``), and a layer gets a share in proportion to the square root of it, of at
least FLOOR and at most CAP times the mean. The variance F says how skewed a layer's attention is, which is another
thing than what a smaller budget costs it.

The shares are then rounded to whole entries between a floor and the prompt's length (water-filling), so that the sum
over layers is exactly what was asked for, even if some layers are clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["softmax", "raw", "threshold", "error", "uniform"]
FLOOR, CAP = 0.35, 4.0
"""Bounds of a layer's budget under the rule ``error``, as multiples of the mean budget."""


def density(column_sums: Tensor, length: Tensor) -> Tensor:
    """``F`` per sequence, ``[B]``: unbiased variance of column sums ``[B, L]`` over the real positions (padding is on
    the left)."""
    total = column_sums.shape[1]
    rows = [row[total - int(n) :].double() for row, n in zip(column_sums, length.tolist(), strict=True)]
    return torch.stack([row.var(correction=1) if row.numel() > 1 else row.new_zeros(()) for row in rows])


def shares(density: Tensor, rule: Rule, alpha: float = 2.0) -> Tensor:
    """Share of each layer, ``[layers]``, summing to 1.

    Args:
        density: F per layer; for the rule ``error``, the measured squared error per layer.
        rule: ``softmax`` of −F after min–max over layers; ``raw``, the same on F itself; ``threshold``, the paper's
            first version (layers at or below the median F get ``alpha`` times as much as the others; the paper's own
            threshold and α are not published); ``error``, in proportion to the square root of the error; ``uniform``.
        alpha: factor of the ``threshold`` rule.
    """
    if rule == "uniform" or len(density) == 1 or (rule == "error" and not bool(density.any())):
        return torch.full_like(density, 1 / len(density))
    if rule == "error":
        return density.sqrt() / density.sqrt().sum()
    if rule == "raw":
        return torch.softmax(-density, 0)
    if rule == "threshold":
        weight = torch.where(density <= density.median(), alpha, 1.0).to(density.dtype)
        return weight / weight.sum()
    span = (density.max() - density.min()).clamp_min(1e-12)
    return torch.softmax(-(density - density.min()) / span, 0)


def water_fill(share: Sequence[float], total: int, floor: int, cap: int) -> list[int]:
    """Whole numbers close to ``share·total``, within ``[floor, cap]``, that sum to exactly ``total``.

    What clipping adds or removes is taken from or given to the other layers in proportion to their shares; fractions
    are rounded by largest remainder, ties to the lower layer. A ``total`` outside ``[n·floor, n·cap]`` is moved to the
    nearer end, except that ``floor`` is lowered if ``total`` is too small for it. A share that is not a number counts
    as 0: a broken model is told by its logits.
    """
    count = len(share)
    floor = min(floor, total // count, cap)
    total = max(count * floor, min(count * cap, total))
    low, high = 0.0, 1.0
    ideal = np.fmax(np.array(share, float), 1e-300) * total
    while np.clip(high * ideal, floor, cap).sum() < total - 1e-9 and high < 1e300:
        high *= 2
    for _ in range(2000):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if np.clip(middle * ideal, floor, cap).sum() < total:
            low = middle
        else:
            high = middle
    exact = np.clip(high * ideal, floor, cap).tolist()
    budgets = [int(part + 1e-9) for part in exact]
    order = sorted(range(count), key=lambda i: (budgets[i] - exact[i], i))
    missing = total - sum(budgets)
    while missing > 0:
        for i in order:
            if missing > 0 and budgets[i] < cap:
                budgets[i] += 1
                missing -= 1
    return budgets
