"""What the gate's timed rule does on this machine: false alarms of equal code, and its power on real slowdowns.

Every trial is a whole gate of one decode cell, from fresh processes: looks, 98 % intervals, and a second sitting that
must agree. Slowdowns are a real delay in the decode loop of the head's worker. Trials of equal code are measured to the
last look even where an earlier one decides, so that further gates can be replayed from what was recorded.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec

from d2obench import errors
from d2obench.errors import WorkerError
from d2obench.gate.arm import Arm
from d2obench.gate.both import both
from d2obench.gate.rounds import Rounds, measure_group
from d2obench.gate.rules import confirm, tolerance
from d2obench.gate.study import faults
from d2obench.gate.study.trials import Pairs, Rule, Study, Trial, live_outcomes, replay
from d2obench.gate.verdict import Row, Verdict
from d2obench.run.worker_client import WORKER
from d2obench.suite.definition import Cell, Suite, cells, load_suite

SUITE = {"axes.model": "shape:tiny", "axes.policy": "d2o", "axes.task": "speed", "gate.metrics": '["tpot_s"]'}
METRIC = "tpot_s"
CHANGES = (0.0, 0.1, 0.2)
FACTS = ("cpu", "cores", "logical_cores", "threads", "torch", "transformers", "python", "commit", "dirty")


def study(
    *,
    gates: Mapping[float, int] | None = None,
    replays: int = 200,
    burn: bool = False,
    watch: Callable[[str], None] = print,
    keep: Callable[[Study], None] = lambda found: None,
) -> Study:
    """Measures, then replays; some 20 s a gate on a quiet machine.

    Args:
        gates: live gates by change of the head; 20 each where it is left out.
        replays: gates replayed for each change.
        burn: keep one core busy with another process all the while.
        watch: is told what goes on.
        keep: is given what there is after each gate, so that a stop loses nothing.
    """
    suite = load_suite("ci", SUITE)
    (cell,) = cells(suite)
    gates = gates or dict.fromkeys(CHANGES, 20)
    rule = Rule(METRIC, tolerance(METRIC, suite.gate.tolerance), suite.gate)
    about = {
        "cell": cell.id, "metric": METRIC, "limit": rule.limit, "looks": list(suite.gate.looks),
        "level": suite.gate.level,
    }  # fmt: skip
    trials: list[Trial] = []
    facts: dict[str, object] = {}
    with burning(burn):
        for change, count in gates.items():
            for number in range(count):
                trials.append(trial(suite, cell, rule, change, facts))
                last = trials[-1]
                watch(f"{change:+.0%}, gate {number + 1} of {count}: {last.verdict.value} {last.found}")
                keep(Study(about, facts, burn, tuple(trials), tuple(live_outcomes(trials))))
    recorded = [part for one in trials for part in one.parts]
    replayed = [replay(recorded, rule, replays, change) for change in CHANGES] if recorded and replays else []
    found = Study(about, facts, burn, tuple(trials), (*live_outcomes(trials), *replayed))
    keep(found)
    return found


def trial(suite: Suite, cell: Cell, rule: Rule, change: float, facts: dict[str, object]) -> Trial:
    """One live gate; ``facts`` is filled with those of the machine."""
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
    """As the gate measures it."""
    rounds, rows = measure_group(arms, [cell], suite, lambda words: None, renew=lambda: both(arms, Arm.restart))
    _raise_failures(rounds)
    return rows[0]


def _parts(arms: Mapping[str, Arm], cell: Cell, suite: Suite, rule: Rule) -> list[Pairs]:
    """The rounds of every look, by fresh processes each, and as many as the longest look has."""
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
