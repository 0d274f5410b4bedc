"""D2O in float64, one KV head of one layer at a time, written for reading.

Straight from the paper's equations (arXiv 2406.13035) with the choices of the ``paper`` preset; shares no code with
the engine. ``Head`` is one KV head with the query heads of its group.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def causal_map(queries: Array, keys: Array, scale: float) -> Array:
    """A = softmax(QKᵀ·scale) with the future masked; ``[L, L]``."""
    logits = queries @ keys.T * scale
    logits[np.triu_indices(len(keys), 1)] = -np.inf
    return softmax(logits)


def column_sums(queries: Array, keys: Array, scale: float) -> Array:
    """Attention every key received from all queries, mean over the group; queries ``[G, L, d]``."""
    return np.mean([causal_map(q, keys, scale).sum(0) for q in queries], 0)


def density(heads: list[Array]) -> float:
    """F: unbiased variance over positions of the column sums of the head-mean map (Eq. 5)."""
    return float(np.var(np.mean(heads, 0), ddof=1))


def shares(densities: list[float]) -> Array:
    """α_ℓ / n_L: softmax of −F after min–max over layers."""
    f = np.array(densities)
    return softmax(-(f - f.min()) / max(f.max() - f.min(), 1e-12))


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (max(np.linalg.norm(a), 1e-6) * max(np.linalg.norm(b), 1e-6)))


class Entry:
    def __init__(self, position: int, key: Array, value: Array, score: float) -> None:
        self.position, self.key, self.value, self.score = position, key.copy(), value.copy(), score


class Head:
    """A KV head: read a prompt, then step.

    Args:
        budget: entries kept, B.
        sinks: T, always kept, part of the important ones.
        recent: M, the recent window.
        beta: weight of the newest similarity in the EMA.
        merge: "kv", "values" or "none".
    """

    def __init__(self, budget: int, sinks: int, recent: int, beta: float = 0.7, merge: str = "kv") -> None:
        self.budget, self.sinks, self.recent, self.beta, self.merge = budget, sinks, recent, beta, merge
        self.entries: list[Entry] = []
        self.tau: float | None = None
        self.merged = 0

    def prompt(self, keys: Array, values: Array, scores: Array) -> None:
        length = len(keys)
        every = [Entry(i, keys[i], values[i], float(scores[i])) for i in range(length)]
        if length <= self.budget:
            self.entries = every
            return
        middle = every[self.sinks : length - self.recent]
        ranked = sorted(middle, key=lambda e: (-e.score, e.position))
        important = ranked[: self.budget - self.recent - self.sinks]
        kept = {e.position for e in every[: self.sinks] + important + every[length - self.recent :]}
        self.entries = [e for e in every if e.position in kept]
        evicted = [e for e in every if e.position not in kept]
        nearest = [self._nearest(e) for e in evicted]
        self.tau = float(np.mean([u for u, _ in nearest]))
        passed = [(e, u, j) for e, (u, j) in zip(evicted, nearest, strict=True) if u >= self.tau]
        for j, host in enumerate(self.entries):
            mine = [(e, u) for e, u, k in passed if k == j]
            self._absorb(host, mine)

    def step(self, queries: Array, key: Array, value: Array, scale: float) -> Array:
        """One decode step, queries ``[G, d]``; returns the outputs ``[G, d_v]``. What this step evicts is merged at
        once, so the next step sees it."""
        position = max(e.position for e in self.entries) + 1
        self.entries.append(Entry(position, key, value, 0.0))
        weights = softmax(np.stack([queries @ e.key * scale for e in self.entries], -1))
        out = weights @ np.stack([e.value for e in self.entries])
        for e, row in zip(self.entries, weights.mean(0), strict=True):
            e.score += row
        if len(self.entries) > self.budget:
            self._evict(position)
        return out

    def _evict(self, newest: int) -> None:
        open_to = [e for e in self.entries if self.sinks <= e.position <= newest - self.recent]
        victim = min(open_to, key=lambda e: (e.score, e.position))
        self.entries.remove(victim)
        if self.merge == "none":
            return
        u, j = self._nearest(victim)
        self.tau = u if self.tau is None else self.beta * u + (1 - self.beta) * self.tau
        if u >= self.tau:
            self._absorb(self.entries[j], [(victim, u)])

    def _nearest(self, evicted: Entry) -> tuple[float, int]:
        similarity = [cosine(evicted.key, host.key) for host in self.entries]
        return max(similarity), int(np.argmax(similarity))

    def _absorb(self, host: Entry, evicted: list[tuple[Entry, float]]) -> None:
        """Eq. 11–12: convex weights e and exp(u)."""
        if not evicted or self.merge == "none":
            return
        self.merged += len(evicted)
        total = math.e + sum(math.exp(u) for _, u in evicted)
        if self.merge == "kv":
            host.key = (math.e * host.key + sum(math.exp(u) * e.key for e, u in evicted)) / total
        host.value = (math.e * host.value + sum(math.exp(u) * e.value for e, u in evicted)) / total
