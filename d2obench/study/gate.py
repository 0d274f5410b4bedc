"""How often the gate's rule for timed figures is right on this machine: false alarms with equal code, and its power.

Every live trial is a whole gate of one decode cell in fresh processes: several looks with 98 % intervals, and a second
sitting that has to agree before a regression is reported. A slower head has a real delay in its decode loop.

A sitting is measured in parts, one for each look and each by fresh processes (:mod:`d2obench.gate.rounds`). With equal
code it is measured to the last look even if an earlier look decides, so that further gates can be replayed: a replayed
gate draws its parts from all recorded ones, each with the drift and the spikes it met, and draws others for its second
sitting.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from d2obench import errors
from d2obench.errors import UsageError, WorkerError
from d2obench.gate.arm import Arm, both
from d2obench.gate.rounds import Rounds, measure_group
from d2obench.gate.rules import confirm, judge_timed, tolerance
from d2obench.gate.verdict import Row, Verdict
from d2obench.record import finite, write_atomic
from d2obench.run.plan import cells
from d2obench.run.worker_client import WORKER
from d2obench.stats.intervals import proportion
from d2obench.study import faults
from d2obench.suite.definition import GateTable, Suite, load_suite
from d2obench.tasks.base import Cell

SUITE = {"axes.model": "shape:tiny", "axes.policy": "d2o", "axes.task": "speed", "gate.metrics": '["tpot_s"]'}
METRIC = "tpot_s"
CHANGES = (0.0, 0.1, 0.2)
RECORD = "study.json"
REPLAYS = 20_000
"""Gates replayed for each change: enough to tell a share of 1 in 200 from one of 1 in 2,000."""
_HEAD = "| head | gates | n | REGRESSED | INCONCLUSIVE | OK | share REGRESSED (95 %) |\n|---|---|--:|--:|--:|--:|--:|\n"
T = TypeVar("T")
FACTS = ("cpu", "cores", "logical_cores", "threads", "torch", "transformers", "python", "commit", "dirty")


class Pairs(NamedTuple):
    """Rounds of one pair of processes: the seconds of both sides, in the order in which they were measured."""

    base: list[float]
    head: list[float]


class Rule(NamedTuple):
    """The rule under study: the metric, its limit, and the gate table of the suite with its looks and level."""

    metric: str
    limit: float
    gate: GateTable

    @property
    def lengths(self) -> list[int]:
        """Number of rounds that each look adds."""
        looks = sorted(self.gate.looks)
        return [look - before for before, look in zip([0, *looks], looks, strict=False)]

    def sitting(self, parts: Sequence[Pairs]) -> Row:
        """The verdict of the first look that decides, over all parts up to it, or of the last look."""
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
        change: how much longer the head's decode step was made, as a share.
        verdict: of the gate.
        found: the change that the gate measured, in words.
        reason: of the verdict, in words.
        parts: the rounds of the first sitting; empty if only the verdict was recorded.
        seconds: how long the gate took.
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
        change: how much slower the head really was, as a share.
        counts: number of gates by verdict.
    """

    kind: str
    change: float
    counts: dict[Verdict, int]

    @property
    def total(self) -> int:
        """Number of gates of this kind."""
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
    """A whole study: the rule, the machine, whether another process kept a core busy, the trials and the outcomes."""

    rule: dict[str, object]
    environment: Mapping[str, object]
    load: bool
    trials: tuple[Trial, ...]
    outcomes: tuple[Outcome, ...]
    schema: int = 1


def study(
    *,
    gates: Mapping[float, int] | None = None,
    replays: int = REPLAYS,
    burn: bool = False,
    known: Study | None = None,
    watch: Callable[[str], None] = print,
    keep: Callable[[Study], None] = lambda found: None,
) -> Study:
    """Measures live gates, then replays more of them. A gate takes about 20 s on a quiet machine.

    Args:
        gates: number of live gates by change of the head; 20 for each change by default.
        replays: number of gates replayed for each change.
        burn: whether another process keeps one core busy meanwhile.
        known: a part of this study that was made before, whose live gates count.
        watch: receives a line after each gate.
        keep: receives what has been found after each gate, so that nothing is lost if the study is stopped.

    Raises:
        UsageError: ``known`` is of another rule, another load, another machine or another commit.
    """
    suite = load_suite("ci", SUITE)
    (cell,) = cells(suite)
    gates = gates or dict.fromkeys(CHANGES, 20)
    rule = Rule(METRIC, tolerance(METRIC, suite.gate.tolerance), suite.gate)
    about = {
        "cell": cell.id, "metric": METRIC, "limit": rule.limit, "looks": list(suite.gate.looks),
        "level": suite.gate.level,
    }  # fmt: skip
    if known is not None and (known.rule, known.load) != (about, burn):
        raise another("its rule or its load is another")
    trials: list[Trial] = [*known.trials] if known else []
    facts: dict[str, object] = {**known.environment} if known else {}
    with burning(burn):
        for change, count in gates.items():
            for number in range(sum(one.change == change for one in trials), count):
                here: dict[str, object] = {}
                last = trial(suite, cell, rule, change, here)
                if facts and here != facts:
                    raise another("it was made on another machine, or with other libraries or another commit")
                facts = here
                trials.append(last)
                watch(f"{change:+.0%}, gate {number + 1} of {count}: {last.verdict.value} {last.found}")
                keep(Study(about, facts, burn, tuple(trials), tuple(live_outcomes(trials))))
    recorded = [part for one in trials for part in one.parts]
    replayed = [replay(recorded, rule, replays, change) for change in CHANGES] if recorded and replays else []
    found = Study(about, facts, burn, tuple(trials), (*live_outcomes(trials), *replayed))
    keep(found)
    return found


def another(why: str) -> UsageError:
    """The error for a study that can't go on with what its folder holds."""
    return UsageError("the folder of --output holds another study", why=why, remedy="choose another folder")


def trial(suite: Suite, cell: Cell, rule: Rule, change: float, facts: dict[str, object]) -> Trial:
    """Runs one live gate; the facts of the machine are added to ``facts``."""
    since = time.monotonic()
    command = faults.command("slow", change) if change else WORKER
    with Arm("base", root(), suite) as base, Arm("head", root(), suite, command=command) as head:
        arms = {"base": base, "head": head}
        both(arms, partial(Arm.count, cells=[cell]))
        known = base.client.call("environment", {"device": "cpu"})
        facts |= {key: known[key] for key in FACTS if key in known}
        parts: list[Pairs] = []
        if change:
            row = _sitting(arms, cell, suite)
        else:
            parts = _parts(arms, cell, suite, rule)
            row = rule.sitting(parts)
        if row.verdict is Verdict.REGRESSED:
            both(arms, Arm.restart)
            row = confirm(row, _sitting(arms, cell, suite))
    took = round(time.monotonic() - since, 1)
    return Trial(
        change=change, verdict=row.verdict, found=row.change, reason=row.reason, parts=tuple(parts), seconds=took
    )


def _sitting(arms: Mapping[str, Arm], cell: Cell, suite: Suite) -> Row:
    """One sitting, measured as the gate measures it."""
    rounds, rows = measure_group(arms, [cell], suite, lambda words: None, renew=lambda: both(arms, Arm.restart))
    _raise_failures(rounds)
    return rows[0]


def _parts(arms: Mapping[str, Arm], cell: Cell, suite: Suite, rule: Rule) -> list[Pairs]:
    """The rounds of every look, each by fresh processes; each part is as long as the longest look, for replays."""
    longest = msgspec.structs.replace(suite.gate, looks=(max(rule.lengths),))
    found = []
    for number in range(len(rule.lengths)):
        if number:
            both(arms, Arm.restart)
        rounds, _ = measure_group(arms, [cell], msgspec.structs.replace(suite, gate=longest), lambda words: None)
        _raise_failures(rounds)
        base, head = rounds.series(cell, METRIC)
        found.append(Pairs([round(time, 8) for time in base], [round(time, 8) for time in head]))
    return found


def _raise_failures(rounds: Rounds) -> None:
    for failed in rounds.failed.values():
        for name, failure in failed.items():
            raise WorkerError(f"the {name}'s worker of the study failed", why=failure.reason)


@contextmanager
def burning(wanted: bool) -> Iterator[None]:
    """Keeps one core busy with another process while the block runs, if ``wanted``."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def root() -> Path:
    """The folder from which this d2obench is imported."""
    return Path(errors.__file__).resolve().parents[1]


def live_outcomes(trials: Sequence[Trial]) -> list[Outcome]:
    """One outcome for each change, in the order in which the changes were tried."""
    changes = dict.fromkeys(trial.change for trial in trials)
    return [
        Outcome("live", change, dict(Counter(one.verdict for one in trials if one.change == change)))
        for change in changes
    ]


def replay(recorded: Sequence[Pairs], rule: Rule, gates: int, change: float, seed: int = 0) -> Outcome:
    """Replays gates from recorded parts of equal code, with the head's times multiplied by 1 + ``change``.

    Args:
        recorded: parts, each by one pair of processes and none shorter than the longest part of a sitting.
        rule: the rule under study.
        gates: number of gates.
        change: how much slower the head is made, as a share.
        seed: of the draws.
    """
    rng, counts = random.Random(seed), Counter[Verdict]()
    for _ in range(gates):
        row = rule.sitting(_draw(recorded, rule, change, rng))
        if row.verdict is Verdict.REGRESSED:
            row = confirm(row, rule.sitting(_draw(recorded, rule, change, rng)))
        counts[row.verdict] += 1
    return Outcome("replayed", change, dict(counts))


def _draw(recorded: Sequence[Pairs], rule: Rule, change: float, rng: random.Random) -> list[Pairs]:
    found = []
    for length in rule.lengths:
        base, head = rng.choice(recorded)
        start = rng.randint(0, len(base) - length)
        slower = [time * (1 + change) for time in head[start : start + length]]
        found.append(Pairs(base[start : start + length], slower))
    return found


def write_study(folder: Path, found: Study) -> None:
    """Writes ``study.json`` with every recorded pair of rounds, and ``README.md`` with the shares of each verdict."""
    text = json.dumps(finite(msgspec.to_builtins(found)), indent=None, sort_keys=True, separators=(",", ":"))
    write_atomic(folder / RECORD, text.replace('{"change"', '\n{"change"').encode() + b"\n")
    write_atomic(folder / "README.md", as_markdown(found).encode())


def read_study(folder: Path, kind: type[T]) -> T | None:
    """The study that a folder holds, whole or in part; None if it holds none.

    Raises:
        UsageError: its record can't be read.
    """
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as problem:
        raise another(str(problem)) from None


def as_markdown(found: Study) -> str:
    """The text of ``README.md``: what was tried, on which machine, and the outcome."""
    rule, facts = found.rule, found.environment
    limit, level, looks = _percent(rule["limit"]), _percent(rule["level"]), ", ".join(map(str, _list(rule["looks"])))
    others = "another process kept one core busy" if found.load else "nothing else was started"
    seconds = sum(one.seconds for one in found.trials)
    commit = str(facts.get("commit") or "unknown")[:12] + (" and changes" if facts.get("dirty") else "")
    lines = [
        "# The gate's timed rule, tried\n",
        f"`{rule['metric']}` of `{rule['cell']}`; REGRESSED beyond {limit} at {level}"
        f" after {looks} rounds, and only where fresh processes find it again. Every"
        " live gate starts its own processes; a slower head has a real delay in its decode loop. Replayed gates are"
        " simulated: each draws its rounds from what the live gates of equal code recorded, the head's times"
        " multiplied.\n",
        f"{facts.get('cpu', 'unknown processor')}, {facts.get('logical_cores', '?')} threads, torch"
        f" {facts.get('torch', '?')}, commit {commit}; {others}."
        f" {len(found.trials)} live gates took {seconds:.0f} s.\n",
        _HEAD + "".join(map(_line, found.outcomes)),
        "The shares have exact binomial intervals. Those of replayed gates hold for rounds like the"
        f" {sum(len(one.parts) for one in found.trials)} recorded parts; what other hours bring, only live gates show."
        " `study.json` holds every pair of rounds. Made by `d2obench doctor --study --output FOLDER"
        f"{' --load' if found.load else ''}`; the same command goes on where it was stopped.\n",
    ]
    return "\n".join(lines)


def _line(one: Outcome) -> str:
    share, lo, hi = one.share(Verdict.REGRESSED)
    shown = (Verdict.REGRESSED, Verdict.INCONCLUSIVE, Verdict.OK)
    counts = " | ".join(str(one.counts.get(verdict, 0)) for verdict in shown)
    digits = 1 if one.total < 1000 else 2
    shown_share = f"{share:.{digits}%} ({lo:.{digits}%} … {hi:.{digits}%})"
    return f"| {one.change:+.0%} | {one.kind} | {one.total} | {counts} | {shown_share} |\n"


def _percent(value: object) -> str:
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
