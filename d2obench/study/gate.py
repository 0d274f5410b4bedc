"""What the gate's timed rule does on this machine: false alarms of equal code, and its power on real slowdowns.

Every trial is a whole gate of one decode cell, from fresh processes: looks, 98 % intervals, and a second sitting that
must agree. Slowdowns are a real delay in the decode loop of the head's worker. Trials of equal code are measured to the
last look even where an earlier one decides, so that further gates can be replayed from what was recorded.
"""

from __future__ import annotations

import json
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
from d2obench.gate.arm import Arm, both
from d2obench.gate.rounds import Rounds, measure_group
from d2obench.gate.rules import confirm, tolerance
from d2obench.gate.verdict import Row, Verdict
from d2obench.record import finite, write_atomic
from d2obench.run.plan import cells
from d2obench.run.worker_client import WORKER
from d2obench.study import faults
from d2obench.study.trials import Outcome, Pairs, Rule, Study, Trial, live_outcomes, replay
from d2obench.suite.definition import Suite, load_suite
from d2obench.tasks.base import Cell

SUITE = {"axes.model": "shape:tiny", "axes.policy": "d2o", "axes.task": "speed", "gate.metrics": '["tpot_s"]'}
METRIC = "tpot_s"
CHANGES = (0.0, 0.1, 0.2)
_HEAD = "| head | gates | n | REGRESSED | INCONCLUSIVE | OK | share REGRESSED (95 %) |\n|---|---|--:|--:|--:|--:|--:|\n"
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


def write_study(folder: Path, found: Study) -> None:
    """Writes ``study.json`` with every recorded pair, and ``README.md`` with the shares of each verdict."""
    text = json.dumps(finite(msgspec.to_builtins(found)), indent=None, sort_keys=True, separators=(",", ":"))
    write_atomic(folder / "study.json", text.replace('{"change"', '\n{"change"').encode() + b"\n")
    write_atomic(folder / "README.md", as_markdown(found).encode())


def as_markdown(found: Study) -> str:
    """What was tried, on which machine, and how it came out."""
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
        " made of what the live gates of equal code recorded, the head's times multiplied.\n",
        f"{facts.get('cpu', 'unknown processor')}, {facts.get('logical_cores', '?')} threads, torch"
        f" {facts.get('torch', '?')}, commit {commit}; {others}."
        f" {len(found.trials)} live gates took {seconds:.0f} s.\n",
        _HEAD + "".join(map(_line, found.outcomes)),
        "`study.json` holds every pair of rounds. Made by `d2obench doctor --study --output FOLDER"
        f"{' --load' if found.load else ''}`.\n",
    ]
    return "\n".join(lines)


def _line(one: Outcome) -> str:
    share, lo, hi = one.share(Verdict.REGRESSED)
    shown = (Verdict.REGRESSED, Verdict.INCONCLUSIVE, Verdict.OK)
    counts = " | ".join(str(one.counts.get(verdict, 0)) for verdict in shown)
    return f"| {one.change:+.0%} | {one.kind} | {one.total} | {counts} | {share:.1%} ({lo:.1%} … {hi:.1%}) |\n"


def _percent(value: object) -> str:
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
