"""The authors' released D2O code in float64, step by step, one query head at a time.

Restated from a description of its steps, deviations from the paper included: column sums per query head; a min–max over
the heads of one layer; compression in the first decode step by the scores of the prompt plus that step's row; rank-wise
comparison of evicted entries over heads; merging by the mean of cosine-scaled vectors.
"""

from __future__ import annotations

import numpy as np

from reference.d2o import Array, causal_map, cosine, softmax


def shares(sums: list[list[Array]], ratio: float) -> list[float]:
    """Fraction of the prompt each layer keeps, from column sums per layer and query head."""
    v = []
    for heads in sums:
        spread = np.array([np.var(column, ddof=1) for column in heads])
        v.append(float(np.mean((spread - spread.min()) / (spread.max() - spread.min() + 1e-6))))
    return [float(part) for part in np.clip(softmax(-np.array(v)) * len(v) * ratio, 0.01, 1.0)]


def column_sums(queries: Array, keys: Array, scale: float) -> list[Array]:
    """Per query head; keys ``[H, L, d]`` are shared by a group."""
    group = len(queries) // len(keys)
    return [causal_map(q, keys[h // group], scale).sum(0) for h, q in enumerate(queries)]


class Layer:
    """One layer; ``share`` None for one that is never compressed, ``tau`` the threshold of the prompt before."""

    def __init__(self, share: float | None, tau: float | None = None) -> None:
        self.share, self.tau, self.merged = share, tau, 0

    def prompt(self, queries: Array, keys: Array, values: Array, scale: float) -> None:
        self.group = len(queries) // len(keys)
        self.keys = [list(keys[h // self.group]) for h in range(len(queries))]
        self.values = [list(values[h // self.group]) for h in range(len(queries))]
        self.at = [list(range(keys.shape[1])) for _ in queries]
        self.scores = [list(column) for column in column_sums(queries, keys, scale)]
        self.length, self.first = keys.shape[1], True

    def step(self, queries: Array, keys: Array, values: Array, scale: float, position: int) -> Array:
        out = []
        for h, query in enumerate(queries):
            self.keys[h].append(keys[h // self.group])
            self.values[h].append(values[h // self.group])
            self.at[h].append(position)
            self.scores[h].append(0.0)
            weights = softmax(np.stack(self.keys[h]) @ query * scale)
            self.scores[h] = [score + row for score, row in zip(self.scores[h], weights, strict=True)]
            out.append(weights @ np.stack(self.values[h]))
        if self.share is not None:
            if self.first:
                self.heavy = self.recent = int((self.length + 1) * self.share / 2)
            if len(self.at[0]) > self.heavy + self.recent:
                self.evict()
        self.first = False
        return np.stack(out)

    def evict(self) -> None:
        heads = range(len(self.at))
        if self.first:
            for h in heads:
                self.scores[h][:4] = [np.inf] * 4
        evicted, kept = [], []
        for h in heads:
            count = len(self.at[h])
            old = sorted(range(count - self.recent), key=lambda i: (-self.scores[h][i], i))
            chosen = sorted(old[: self.heavy]) + list(range(count - self.recent, count))
            kept.append(chosen)
            evicted.append([i for i in range(count) if i not in chosen])
        similarity, host = [], []
        for h in heads:
            cosines = [[cosine(self.keys[h][i], self.keys[h][j]) for j in kept[h]] for i in evicted[h]]
            similarity.append([max(row) for row in cosines])
            host.append([kept[h][int(np.argmax(row))] for row in cosines])
        mean = float(np.mean(similarity))
        self.tau = mean if self.tau is None else 0.5 * self.tau + 0.5 * mean
        aligned = np.mean(similarity, 0)
        for h in heads:
            for j in kept[h]:
                guests = [
                    (i, u)
                    for rank, (i, u, k) in enumerate(zip(evicted[h], similarity[h], host[h], strict=True))
                    if k == j and aligned[rank] >= self.tau
                ]
                if guests:
                    self.merged += len(guests)
                    for vectors in (self.keys[h], self.values[h]):
                        total = vectors[j] + sum(u * vectors[i] for i, u in guests)
                        vectors[j] = total / (1 + len(guests))
            for held in (self.keys, self.values, self.at, self.scores):
                held[h] = [held[h][i] for i in kept[h]]
