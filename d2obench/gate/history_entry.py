"""The entries of a history: what a finished run, or the head of a gate, measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import RecordError, UsageError
from d2obench.gate.baseline import SETTINGS, device_class
from d2obench.gate.history import VERSIONS, Entry
from d2obench.metric import METRICS
from d2obench.record import Run, Value, dump, finite


def entry_of_run(run: Run) -> Entry:
    """The entry of a finished run.

    Raises:
        UsageError: no cell of it has a figure.
    """
    info, facts = run.info, run.info.environment
    settings = {key: info.suite.get(key) for key in SETTINGS}
    figures = {cell.id: _kept(cell.values) for cell in run.cells if cell.status == "ok"}
    return _entry(
        when=info.started,
        commit=f"{facts.get('commit') or 'unknown'}{'+dirty' if facts.get('dirty') else ''}",
        suite=info.name,
        settings=hashlib.sha256(dump(settings)).hexdigest()[:16],
        machine=_machine({**facts, "machine": device_class(facts)}),
        versions=_versions({"d2obench": info.version, **{key: facts.get(key) for key in VERSIONS[1:]}}),
        figures=figures,
    )


def entry_of_verdicts(path: Path) -> Entry:
    """The entry of a gate: what its head measured, from the file ``verdicts.json``.

    Raises:
        RecordError: the file can't be read.
        UsageError: it is of an older version, or has no figures.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError) as problem:
        raise RecordError(f"can't read the verdicts {path}", why=str(problem)) from None
    about = found.get("about") or {}
    if not isinstance(about, dict) or "when" not in about:
        raise UsageError(f"{path} does not say when and where it was measured", remedy="run the gate again")
    figures: dict[str, dict[str, Value]] = {}
    for row in found.get("rows", []):
        head, metric = row.get("head"), row.get("metric")
        if metric in METRICS and row.get("kind") in ("exact", "bounded", "timed", "ratio") and _number(head):
            figures.setdefault(row["cell"], {})[metric] = Value(float(head), n=int(row.get("n") or 1))
    return _entry(
        when=str(about["when"]),
        commit=str(about.get("commit", "unknown")),
        suite=str(about.get("suite", found.get("title", ""))),
        settings=str(about.get("settings", "")),
        machine=_machine(about),
        versions=_versions(about),
        figures=figures,
        verdict=str(found.get("verdict", "")),
    )


def _entry(**fields: Any) -> Entry:
    if not any(fields["figures"].values()):
        raise UsageError("there is no figure to keep", why="no cell has one")
    made = Entry(**fields)
    return msgspec.structs.replace(made, id=made.digest)


def _kept(values: Mapping[str, Value]) -> dict[str, Value]:
    """The figures that are judged by a gate, without notes."""
    judged = {key: one for key, one in values.items() if key in METRICS and METRICS[key].kind != "info"}
    return {
        key: Value(finite(one.value), finite(one.lo), finite(one.hi), one.n, kind=one.kind)
        for key, one in judged.items()
        if one.value is not None and math.isfinite(one.value)
    }


def _machine(facts: Mapping[str, Any]) -> str:
    named = [facts.get("machine"), facts.get("gpu") or facts.get("cpu")]
    threads = facts.get("threads")
    return ", ".join([*(str(one) for one in named if one), *([f"{threads} threads"] if threads else [])])


def _versions(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(facts[name]).partition("+")[0] for name in VERSIONS if facts.get(name)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
