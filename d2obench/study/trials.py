"""Trials of the gate's timed rule, live or replayed: what was recorded, how it was judged, how often each verdict came.

A sitting is measured in parts, one a look, each by fresh processes (see ``d2obench.gate.rounds``). A replayed
gate draws its parts from all that were recorded, each with the drift and the spikes it met, and its second sitting from
others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from d2obench.gate.rules import confirm, judge_timed
from d2obench.gate.verdict import Row, Verdict
from d2obench.stats.intervals import proportion
from d2obench.suite.definition import GateTable


class Pairs(NamedTuple):
    """One process pair's rounds: seconds of both arms, in the order they were measured."""

    base: list[float]
    head: list[float]


class Rule(NamedTuple):
    """What judges: the metric, its limit, and the suite's looks and level."""

    metric: str
    limit: float
    gate: GateTable

    @property
    def lengths(self) -> list[int]:
        """Rounds that each look adds."""
        looks = sorted(self.gate.looks)
        return [look - before for before, look in zip([0, *looks], looks, strict=False)]

    def sitting(self, parts: Sequence[Pairs]) -> Row:
        """The verdict of the first look that decides, over the parts up to it; else the last one's."""
        base, head = list[float](), list[float]()
        for part, length in zip(parts, self.lengths, strict=True):
            base += part.base[:length]
            head += part.head[:length]
            row = judge_timed("study", self.metric, base, head, self.limit, self.gate.level)
            if row.verdict is not Verdict.INCONCLUSIVE:
                break
        return row


class Trial(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One live gate.

    Args:
        change: how much longer the head's decode step was made.
        verdict: the gate's.
        found: the change it saw, in words.
        reason: why, in words.
        parts: what was recorded of the first sitting; empty where only the verdict is known.
        seconds: it took.
    """

    change: float
    verdict: Verdict
    found: str
    reason: str = ""
    parts: tuple[Pairs, ...] = ()
    seconds: float = 0.0


class Outcome(msgspec.Struct, frozen=True):
    """How often gates of one kind gave each verdict.

    Args:
        kind: ``live`` or ``replayed``.
        change: how much slower the head truly was.
        counts: gates by verdict.
    """

    kind: str
    change: float
    counts: dict[Verdict, int]

    @property
    def total(self) -> int:
        """All gates of this kind."""
        return sum(self.counts.values())

    def share(self, verdict: Verdict) -> tuple[float, float, float]:
        """The share of gates with this verdict, and its 95 % interval."""
        found = proportion(self.counts.get(verdict, 0), self.total)
        return found.value or 0.0, found.lo or 0.0, found.hi or 0.0

    def __str__(self) -> str:
        order = sorted(self.counts.items(), key=lambda item: item[0].severity)
        found = ", ".join(f"{count} {verdict.value}" for verdict, count in order)
        return f"{self.kind}, head {self.change:+.0%}: {found} of {self.total}"


class Study(msgspec.Struct, frozen=True):
    """All of it: the rule in words, the machine, whether another process was busy, trials and outcomes."""

    rule: dict[str, object]
    environment: Mapping[str, object]
    load: bool
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    schema: int = 1


def live_outcomes(trials: Sequence[Trial]) -> list[Outcome]:
    """One for each change, in the order they were tried."""
    changes = dict.fromkeys(trial.change for trial in trials)
    return [
        Outcome("live", change, dict(Counter(one.verdict for one in trials if one.change == change)))
        for change in changes
    ]


def replay(recorded: Sequence[Pairs], rule: Rule, gates: int, change: float, seed: int = 0) -> Outcome:
    """Gates made of recorded parts of equal code, the head made slower by a factor.

    Args:
        recorded: rounds of one process pair each, none shorter than the longest part.
        rule: what judges.
        gates: how many.
        change: the factor less 1.
        seed: of the draws.
    """
    rng, counts = random.Random(seed), Counter[Verdict]()
    for _ in range(gates):
        row = rule.sitting(_parts(recorded, rule, change, rng))
        if row.verdict is Verdict.REGRESSED:
            row = confirm(row, rule.sitting(_parts(recorded, rule, change, rng)))
        counts[row.verdict] += 1
    return Outcome("replayed", change, dict(counts))


def _parts(recorded: Sequence[Pairs], rule: Rule, change: float, rng: random.Random) -> list[Pairs]:
    found = []
    for length in rule.lengths:
        base, head = rng.choice(recorded)
        start = rng.randint(0, len(base) - length)
        slower = [time * (1 + change) for time in head[start : start + length]]
        found.append(Pairs(base[start : start + length], slower))
    return found
