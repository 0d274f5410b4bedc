"""A simulated shared machine: jitter, slow drift and one-sided spikes, for rules that judge noisy times."""

from __future__ import annotations

import numpy as np


def rounds(
    rng: np.random.Generator, n: int, change: float, *, jitter: float = 0.03, drift: float = 0.04, spikes: float = 0.08
) -> tuple[list[float], list[float]]:
    """``n`` ABBA pairs of (base, head) times; ``head`` is truly ``change`` slower.

    ``drift`` is the standard deviation of an autocorrelated level that both arms meet; a spike makes one of the two
    slower by up to 60 %.
    """
    level, slots = 0.0, []
    for _ in range(2 * n):
        level = 0.9 * level + rng.normal(0, drift * np.sqrt(1 - 0.81))
        spike = rng.uniform(0.1, 0.6) if rng.random() < spikes else 0.0
        slots.append(np.exp(level + rng.normal(0, jitter)) * (1 + spike))
    base, head = [], []
    for i in range(n):
        first, second = slots[2 * i : 2 * i + 2]
        a, b = (first, second) if i % 2 == 0 else (second, first)
        base.append(float(a))
        head.append(float(b * (1 + change)))
    return base, head
