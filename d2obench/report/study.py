"""A study of the gate's timed rule as files: ``study.json`` with every recorded pair, ``README.md`` with the shares."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from d2obench.gate.study.trials import Outcome, Study
from d2obench.gate.verdict import Verdict
from d2obench.record import finite, write_atomic

_HEAD = "| head | gates | n | REGRESSED | INCONCLUSIVE | OK | share REGRESSED (95 %) |\n|---|---|--:|--:|--:|--:|--:|\n"


def write_study(folder: Path, found: Study) -> None:
    """Both files."""
    text = json.dumps(finite(msgspec.to_builtins(found)), indent=None, sort_keys=True, separators=(",", ":"))
    write_atomic(folder / "study.json", text.replace('{"change"', '\n{"change"').encode() + b"\n")
    write_atomic(folder / "README.md", markdown(found).encode())


def markdown(found: Study) -> str:
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
