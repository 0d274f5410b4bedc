"""Layer budgets from attention density (D2O, arXiv 2406.13035, Eq. 5).

``F_ℓ`` is the variance over key positions of the column sums of the head-mean attention map: low where attention is
dense and the layer needs more cache. Eq. 5 gives layer ℓ the share ``exp(−F_ℓ) / Σ exp(−F_k)`` of all entries. On raw
``F`` that softmax collapses onto one layer (F spans orders of magnitude), and the paper is silent on its scale, so
``F`` is min–max normalised over the layers first; after that no layer gets more than e times another.

Shares are then water-filled between a floor and the prompt itself, so that the sum over layers is exactly what was
asked for, whatever is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["softmax", "raw", "threshold", "uniform"]


def density(column_sums: Tensor, length: Tensor) -> Tensor:
    """``F``: unbiased variance over the real positions of column sums ``[B, L]`` (padding on the left), ``[B]``."""
    total = column_sums.shape[1]
    rows = [row[total - int(n) :].double() for row, n in zip(column_sums, length.tolist(), strict=True)]
    return torch.stack([row.var(correction=1) if row.numel() > 1 else row.new_zeros(()) for row in rows])


def shares(density: Tensor, rule: Rule, alpha: float = 2.0) -> Tensor:
    """Share of each layer, ``[layers]``, summing to 1.

    Args:
        density: F per layer.
        rule: ``softmax`` of −F after min–max over layers; ``raw``, the same on F itself; ``threshold``, the paper's
            first version (layers at or below the median F get ``alpha`` times the others; its own threshold and α
            are not known); ``uniform``.
        alpha: see ``threshold``.
    """
    if rule == "uniform" or len(density) == 1:
        return torch.full_like(density, 1 / len(density))
    if rule == "raw":
        return torch.softmax(-density, 0)
    if rule == "threshold":
        weight = torch.where(density <= density.median(), alpha, 1.0).to(density.dtype)
        return weight / weight.sum()
    span = (density.max() - density.min()).clamp_min(1e-12)
    return torch.softmax(-(density - density.min()) / span, 0)


def water_fill(share: Sequence[float], total: int, floor: int, cap: int) -> list[int]:
    """Whole numbers near ``share·total`` within ``[floor, cap]`` that sum to ``total`` exactly.

    What clipping takes or adds is given to or taken from the other layers in proportion; fractions are rounded by
    largest remainder, ties to the lower layer. ``total`` outside ``[n·floor, n·cap]`` is brought to the nearer end;
    a floor that ``total`` can't pay gives way.
    """
    count = len(share)
    floor = min(floor, total // count, cap)
    total = max(count * floor, min(count * cap, total))
    low, high = 0.0, 1.0
    ideal = [max(float(s), 1e-300) * total for s in share]
    while sum(min(cap, max(floor, high * part)) for part in ideal) < total - 1e-9 and high < 1e300:
        high *= 2
    for _ in range(2000):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if sum(min(cap, max(floor, middle * part)) for part in ideal) < total:
            low = middle
        else:
            high = middle
    exact = [min(cap, max(floor, high * part)) for part in ideal]
    budgets = [int(part + 1e-9) for part in exact]
    order = sorted(range(count), key=lambda i: (budgets[i] - exact[i], i))
    missing = total - sum(budgets)
    while missing > 0:
        for i in order:
            if missing > 0 and budgets[i] < cap:
                budgets[i] += 1
                missing -= 1
    return budgets
