"""Policies that choose among the prompt's entries, in float64, one entry at a time, written for reading.

From the papers, as summed up in each policy's docstring; shares no code with the package. The heads of
:mod:`reference.rules` read tokens; here they also remember the queries.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from reference.d2o import Array, cosine, softmax
from reference.rules import Head, best

QUERIES = Path(__file__).parent.parent / "golden" / "queries.safetensors"
"""Random statistics of queries of two layers, ``mean`` ``[layers, H, G, 16]`` and ``size`` ``[layers, H, G, 8]``."""
PAIRS = 8
"""Rotary pairs of the queries and keys, whose base is 10,000; the head dimension is twice as large."""


def rotated(vector: Array, position: float) -> Array:
    out = vector.copy()
    for i in range(PAIRS):
        angle = position * 10_000 ** (-i / PAIRS)
        out[i] = vector[i] * np.cos(angle) - vector[i + PAIRS] * np.sin(angle)
        out[i + PAIRS] = vector[i + PAIRS] * np.cos(angle) + vector[i] * np.sin(angle)
    return out


class PromptOnly(Head):
    """``decode=slide``: a decoded token replaces the oldest of the newest ``window`` entries of the prompt."""

    window, sinks = 32, 0

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        self.queries: dict[int, Array] = {}
        self.scale, self.block, self.ring = 1.0, 0, (-1, 0)

    def read(self, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        self.scale = scale
        for i in range(queries.shape[1]):
            self.queries[self.length + i] = queries[:, i]
        self.block = self.length
        return super().read(queries, keys, values, scale)

    def score(self, j: int) -> float:
        raise NotImplementedError

    def importance(self) -> dict[int, float]:
        return {j: self.score(j) for j in self.held}

    def candidates(self) -> dict[int, float]:
        if self.ring[0] != self.length:  # the first eviction after a block
            before = [j for j in self.held if j < self.length]
            at = max(0, len(before) - min(self.window, self.budget))
            self.ring = self.length, max(before[at], min(self.sinks, self.budget))
        return {j: float(j) for j in self.held if j >= self.ring[1]}


class KeyDiff(PromptOnly):
    def score(self, j: int) -> float:
        anchor = np.mean([key / np.linalg.norm(key) for key in self.keys.values()], 0)
        return -cosine(self.keys[j], anchor)


class Knorm(PromptOnly):
    def score(self, j: int) -> float:
        return -float(np.sqrt(np.sum(self.keys[j] ** 2)))


class LagKV(PromptOnly):
    lag, sinks = 5, 2

    def importance(self) -> dict[int, float]:
        held = self.held
        found = {j: 1e9 + j for j in held}
        behind = held[self.sinks :]
        chunks = [behind[i : i + self.lag] for i in range(0, len(behind) // self.lag * self.lag, self.lag)]
        for chunk, following in pairwise(chunks):
            score = np.zeros(self.lag)
            for rows in (self.keys, self.values):
                low = np.min([rows[j] for j in following], 0)
                high = np.max([rows[j] for j in following], 0)
                score += softmax(np.array([np.std((rows[j] - low) / (high - low), ddof=1) for j in chunk])) / 2
            for place, at in enumerate(np.argsort(score)):
                found[chunk[at]] = place / self.lag
        return found | {j: np.inf for j in held if j < self.sinks}


class Expected(PromptOnly):
    future, sinks, covariance, value_norms, epsilon = 512, 4, True, True, 0.0

    def importance(self) -> dict[int, float]:
        members = len(next(iter(self.queries.values())))
        turn = np.mean([self.matrix(self.length + i) for i in range(self.future)], 0)
        found = {j: 0.0 for j in self.held if j >= self.sinks}
        for g in range(members):
            plain = np.stack([rotated(one[g], -i) for i, one in self.queries.items() if i >= 4])
            mean = turn @ plain.mean(0)
            spread = turn @ np.cov(plain.T, bias=True) @ turn.T if self.covariance else np.zeros(turn.shape)
            logits = {j: self.scale * mean @ self.keys[j] for j in found}
            for j in found:
                logits[j] += self.scale**2 * self.keys[j] @ spread @ self.keys[j] / 2
            for j, share in zip(found, softmax(np.array([logits[j] for j in found])), strict=True):
                found[j] += share / members
        for j in found:
            found[j] = (found[j] + self.epsilon) * (np.linalg.norm(self.values[j]) if self.value_norms else 1)
        return found | {j: np.inf for j in self.held if j < self.sinks}

    def matrix(self, position: int) -> Array:
        return np.stack([rotated(one, position) for one in np.eye(2 * PAIRS)], 1)


class Watching(PromptOnly):
    """Scores from the attention of the prompt's last queries; the window itself is kept."""

    def asked(self) -> list[int]:
        """The last queries, those of the newest block only."""
        return list(range(max(self.block, self.length - self.window), self.length))

    def attention(self, query: int, held: list[int]) -> Array:
        """``[G, len(held)]`` of one query over all entries that it sees."""
        seen = [j for j in self.held if j <= query]
        logits = [self.queries[query] @ self.keys[j] * self.scale + self.bias.get(j, 0.0) for j in seen]
        weights = dict(zip(seen, softmax(np.stack(logits, -1)).T, strict=True))
        return np.stack([weights.get(j, np.zeros(len(self.queries[query]))) for j in held], 1)

    def old(self) -> list[int]:
        return [j for j in self.held if j < self.length - self.window]

    def scores(self) -> dict[int, float]:
        raise NotImplementedError

    def importance(self) -> dict[int, float]:
        found = self.scores()
        recent = self.length - min(self.window, self.budget)
        return {j: 1e9 + j if j >= recent else found.get(j, 0.0) for j in self.held}


class CAKE(Watching):
    gamma = 200.0

    def maps(self) -> Array:
        """``[queries, G, old entries]``."""
        return np.stack([self.attention(i, self.old()) for i in self.asked()])

    def scores(self) -> dict[int, float]:
        seen, held = self.maps(), self.held
        spread = seen.var(0, ddof=1) if len(seen) > 1 else np.zeros(seen.shape[1:])
        raw = dict(zip(self.old(), (seen.mean(0) + self.gamma * spread).mean(0), strict=True))
        near = {j: [raw.get(i, 0.0) for i in held[max(0, at - 2) : at + 3]] for at, j in enumerate(held)}
        return {j: sum(values) / 5 for j, values in near.items()}


def cake_preference(heads: list[CAKE], tau1: float, tau2: float) -> float:
    """A layer's preference, from the attention of all its query heads."""
    maps = [head.maps() for head in heads]
    entropy = -sum(float(np.sum(seen * np.log(seen + 1e-10))) for seen in maps)
    variance = sum(float(seen.var(0, ddof=1).sum()) for seen in maps)
    return float(entropy ** (1 / tau1) * variance ** (1 / tau2))


def cake_budgets(preferences: list[float], budget: int, length: int, window: int) -> list[float]:
    """Layer budgets before rounding, in a cascade: after each layer, the layers so far are cut to their shares of what
    all layers may hold."""
    free, most = (budget - window) * len(preferences), length - window
    held: list[float] = []
    for read in range(1, len(preferences) + 1):
        held.append(most)
        held = [min(*both) for both in zip(held, cake_shares(preferences[:read], free, most), strict=True)]
    return [window + part for part in held]


def cake_shares(preferences: list[float], free: float, most: float) -> list[float]:
    """The share of the preferences, at most the prompt, what is over spread evenly over those below."""
    parts = [free * one / sum(preferences) for one in preferences]
    while max(parts) > most + 1e-9:
        over, room = sum(part - most for part in parts if part > most), sum(part < most for part in parts)
        parts = [most if part >= most else part + over / room for part in parts]
    return parts


class Snap(Watching):
    kernel = 5

    def scores(self) -> dict[int, float]:
        held = self.held
        total = sum(self.attention(i, self.old()).mean(0) for i in self.asked())
        raw = dict(zip(self.old(), total / self.window, strict=True))
        half = self.kernel // 2
        near = {j: [raw.get(i, 0.0) for i in held[max(0, at - half) : at + half + 1]] for at, j in enumerate(held)}
        return {j: sum(values) / self.kernel for j, values in near.items()}


class Critical:
    """A second stage, before a scoring rule among the bases; without a model ``‖W_O v‖₁`` is ``‖v‖₁``."""

    first, added = 0.5, 1e-4

    def importance(self) -> dict[int, float]:
        found = super().importance()  # type: ignore[misc]
        chosen = best(found, int(self.budget * self.first))  # type: ignore[attr-defined]
        for j, rank in found.items():
            if rank < 1e9:
                weight = float(np.abs(self.values[j]).sum())  # type: ignore[attr-defined]
                found[j] = 1e8 if j in chosen else (rank + self.added) * weight
        return found


class CriticalSnap(Critical, Snap):
    pass


class CriticalExpected(Critical, Expected):
    value_norms = False


class RKV(Watching):
    """With ``interval=1``: one entry leaves in every step."""

    window, kernel, mix = 3, 7, 0.07

    def begin(self) -> None:
        self.decoded: list[Array] = []

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        if not self.reading:
            self.decoded = [*self.decoded, queries][-self.window :]
        return super().attend(queries, key, value, scale, position)

    def scored(self, queries: list[Array], old: list[int]) -> dict[int, float]:
        held = self.held
        # importance
        logits = [np.max(one @ np.stack([self.keys[j] for j in old], 1) * self.scale, 0) for one in queries]
        mean = dict(zip(old, np.mean([softmax(one) for one in logits], 0), strict=True))
        half = self.kernel // 2
        pooled = [max(mean.get(i, 0.0) for i in held[max(0, at - half) : at + half + 1]) for at in range(len(held))]
        # redundancy
        repeats = dict.fromkeys(held, 0.0)
        for i in held:
            cosines = {j: cosine(self.keys[i], self.keys[j]) for j in held if j != i}
            twins = [j for j, u in cosines.items() if u > 0.5]
            for j, u in cosines.items():
                if not twins or j != max(twins):
                    repeats[j] += u / len(held)
        repeated = softmax(np.array([repeats[j] for j in held]))
        score = {j: self.mix * pooled[at] - (1 - self.mix) * repeated[at] for at, j in enumerate(held)}
        return {j: score[j] for j in old}

    def scores(self) -> dict[int, float]:
        return self.scored([self.queries[i] for i in self.asked()], self.old())

    def candidates(self) -> dict[int, float]:
        newest = max(self.held)
        return self.scored(self.decoded, [j for j in self.held if j <= newest - self.window])


class TriAttention(PromptOnly):
    """With ``interval=1``: one entry leaves in every step."""

    omega = (10_000 ** (-torch.arange(8) / 8)).double().numpy()
    """As a model has it, in float32: far ahead, its last digit counts."""

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        every = load_file(QUERIES)
        self.mean, self.size = (every[name][layer, head].astype(float) for name in ("mean", "size"))

    def scored(self, now: int, held: list[int]) -> dict[int, float]:
        heads = []
        for mean, size in zip(self.mean, self.size, strict=True):
            q, found = mean[:PAIRS] + 1j * mean[PAIRS:], []
            for j in held:
                key = rotated(self.keys[j], -j)
                k = key[:PAIRS] + 1j * key[PAIRS:]
                amplitude, phase = abs(q) * abs(k), np.angle(q * k.conj())
                far = [now - j + 2**i for i in range(17)]
                waves = [np.sum(amplitude * np.cos(self.omega * apart + phase)) for apart in far]
                found.append(np.mean(waves) + np.sum((size - abs(q)) * abs(k)))
            heads.append((np.array(found) - np.mean(found)) / max(np.std(found), 1e-6))
        return dict(zip(held, np.max(heads, 0).tolist(), strict=True))

    def importance(self) -> dict[int, float]:
        return self.scored(self.length, self.held)

    def candidates(self) -> dict[int, float]:
        return self.scored(max(self.held) + 1, self.held)


class Quest(Head):
    """Everything is held; a decoded token's query reads some pages."""

    size, recent = 4, 1

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        if self.reading:
            return super().attend(queries, key, value, scale, position)
        self.keys[position], self.values[position] = key, value
        pages = [range(first, min(first + self.size, position + 1)) for first in range(0, position + 1, self.size)]
        bound = {}
        for at, page in enumerate(pages):
            low, high = (by([self.keys[j] for j in page], 0) for by in (np.min, np.max))
            bound[at] = float(np.mean([np.sum(np.maximum(q * low, q * high)) for q in queries]))
        count = max(1, self.budget // self.size)
        bound |= dict.fromkeys(range(len(pages) - min(self.recent, count), len(pages)), np.inf)
        self.chosen = [j for at in sorted(best(bound, count)) for j in pages[at]]
        weights = softmax(queries @ np.stack([self.keys[j] for j in self.chosen], 1) * scale)
        return weights @ np.stack([self.values[j] for j in self.chosen])


class KeepKV(Head):
    share, sinks, window, threshold = 0.5, 4, 32, 0.8

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        self.votes: dict[int, float] = {}
        self.level: dict[int, float] = {}
        self.merged = 0

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        self.votes[position], self.level[position] = 1.0, 0.0
        self.bias = {j: float(np.log(p)) for j, p in self.votes.items()}
        out = super().attend(queries, key, value, scale, position)
        for j in () if self.reading else self.held:
            share = self.seen[j][-1] / self.votes[j]
            self.level[j] += (share - self.level[j]) / min(position - j + 1, self.window)
        return out

    def read(self, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        self.block = queries.shape[1]
        return super().read(queries, keys, values, scale)

    @property
    def recent(self) -> int:
        return max(1, round(self.budget * self.share))

    def importance(self) -> dict[int, float]:
        asked, found = min(self.window, self.block), {}
        weights = np.linspace(1, 1.2, asked)
        for j in self.held:
            count = min(asked, self.length - j)
            own = np.array(self.seen[j][-count:]) / self.votes[j]
            self.level[j] = float(own.mean())
            found[j] = float(np.average(own, weights=weights[-count:]))
        found |= {j: 1e9 + j for j in found if j >= self.length - self.recent}
        return found | {j: np.inf for j in found if j < self.sinks}

    def candidates(self) -> dict[int, float]:
        newest = max(self.held)
        found = {j: self.level[j] for j in self.held if self.sinks <= j <= newest - self.recent}
        return found or {j: 0.0 for j in self.held if j >= self.sinks} or {newest: 0.0}

    def leaving(self, positions: list[int]) -> None:
        targets = [j for j in self.held if j not in positions]
        into: dict[int, list[int]] = {}
        for i in positions if targets else ():
            similar = {j: cosine(self.keys[i], self.keys[j]) for j in targets}
            target = max(similar, key=lambda j: (similar[j], -j))
            if similar[target] >= self.threshold:
                into.setdefault(target, [target]).append(i)
        for target, members in into.items():
            weights = [self.votes[j] * (self.level[j] + 1e-10) for j in members]
            votes = [self.votes[j] for j in members]
            self.keys[target] = np.average([self.keys[j] for j in members], axis=0, weights=weights)
            self.values[target] = np.average([self.values[j] for j in members], axis=0, weights=weights)
            self.level[target] = float(np.average([self.level[j] for j in members], weights=votes))
            self.votes[target] = sum(votes)
            self.merged += len(members) - 1

    def drop(self, position: int) -> None:
        super().drop(position)
        del self.votes[position], self.level[position]
