"""Every baseline in float64, one token at a time, written for reading.

From the papers and their authors' code (as summed up in each policy's docstring); shares no code with the engine. A
``Head`` is one KV head with the query heads of its group and remembers every attention value that each of its tokens
has ever received. ``Layer`` runs its heads in step.
"""

from __future__ import annotations

import numpy as np

from reference.d2o import Array, causal_map, softmax


def draw(seed: int, layer: int, head: int, position: int) -> float:
    """The number in [0, 1) that a token draws: 24 bits of a hash of whole numbers."""

    def mix(x: int) -> int:
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    number = mix(seed + 0x9E3779B9)
    for part in (layer, head, position):
        number = mix(number ^ ((part + 1) * 0x9E3779B1 % 2**32))
    return (number >> 8) / 2**24


class Head:
    """The tokens of a KV head by position, and one rule.

    Args:
        budget: tokens kept.
        layer: index of the layer.
        head: index of the head.
    """

    def __init__(self, budget: int, layer: int, head: int) -> None:
        self.budget, self.layer, self.head = budget, layer, head
        self.keys: dict[int, Array] = {}
        self.values: dict[int, Array] = {}
        self.seen: dict[int, list[float]] = {}
        self.peers: list[Head] = [self]
        self.length = 0

    @property
    def held(self) -> list[int]:
        return sorted(self.keys)

    def read(self, queries: Array, keys: Array, values: Array, scale: float) -> None:
        self.length = len(keys)
        attention = np.mean([causal_map(q, keys, scale) for q in queries], 0)
        for j in range(len(keys)):
            self.keys[j], self.values[j] = keys[j].copy(), values[j].copy()
            self.seen[j] = list(attention[j:, j])

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        self.keys[position], self.values[position], self.seen[position] = key.copy(), value.copy(), []
        weights = softmax(np.stack([queries @ self.keys[j] * scale for j in self.held], -1))
        for j, received in zip(self.held, weights.mean(0), strict=True):
            self.seen[j].append(float(received))
        return weights @ np.stack([self.values[j] for j in self.held])

    def drop(self, position: int) -> None:
        del self.keys[position], self.values[position], self.seen[position]

    def chosen(self, length: int) -> set[int]:
        """Positions kept of a prompt of ``length``."""
        raise NotImplementedError

    def victim(self) -> int:
        """The position that leaves when one token is too many."""
        raise NotImplementedError

    def leaving(self, position: int) -> None:
        """What happens to a token just before it leaves while decoding."""


def best(score: dict[int, float], count: int) -> set[int]:
    """The ``count`` positions of the highest score; ties to the earlier one."""
    return set(sorted(score, key=lambda j: (-score[j], j))[:count])


def worst(score: dict[int, float]) -> int:
    return min(score, key=lambda j: (score[j], j))


class Streaming(Head):
    sinks = 4

    def chosen(self, length: int) -> set[int]:
        first = min(self.sinks, self.budget)
        return {j for j in range(length) if j < first or j >= length - (self.budget - first)}

    def victim(self) -> int:
        return min(j for j in self.held if j >= min(self.sinks, self.budget))


class StreamingInTheCache(Streaming):
    """A token's position is its place among those held; head_dim 16, rotary base 10,000."""

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        self.keys[position], self.values[position], self.seen[position] = key.copy(), value.copy(), []
        logits = []
        for place, j in enumerate(self.held):
            moved = (place - j) - (len(self.held) - 1 - position)  # nearer to the query by so much
            logits.append(queries @ self.turned(self.keys[j], moved) * scale)
        return softmax(np.stack(logits, -1)) @ np.stack([self.values[j] for j in self.held])

    def turned(self, key: Array, by: int) -> Array:
        out = key.copy()
        for i in range(8):
            angle = by * 10_000 ** (-i / 8)
            out[i] = key[i] * np.cos(angle) - key[i + 8] * np.sin(angle)
            out[i + 8] = key[i + 8] * np.cos(angle) + key[i] * np.sin(angle)
        return out


class Local(Streaming):
    sinks = 0


class H2O(Head):
    @property
    def recent(self) -> int:
        return max(1, round(self.budget * 0.5))

    def chosen(self, length: int) -> set[int]:
        old = {j: sum(self.seen[j]) for j in range(length - self.recent)}
        return best(old, self.budget - self.recent) | set(range(length - self.recent, length))

    def victim(self) -> int:
        newest = max(self.held)
        return worst({j: sum(self.seen[j]) for j in self.held if j <= newest - self.recent})


class RoCo(Head):
    def safe(self) -> set[int]:
        newest = min(10, max(1, self.budget // 2))
        count = max(int(self.budget * 0.3) + 1, newest)
        last = set(self.held[-newest:])
        return best({j: np.inf if j in last else float(np.std(self.seen[j])) for j in self.held}, count)

    def chosen(self, length: int) -> set[int]:
        safe = self.safe()
        others = {j: float(np.mean(self.seen[j])) for j in self.held if j not in safe}
        return safe | best(others, self.budget - len(safe))

    def victim(self) -> int:
        safe = self.safe()
        return worst({j: float(np.mean(self.seen[j])) for j in self.held if j not in safe})


class TOVA(Head):
    def last(self) -> dict[int, float]:
        return {j: float(np.mean([peer.seen[j][-1] for peer in self.peers])) for j in self.held}

    def chosen(self, length: int) -> set[int]:
        return best(self.last(), self.budget)

    def victim(self) -> int:
        return worst(self.last())


class Random(Head):
    seed = 0

    def drawn(self) -> dict[int, float]:
        return {j: draw(self.seed, self.layer, self.head, j) for j in self.held}

    def chosen(self, length: int) -> set[int]:
        return best(self.drawn(), self.budget)

    def victim(self) -> int:
        return worst(self.drawn())


class SnapKV(Head):
    window, kernel, maximum = 6, 5, False

    def chosen(self, length: int) -> set[int]:
        recent = min(self.window, self.budget)
        old = range(length - self.window)
        sums = {j: sum(self.seen[j][-self.window :]) for j in old}
        half = self.kernel // 2
        pooled = {}
        for j in old:
            near = [sums.get(i, 0.0) for i in range(j - half, j + half + 1)]
            pooled[j] = max(near) if self.maximum else sum(near) / self.kernel
        return best(pooled, self.budget - recent) | set(range(length - recent, length))

    def victim(self) -> int:
        return min(j for j in self.held if j >= self.length - min(self.window, self.budget))


class CaM(Head):
    start, merged, merge, seed = 0.5, 32, True, 0

    def chosen(self, length: int) -> set[int]:
        first = int(self.budget * self.start)
        return {j for j in range(length) if j < first or j >= length - (self.budget - first)}

    def victim(self) -> int:
        return min(j for j in self.held if j >= int(self.budget * self.start))

    def leaving(self, position: int) -> None:
        younger = [j for j in self.held if j > position]
        chance = self.seen[position][-1] / np.mean([self.seen[j][-1] for j in younger])
        if self.merge and draw(self.seed, self.layer, self.head, position) < chance:
            for j in younger[: self.merged]:
                self.values[j] = self.values[j] + self.values[position] / self.merged


class Layer:
    """All KV heads of a layer under one rule; queries are ``[Hq, …]``, keys and values ``[H, …]``."""

    def __init__(self, rule: type[Head], budget: int, layer: int, heads: int, grows: bool = False) -> None:
        self.heads = [rule(budget, layer, head) for head in range(heads)]
        self.budget, self.grows = budget, grows
        for head in self.heads:
            head.peers = self.heads

    def prompt(self, queries: Array, keys: Array, values: Array, scale: float) -> None:
        group, length = len(queries) // len(keys), keys.shape[1]
        for h, head in enumerate(self.heads):
            head.read(queries[h * group : (h + 1) * group], keys[h], values[h], scale)
        if length <= self.budget:
            return
        kept = [head.chosen(length) for head in self.heads]
        for head, chosen in zip(self.heads, kept, strict=True):
            for position in set(head.held) - chosen:
                head.drop(position)

    def step(self, queries: Array, keys: Array, values: Array, scale: float, position: int) -> Array:
        group = len(queries) // len(keys)
        out = [
            head.attend(queries[h * group : (h + 1) * group], keys[h], values[h], scale, position)
            for h, head in enumerate(self.heads)
        ]
        if not self.grows and len(self.heads[0].held) > self.budget:
            victims = [head.victim() for head in self.heads]
            for head, victim in zip(self.heads, victims, strict=True):
                head.leaving(victim)
                head.drop(victim)
        return np.concatenate(out)


def pyramid(layers: int, budget: int, length: int, window: int, beta: float) -> list[float]:
    """PyramidKV's layer budgets before rounding."""
    free = budget - window
    least, most = free / beta, 2 * free - free / beta
    if most > length - window:
        most = length - window
        least = 2 * free - most
    return [window + most - (most - least) * layer / (layers - 1) for layer in range(layers)]
