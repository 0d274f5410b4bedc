"""What the gate's timed rule does on this machine: false alarms of equal code, and its power on real slowdowns.

Equal code is measured against itself in long interleaved sittings of two workers. Every 32 rounds of them are one
live gate; further gates are replayed from windows of the same recording, drift and spikes included, with the head made
slower by a factor where power is asked. Live slowdowns put a real delay into the decode loop of the head's worker. Each
gate is judged as ``d2obench gate`` does: looks, 98 % intervals, and a second sitting that must agree.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from d2obench import errors
from d2obench.errors import WorkerError
from d2obench.runner import faults
from d2obench.runner.check import check
from d2obench.runner.gate import confirm
from d2obench.runner.gate_arm import Arm
from d2obench.runner.gate_rounds import Rounds, measure_group
from d2obench.stats.rules import judge_timed, tolerance
from d2obench.stats.verdict import Row, Verdict
from d2obench.suite import Cell, GateTable, Suite, load_suite

SUITE = {
    "axes.model": "shape:tiny", "axes.policy": "d2o", "axes.task": "speed", "axes.shape": "128+32", "axes.batch": "2",
    "axes.device": "cpu", "worker.threads": "1", "gate.metrics": '["tpot_s"]',
}  # fmt: skip
METRIC = "tpot_s"
CHANGES = (0.0, 0.1, 0.2)


class Pairs(NamedTuple):
    """A recording: times of both arms, one of each a round, in the order they were measured."""

    base: list[float]
    head: list[float]


class Outcome(NamedTuple):
    """How often gates of one kind gave each verdict.

    Args:
        what: in words.
        change: how much slower the head truly was.
        counts: gates by verdict.
    """

    what: str
    change: float
    counts: Counter[Verdict]

    def __str__(self) -> str:
        found = ", ".join(f"{count} {verdict.value}" for verdict, count in sorted(self.counts.items(), key=_severity))
        return f"{self.what}, head {self.change:+.0%}: {found} of {self.counts.total()}"


def study(
    *, live: int = 20, replays: int = 200, trials: int = 10, burn: bool = False, watch: Callable[[str], None] = print
) -> list[Outcome]:
    """Records, replays and injects; minutes.

    Args:
        live: gates of equal code measured in full.
        replays: gates replayed for each change.
        trials: live gates for each real slowdown.
        burn: keep one core busy with another process all the while.
        watch: is told what goes on.
    """
    suite = load_suite("ci", SUITE)
    found: list[Outcome] = []
    with burning(burn):
        watch(f"{live} sittings of equal code")
        pairs = record(suite, live, watch)
        gates = Counter(sitting(_window(pairs, i * _most(suite), suite), suite.gate).verdict for i in range(live))
        found.append(Outcome("live sittings", 0.0, gates))
        found += [Outcome("replayed gates", change, replay(pairs, suite, replays, change)) for change in CHANGES]
        for change in CHANGES[1:] if trials else ():
            watch(f"{trials} gates of a head that is {change:.0%} slower")
            found.append(Outcome("live gates", change, inject(suite, change, trials, watch)))
    return found


def record(suite: Suite, sittings: int, watch: Callable[[str], None]) -> Pairs:
    """Equal code against itself: ``sittings`` times the last look's rounds, none left out."""
    whole = msgspec.structs.replace(suite.gate, looks=(_most(suite) * sittings,))
    suite = msgspec.structs.replace(suite, gate=whole)
    with Arm("base", root(), suite) as base, Arm("head", root(), suite) as head:
        cell = _only(suite, base)
        rounds, _ = measure_group({"base": base, "head": head}, [cell], suite, watch)
        _raise_failures(rounds)
        return Pairs(*rounds.series(cell, METRIC))


def replay(pairs: Pairs, suite: Suite, gates: int, change: float, seed: int = 0) -> Counter[Verdict]:
    """Gates over windows of a recording that start anywhere; the second sitting is another window."""
    rng, counts = random.Random(seed), Counter[Verdict]()
    starts = len(pairs.base) - _most(suite)
    for _ in range(gates):
        first, second = (sitting(_window(pairs, rng.randint(0, starts), suite, change), suite.gate) for _ in range(2))
        counts[(confirm(first, second) if first.verdict is Verdict.REGRESSED else first).verdict] += 1
    return counts


def inject(suite: Suite, change: float, trials: int, watch: Callable[[str], None]) -> Counter[Verdict]:
    """Live gates against a worker whose decode steps really take ``change`` longer."""
    counts = Counter[Verdict]()
    delayed = faults.command("slow", change)
    for _ in range(trials):
        with Arm("base", root(), suite) as base, Arm("head", root(), suite, command=delayed) as head:
            arms, cell = {"base": base, "head": head}, _only(suite, base)
            row = _live(arms, cell, suite, watch)
            if row.verdict is Verdict.REGRESSED:
                base.restart()
                head.restart()
                row = confirm(row, _live(arms, cell, suite, watch))
            counts[row.verdict] += 1
    return counts


def sitting(pairs: Pairs, gate: GateTable) -> Row:
    """The adaptive rule on rounds that are there already."""
    for look in sorted(gate.looks):
        limit = tolerance(METRIC, gate.tolerance)
        row = judge_timed("study", METRIC, pairs.base[:look], pairs.head[:look], limit, gate.level)
        if row.verdict is not Verdict.INCONCLUSIVE:
            break
    return row


def _live(arms: Mapping[str, Arm], cell: Cell, suite: Suite, watch: Callable[[str], None]) -> Row:
    rounds, rows = measure_group(arms, [cell], suite, watch)
    _raise_failures(rounds)
    return rows[0]


def _raise_failures(rounds: Rounds) -> None:
    for failed in rounds.failed.values():
        for name, failure in failed.items():
            raise WorkerError(f"the {name}'s worker of the study failed", why=failure.reason)


@contextmanager
def burning(wanted: bool) -> Iterator[None]:
    """Keeps one core busy with another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def root() -> Path:
    """Where this d2obench is imported from."""
    return Path(errors.__file__).resolve().parents[1]


def _only(suite: Suite, arm: Arm) -> Cell:
    (cell,) = check(suite, arm.client).cells
    return cell


def _window(pairs: Pairs, start: int, suite: Suite, change: float = 0.0) -> Pairs:
    end = start + _most(suite)
    return Pairs(pairs.base[start:end], [time * (1 + change) for time in pairs.head[start:end]])


def _most(suite: Suite) -> int:
    return max(suite.gate.looks)


def _severity(item: tuple[Verdict, int]) -> int:
    return item[0].severity
