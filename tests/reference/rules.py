"""Every policy in float64, one token at a time, written for reading.

From the papers and their authors' code (as summed up in each policy's docstring); shares no code with the package. A
``Head`` is one KV head with the query heads of its group and remembers every attention value that each of its tokens
has ever received. ``Layer`` runs its heads in step.

A rule says how important each token is when a block of tokens was read (``importance``), and which tokens may leave
while decoding, the lowest number first (``candidates``).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np

from reference.d2o import Array, cosine, softmax


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
        budget: tokens kept by a head on average, on which windows and sinks depend.
        layer: index of the layer.
        head: index of the head.

    ``safeguard``: the layer's tokens are shared out over its heads by AdaKV's rule with this α (``forced``: in the form
    of kvpress); None: every head keeps as many. ``measured``: every head of every layer has a budget of its own, from
    the error that an equal one causes it.
    """

    safeguard: float | None = None
    forced, measured = False, False

    def __init__(self, budget: int, layer: int, head: int) -> None:
        self.keep = self.budget = budget
        self.layer, self.head = layer, head
        self.keys: dict[int, Array] = {}
        self.values: dict[int, Array] = {}
        self.seen: dict[int, list[float]] = {}
        self.bias: dict[int, float] = {}
        self.peers: list[Head] = [self]
        self.length, self.reading, self.clock = 0, False, -1

    @property
    def held(self) -> list[int]:
        return sorted(self.keys)

    def begin(self) -> None:
        """A new block begins."""

    def read(self, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        """A block of tokens ``[n, d]`` after what is held; queries ``[G, n, d]``; outputs ``[n, G, d_v]``."""
        self.reading = True
        steps = zip(queries.swapaxes(0, 1), keys, values, strict=True)
        out = np.stack([self.attend(*given, scale, self.length + i) for i, given in enumerate(steps)])
        self.reading = False
        return out

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        """One token; queries ``[G, d]``; outputs ``[G, d_v]``."""
        self.keys[position], self.values[position], self.seen[position] = key.copy(), value.copy(), []
        self.clock = position
        held = self.held
        logits = [queries @ self.turned(j, position) * scale + self.bias.get(j, 0.0) for j in held]
        weights = softmax(np.stack(logits, -1))
        for j, received in zip(held, weights.mean(0), strict=True):
            self.seen[j].append(float(received))
        return weights @ np.stack([self.values[j] for j in held])

    def turned(self, held: int, position: int) -> Array:
        """The key of a held token as a query at a position sees it."""
        return self.keys[held]

    def drop(self, position: int) -> None:
        del self.keys[position], self.values[position], self.seen[position]
        self.bias.pop(position, None)

    def importance(self) -> dict[int, float]:
        """How much each held token matters after a block; the highest ``budget`` are kept, the earlier of equals."""
        raise NotImplementedError

    def candidates(self) -> dict[int, float]:
        """What may leave when one token is too many; the lowest does, the earlier of equals."""
        raise NotImplementedError

    def leaving(self, positions: list[int]) -> None:
        """What happens to tokens that leave together, just before they are dropped; called of the heads in turn."""

    def lost(self, position: int) -> None:
        """What happens to a token just before it is dropped while decoding."""


def best(score: dict[int, float], count: int) -> set[int]:
    """The ``count`` positions of the highest score; ties to the earlier one."""
    return set(sorted(score, key=lambda j: (-score[j], j))[:count])


def worst(score: dict[int, float]) -> int:
    return min(score, key=lambda j: (score[j], j))


class Streaming(Head):
    sinks = 4

    @property
    def first(self) -> int:
        return min(self.sinks, self.budget)

    def importance(self) -> dict[int, float]:
        return {j: np.inf if j < self.first else float(j) for j in self.held}

    def candidates(self) -> dict[int, float]:
        return {j: float(j) for j in self.held if j >= self.first}


class StreamingInTheCache(Streaming):
    """A token's position is its place among those held; head_dim 16, rotary base 10,000."""

    def turned(self, held: int, position: int) -> Array:
        if self.reading:  # with true positions
            return self.keys[held]
        order = self.held
        by = (order.index(held) - held) - (len(order) - 1 - position)  # nearer to the query by so much
        key = self.keys[held]
        out = key.copy()
        for i in range(8):
            angle = by * 10_000 ** (-i / 8)
            out[i] = key[i] * np.cos(angle) - key[i + 8] * np.sin(angle)
            out[i + 8] = key[i + 8] * np.cos(angle) + key[i] * np.sin(angle)
        return out


class Local(Streaming):
    sinks = 0


class H2O(Head):
    share, sinks, normalised = 0.5, 0, False

    @property
    def recent(self) -> int:
        return max(1, round(self.budget * self.share))

    def score(self, j: int) -> float:
        return sum(self.seen[j]) / (len(self.seen[j]) if self.normalised else 1)

    def importance(self) -> dict[int, float]:
        window = self.length - self.recent
        found = {j: 1e9 + j if j >= window else self.score(j) for j in self.held}
        return found | {j: np.inf for j in self.held if j < self.sinks}

    def candidates(self) -> dict[int, float]:
        newest = max(self.held)
        found = {j: self.score(j) for j in self.held if self.sinks <= j <= newest - self.recent}
        # where nothing but sinks and the window is left, any of the window leaves
        return found or {j: 0.0 for j in self.held if j >= self.sinks} or {newest: 0.0}


class NormalisedH2O(H2O):
    normalised = True


@dataclass
class Leaving:
    """An evicted token: what it was, its merge target, their similarity, and whether it was merged."""

    key: Array
    value: Array
    score: float
    similar: dict[int, float]
    target: int
    merged: bool = False

    @property
    def u(self) -> float:
        return self.similar[self.target]


class Merging(Head):
    """What leaves is merged into what is most similar. ``late``: an eviction's merges wait for :meth:`settle`."""

    late, inherit = False, False
    tau: float | None = None

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        self.merged = 0
        self.found: list[Leaving] = []

    def worth(self, j: int) -> float:
        """The score that a merged token leaves behind."""
        raise NotImplementedError

    def targets(self, positions: list[int]) -> list[int]:
        """What may absorb the tokens that leave."""
        return [j for j in self.held if j not in positions]

    def leaving(self, positions: list[int]) -> None:
        """All peers have looked before the first of them merges."""
        self.look(positions)
        if self.head == len(self.peers) - 1:
            for peer in self.peers:
                peer.judge()
            if not self.late:
                for peer in self.peers:
                    peer.absorb()

    def look(self, positions: list[int]) -> None:
        """The similarity and the merge target of each token that leaves (Eq. 8–9)."""
        targets, self.found = self.targets(positions), []
        for i in positions if targets else ():
            u = {j: cosine(self.keys[i], self.keys[j]) for j in targets}
            target = max(u, key=lambda j: (u[j], -j))
            self.found.append(Leaving(self.keys[i].copy(), self.values[i].copy(), self.worth(i), u, target))

    def judge(self) -> None:
        """Which of them are merged."""
        for one in self.found:
            one.merged = True

    def settle(self, merged: bool, target: int, near: float) -> None:
        """Carries out the late merge of one token as it is told, if its own decision is as near as that."""
        for one in self.found:
            assert one.u - one.similar[target] <= near, (target, one)
            assert one.merged == merged or abs(one.u - self.tau) <= near, (merged, self.tau, one)
            one.merged, one.target = merged, target
        self.absorb()

    def absorb(self) -> None:
        """The merge."""
        raise NotImplementedError


class D2O(Merging, H2O):
    """With uniform layers; τ is None before the first eviction."""

    share, sinks = 0.25, 4
    beta, merge, important, per_layer = 0.7, "kv", False, False

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        self.gained: dict[int, float] = {}

    def score(self, j: int) -> float:
        return super().score(j) + self.gained.get(j, 0.0)

    worth = score

    def begin(self) -> None:
        """Thresholds start anew."""
        self.tau = None

    def targets(self, positions: list[int]) -> list[int]:
        found = super().targets(positions) if self.merge != "none" else []
        newest = max(self.held)
        return [j for j in found if not self.important or self.sinks <= j <= newest - self.recent]

    def judge(self) -> None:
        """The threshold (Eq. 10)."""
        u = [one.u for peer in (self.peers if self.per_layer else [self]) for one in peer.found]
        if u:
            newest = float(np.mean(u))
            self.tau = newest if self.tau is None else self.beta * newest + (1 - self.beta) * self.tau
        for one in self.found:
            one.merged = one.u >= self.tau

    def absorb(self) -> None:
        """The merge (Eq. 11–12)."""
        passed = [one for one in self.found if one.merged]
        self.merged, self.found = self.merged + len(passed), []
        for target in {one.target for one in passed}:
            mine = [(one, math.exp(one.u)) for one in passed if one.target == target]
            total = math.e + sum(w for _, w in mine)
            self.values[target] = (math.e * self.values[target] + sum(w * one.value for one, w in mine)) / total
            if self.merge == "kv":
                self.keys[target] = (math.e * self.keys[target] + sum(w * one.key for one, w in mine)) / total
            if self.inherit:
                self.gained[target] = self.gained.get(target, 0.0) + sum(one.score for one, _ in mine)


class RoCo(Head):
    def safe(self) -> set[int]:
        newest = min(10, max(1, self.budget // 2))
        count = max(int(self.budget * 0.3) + 1, newest)
        after = (max(self.held) if self.keys else 0) - newest
        return best({j: np.inf if j > after else float(np.std(self.seen[j])) for j in self.held}, count)

    def importance(self) -> dict[int, float]:
        safe = self.safe()
        return {j: np.inf if j in safe else float(np.mean(self.seen[j])) for j in self.held}

    def candidates(self) -> dict[int, float]:
        safe = self.safe()
        return {j: float(np.mean(self.seen[j])) for j in self.held if j not in safe}


class TOVA(Head):
    def importance(self) -> dict[int, float]:
        return {j: float(np.mean([peer.seen[j][-1] for peer in self.peers])) for j in self.held}

    candidates = importance


class Random(Head):
    seed = 0

    def importance(self) -> dict[int, float]:
        return {j: draw(self.seed, self.layer, self.head, j) for j in self.held}

    candidates = importance


class ByMass(Merging):
    """Merging by mass, before any other rule among the bases. A token that absorbs others is as if every attention that
    it has received had been as much larger; ``restarts``: what was received before a block is forgotten. At a block's
    end, evicted tokens hand on ``handed_on`` of their mass."""

    inherit, restarts, handed_on = True, False, 1.0

    def begin(self) -> None:
        super().begin()
        if self.restarts:
            self.seen = {j: [] for j in self.seen}

    def mean(self, j: int) -> float:
        """Mean attention, over all queries that could see the token."""
        return sum(self.seen[j]) / (self.clock - j + 1)

    worth = mean

    def absorb(self) -> None:
        for target in {one.target for one in self.found}:
            own = self.mean(target)
            factor = self.handed_on if self.clock < self.length else 1.0
            mine = [(one, factor * min(1.0, one.score / own)) for one in self.found if one.target == target]
            total = sum(r for _, r in mine)
            self.values[target] = (self.values[target] + sum(r * one.value for one, r in mine)) / (1 + total)
            self.bias[target] = self.bias.get(target, 0.0) + math.log(1 + total)
            self.seen[target] = [received * (1 + total) for received in self.seen[target]]
        self.merged, self.found = self.merged + len(self.found), []


class WeightedH2O(H2O):
    """Scores times the norm of values, times the distance of keys from those of higher score. An entry's weight is that
    of when it came to stay: at a block's end, or when it was decoded."""

    share, sinks, normalised = 0.2, 4, True
    value_norms, diversity = True, True

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        self.weight: dict[int, float] = {}
        self.far: dict[int, float] = {}
        self.fresh: float | None = None

    def norm(self, j: int) -> float:
        return float(np.linalg.norm(self.values[j])) if self.value_norms else 1.0

    def score(self, j: int) -> float:
        return super().score(j) * self.weight[j]

    def importance(self) -> dict[int, float]:
        self.weight, self.far, self.fresh = {j: self.norm(j) for j in self.held}, dict.fromkeys(self.held, 1.0), None
        if self.diversity:
            order = sorted(self.held, key=lambda j: (-self.score(j), j))
            for at, j in enumerate(order[1:], 1):
                self.far[j] = min(float(np.linalg.norm(self.keys[j] - self.keys[i])) for i in order[:at])
            if len(order) > 1:
                self.far[order[0]] = max(self.far[j] for j in order[1:])
        self.weight = {j: self.norm(j) * self.far[j] for j in self.held}
        return super().importance()

    def attend(self, queries: Array, key: Array, value: Array, scale: float, position: int) -> Array:
        if not self.reading and self.fresh is None:  # the first token after a block
            self.weight = {j: self.norm(j) * self.far[j] for j in self.held}
            self.fresh = float(np.mean([self.far[j] for j in self.held]))
        out = super().attend(queries, key, value, scale, position)
        if not self.reading:
            assert self.fresh is not None
            self.weight[position] = self.norm(position) * self.fresh
        return out


class MassD2O(ByMass, WeightedH2O):
    """``d2o(preset=mass)`` with uniform layers."""

    handed_on = 0.5


class MassHeads(MassD2O):
    """``d2o(preset=mass,heads=true)``."""

    measured = True


class MassH2O(ByMass, H2O):
    pass


class MassStreaming(ByMass, Streaming):
    pass


class MassRoCo(ByMass, RoCo):
    pass


class MassTOVA(ByMass, TOVA):
    pass


class SnapKV(Head):
    window, kernel, maximum = 6, 5, False

    def importance(self) -> dict[int, float]:
        held, half = self.held, self.kernel // 2
        recent = self.length - self.window
        sums = [sum(self.seen[j][-self.window :]) if j < recent else 0.0 for j in held]
        found = {}
        for at, j in enumerate(held):
            near = sums[max(0, at - half) : at + half + 1]
            pooled = max(near) if self.maximum else sum(near) / self.kernel
            found[j] = 1e9 + j if j >= self.length - min(self.window, self.budget) else pooled
        return found

    def candidates(self) -> dict[int, float]:
        return {j: float(j) for j in self.held if j >= self.length - min(self.window, self.budget)}


class MassSnapKV(ByMass, SnapKV):
    pass


class CaM(Head):
    start, parts, merge, seed = 0.5, 32, True, 0

    def __init__(self, budget: int, layer: int, head: int) -> None:
        super().__init__(budget, layer, head)
        self.merged = 0

    def importance(self) -> dict[int, float]:
        return {j: np.inf if j < int(self.budget * self.start) else float(j) for j in self.held}

    def candidates(self) -> dict[int, float]:
        return {j: float(j) for j in self.held if j >= int(self.budget * self.start)}

    def lost(self, position: int) -> None:
        younger = [j for j in self.held if j > position]
        chance = self.seen[position][-1] / np.mean([self.seen[j][-1] for j in younger])
        if self.merge and draw(self.seed, self.layer, self.head, position) < chance:
            self.merged += 1
            for j in younger[: self.parts]:
                self.values[j] = self.values[j] + self.values[position] / self.parts


class Layer:
    """All KV heads of a layer under one rule; queries are ``[Hq, …]``, keys and values ``[H, …]``."""

    def __init__(self, rule: type[Head], budget: int, layer: int, heads: int, grows: bool = False) -> None:
        self.heads = [rule(budget, layer, head) for head in range(heads)]
        self.grows = grows
        for head in self.heads:
            head.peers = self.heads

    def read(self, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        """A block ``[…, n, d]`` after what is held; outputs ``[n, Hq, d_v]``."""
        group, outs = len(queries) // len(keys), []
        for h, head in enumerate(self.heads):
            head.begin()
            outs.append(head.read(queries[h * group : (h + 1) * group], keys[h], values[h], scale))
            head.length += keys.shape[1]
        return np.concatenate(outs, 1)

    def prompt(self, queries: Array, keys: Array, values: Array, scale: float) -> None:
        """Reads a prompt and keeps what the rule says."""
        self.read(queries, keys, values, scale)
        self.compress()

    def compress(self, kept: list[set[int]] | None = None, near: float = 0.0) -> None:
        """Keeps what the rule says; or what is given, which may differ from that by no more than ``near`` in
        importance."""
        chosen = []
        if self.heads[0].safeguard is not None:
            for head, keep in zip(self.heads, shared(self.heads), strict=True):
                head.keep = keep
                if kept and near > 1e-3 and keep < len(head.held):  # rounding may decide otherwise about one
                    head.keep = len(kept[head.head])
                    assert abs(head.keep - keep) <= 1
        for h, head in enumerate(self.heads):
            importance = head.importance()
            own = best(importance, head.keep)
            given = own if kept is None else kept[h]
            assert len(given) == len(own), (given, own)
            for gone, instead in zip(sorted(own - given), sorted(given - own), strict=True):
                assert importance[gone] - importance[instead] <= near, (gone, instead, importance)
            chosen.append(given)
        gone = [sorted(set(head.held) - given) for head, given in zip(self.heads, chosen, strict=True)]
        for head, positions in zip(self.heads, gone, strict=True):
            if positions or any(gone):
                head.leaving(positions)
        for head, positions in zip(self.heads, gone, strict=True):
            for position in positions:
                head.drop(position)

    def step(
        self, queries: Array, keys: Array, values: Array, scale: float, position: int,
        victims: list[int] | None = None, near: float = 0.0,
    ) -> Array:  # fmt: skip
        """One token; the outputs ``[Hq, d_v]``. ``victims`` are the tokens that left; the rule checks them."""
        group = len(queries) // len(keys)
        out = [
            head.attend(queries[h * group : (h + 1) * group], keys[h], values[h], scale, position)
            for h, head in enumerate(self.heads)
        ]
        if not self.grows:
            self.evict(victims, near)
        return np.concatenate(out)

    def evict(self, victims: list[int] | None, near: float) -> None:
        over = [h for h, head in enumerate(self.heads) if len(head.held) > head.keep]
        chosen = []
        for h in over:
            head = self.heads[h]
            candidates = head.candidates()
            own = worst(candidates)
            given = own if victims is None else victims[h]
            assert given == own or candidates[given] - candidates[own] <= near, (given, own, candidates)
            chosen.append(given)
        for h, position in zip(over, chosen, strict=True):
            self.heads[h].leaving([position])
            self.heads[h].lost(position)
        for h, position in zip(over, chosen, strict=True):
            self.heads[h].drop(position)


def shared(heads: list[Head]) -> list[int]:
    """How many tokens each head of a layer keeps, by AdaKV's rule."""
    budget, alpha, count = heads[0].budget, heads[0].safeguard, len(heads)
    assert alpha is not None
    scores = [head.importance() for head in heads]
    if heads[0].forced:  # the best of each head first, then the best of all
        first = [best(score, int(alpha * budget)) for score in scores]
        pool = [(j not in first[h], -s, h, j) for h, score in enumerate(scores) for j, s in score.items()]
        chosen = sorted(pool)[: count * budget]
        exact = [float(sum(h == head for _, _, h, _ in chosen)) for head in range(count)]
    else:  # the window and sinks are certain, the others compete
        sure = [min(budget, sum(s >= 1e8 for s in score.values())) for score in scores]
        contest = [(-s, h, j) for h, score in enumerate(scores) for j, s in score.items() if s < 1e8]
        won = sorted(contest)[: count * budget - sum(sure)]
        exact = [
            sure[head] + (1 - alpha) * sum(h == head for _, h, _ in won) + alpha * (budget - sure[head])
            for head in range(count)
        ]
    missing = (count * budget - sum(exact)) / count
    exact = [part + missing for part in exact]
    whole = [int(part + 1e-9) for part in exact]
    for head in sorted(range(count), key=lambda h: (whole[h] - exact[h], h))[: count * budget - sum(whole)]:
        whole[head] += 1
    return whole


def errors(
    layer: Layer, queries: Array, outputs: Array, scale: float, projection: Array | None = None, last: int = 64
) -> list[float]:
    """What it costs each KV head of a layer that has read a prompt to keep ``budget`` tokens: the mean squared error of
    the last queries' outputs, behind the projection W_O ``[hidden, Hq·d_v]`` if there is one.

    ``queries`` ``[Hq, n, d]`` and ``outputs`` ``[n, Hq, d_v]`` are those of the prompt.
    """
    trial = copy.deepcopy(layer)
    trial.compress()
    length, group = queries.shape[1], len(queries) // len(trial.heads)
    found = []
    for h, head in enumerate(trial.heads):
        total = 0.0
        for i in range(max(0, length - last), length):
            seen, off = [j for j in head.held if j <= i], []
            for g in range(h * group, (h + 1) * group):
                logits = np.array([queries[g, i] @ head.keys[j] * scale + head.bias.get(j, 0.0) for j in seen])
                weights = softmax(logits) if seen else logits
                off.append(weights @ np.stack([head.values[j] for j in seen]) - outputs[i, g])
            joined = np.concatenate(off)
            if projection is not None:
                joined = projection[:, h * len(joined) :][:, : len(joined)] @ joined
            total += float(np.sum(joined**2))
        found.append(total / min(last, length))
    return found


def filled(cost: list[float], total: int, floor: float, cap: float) -> Array:
    """Parts of ``total`` in proportion to the roots of costs, between bounds, before they are rounded."""
    root, low, high = np.sqrt(cost), 0.0, 1e12
    for _ in range(300):
        factor = (low + high) / 2
        low, high = (factor, high) if np.clip(factor * root, floor, cap).sum() < total else (low, factor)
    return np.clip(factor * root, floor, cap)


def pyramid(layers: int, budget: int, length: int, window: int, beta: float) -> list[float]:
    """PyramidKV's layer budgets before rounding."""
    free = budget - window
    least, most = free / beta, 2 * free - free / beta
    if most > length - window:
        most = length - window
        least = 2 * free - most
    return [window + most - (most - least) * layer / (layers - 1) for layer in range(layers)]
