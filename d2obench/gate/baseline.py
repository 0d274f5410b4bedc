"""Committed baselines, ``reports/baselines/<suite>/<device class>.json``: sorted files that are reviewed as a diff.

A baseline holds the facts of every cell, which are figures of every kind except timed ones, and what they depend on:
the settings of the suite, the software and the class of the device. Only ``d2obench baseline update`` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import RecordError, UsageError
from d2obench.gate.compare import Facts, judge_facts
from d2obench.gate.verdict import KINDS, Row, Verdict, Verdicts, gather, of_kinds
from d2obench.record import RunInfo, finite, write_atomic
from d2obench.suite.definition import Suite

SCHEMA = 1
FOLDER = Path("reports/baselines")
SETTINGS = ("axes", "exclude", "timing", "worker", "quality")
"""Tables of a suite that decide what is measured, unlike its name, its description and the rules of its gate."""
COMPARED = ("device", "torch", "transformers", "attention", "driver")
"""Facts of the environment that make stored figures incomparable if they differ."""
PROCESSOR = ("cpu", "threads")
"""Facts that affect only greedy tokens, through the order in which floats are added, and ratios of times."""


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the file.

    Args:
        suite: the suite's name.
        settings: its tables that decide what is measured.
        device_class: of the machine, see :func:`device_class`.
        environment: the facts that :func:`compared` selects.
        commit: of the code that was measured.
        reason: why the baseline was written.
        cells: facts by cell id.
        schema: of the file.
    """

    suite: str
    settings: dict[str, Any]
    device_class: str
    environment: dict[str, str]
    commit: str
    reason: str
    cells: dict[str, Facts]
    schema: int = SCHEMA


def baseline_of(info: RunInfo, facts: Mapping[str, Facts], reason: str) -> Baseline:
    """The baseline that a run gives.

    Raises:
        UsageError: there is no reason, a cell failed or is missing, or an exact figure differed between repeats.
    """
    if not reason.strip():
        raise UsageError("a baseline needs a reason", remedy='say why it changes: --reason "fewer operators in decode"')
    missing = [cell for cell in info.cells if cell not in facts]
    failed = [cell for cell, fact in facts.items() if fact.status == "failed"]
    unstable = [f"{row.cell} ({row.header}: {row.reason})" for fact in facts.values() for row in fact.unstable]
    for what, cells in (("have no row", missing), ("failed", failed), ("are not exact", unstable)):
        if cells:
            raise UsageError(
                f"{len(cells)} cells of the run {what}",
                why=", ".join(cells[:3]),
                remedy="make the suite run cleanly first",
            )
    environment = compared(info.environment)
    settings = {key: info.suite.get(key) for key in SETTINGS}
    commit = _commit(info.environment) or "unknown"
    return Baseline(
        info.name, settings, device_class(info.environment), environment, commit, reason.strip(), dict(facts)
    )


def path_of(suite: str, device: str, folder: Path = FOLDER) -> Path:
    """The file of the baseline of a suite and a device class."""
    return folder / _slug(suite) / f"{_slug(device)}.json"


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes a baseline as sorted, indented JSON."""
    table = _short(finite(msgspec.to_builtins(baseline)))
    text = json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomic(path, text.encode() + b"\n")


def read_baseline(path: Path) -> Baseline:
    """Reads a baseline.

    Raises:
        RecordError: the file is missing, is damaged, or has a later schema.
    """
    remedy = 'write one with d2obench baseline update --suite SUITE --reason "first baseline"'
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Baseline)
    except OSError as problem:
        raise RecordError(
            f"can't read the baseline {path}", why=problem.strerror or str(problem), remedy=remedy
        ) from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise RecordError(f"{path} is not a baseline", why=str(problem), remedy=remedy) from None
    if found.schema > SCHEMA:
        raise RecordError(
            f"{path} has schema {found.schema}", why=f"this version reads up to {SCHEMA}", remedy="update d2obench"
        )
    return found


def judge_run(
    info: RunInfo,
    facts: Mapping[str, Facts],
    baseline: Baseline,
    source: str,
    tolerance: Mapping[str, float],
    kinds: Collection[str] = KINDS,
) -> Verdicts:
    """Judges a run by a baseline.

    Args:
        info: of the run.
        facts: of the run, by cell id.
        baseline: the baseline.
        source: where the baseline comes from, for the reader.
        tolerance: the suite's tolerances by metric.
        kinds: of figures to judge.
    """
    # 1. whether the two can be compared: the same settings and the same environment
    title = f"gate {info.name}"
    device = device_class(info.environment)
    update = f'd2obench baseline update --suite {info.name} --reason "…"'
    apart = differences(_filled(baseline.settings), _filled(info.suite))
    rows = [
        Row("*", "suite", Verdict.INCOMPARABLE, "exact", reason=f"the suites differ: {', '.join(apart)}")
    ] if apart else []  # fmt: skip
    before = {**baseline.environment, "device class": baseline.device_class}
    after = {**compared(info.environment), "device class": device}
    mine, theirs = ({key: facts.get(key) for key in PROCESSOR} for facts in (before, after))
    other = differences(mine, theirs)
    moved = [line for line in differences(before, after) if line not in other]
    if moved:
        rows.append(
            Row("*", "environment", Verdict.INCOMPARABLE, "exact", reason=f"other surroundings: {', '.join(moved)}")
        )
    base = f"{source} ({baseline.commit})"
    head = _commit(info.environment) or info.started
    if rows:
        return gather(title, base, head, rows, commands=[update])
    # 2. every figure of every cell; on another processor, what depends on it is left out
    cells = dict.fromkeys([*baseline.cells, *facts])
    rows = [row for cell in cells for row in judge_facts(cell, baseline.cells.get(cell), facts.get(cell), tolerance)]
    rows = of_kinds(rows, kinds)
    notes = []
    if other:
        rows = [row for row in rows if row.metric != "tokens_digest" and row.kind != "ratio"]
        notes.append(f"greedy tokens and ratios were not compared, as the processor differs: {', '.join(other)}")
    # 3. notes, and the command that writes the baseline anew if anything changed
    found = gather(title, base, head, rows)
    notes += [f"the baseline was set because: {baseline.reason}"]
    better = found.of(Verdict.IMPROVED)
    if better:
        notes.append(f"{len(better)} figures are better than the baseline: tighten it")
    commands = [update] if found.of(Verdict.REGRESSED, Verdict.INCOMPARABLE, Verdict.IMPROVED) else []
    return gather(title, base, head, rows, notes, commands)


def differences(base: Any, head: Any, path: str = "") -> list[str]:
    """A line such as ``axes.model: ["a"] → ["b"]`` for every value that differs between two nested tables."""
    if isinstance(base, Mapping) and isinstance(head, Mapping):
        keys: Iterable[str] = sorted({*base, *head})
        return [line for key in keys for line in differences(base.get(key), head.get(key), f"{path}.{key}".lstrip("."))]
    before, after = (json.dumps(msgspec.to_builtins(value), ensure_ascii=False) for value in (base, head))
    return [] if before == after else [f"{path}: {before[:80]} → {after[:80]}"]


def settings_of(suite: Suite) -> dict[str, Any]:
    """The tables of a suite that decide what is measured."""
    return {key: msgspec.to_builtins(getattr(suite, key)) for key in SETTINGS}


def _filled(table: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings, completed with the defaults of keys that were added later. Settings that this version can't read
    are returned as they are."""
    stored = {key: table[key] for key in SETTINGS if table.get(key) is not None}
    try:
        return settings_of(msgspec.convert({"name": "", "about": "", **stored}, Suite))
    except msgspec.ValidationError:
        return {key: table.get(key) for key in SETTINGS}


def compared(environment: Mapping[str, Any]) -> dict[str, str]:
    """The facts of the environment that stored figures depend on.

    On a CPU, all builds of one torch version (``+cpu``, ``+cu130``) count as equal, because they compute the same.
    """
    found = {key: str(environment[key]) for key in (*COMPARED, *PROCESSOR) if environment.get(key) is not None}
    if found.get("device") == "cpu" and "torch" in found:
        found["torch"] = found["torch"].partition("+")[0]
    return found


def device_class(environment: Mapping[str, Any]) -> str:
    """The class of a machine, such as ``nvidia-h200`` or ``cpu-x86_64``. Byte counts are equal within a class."""
    gpu = environment.get("gpu")
    return _slug(str(gpu)) if gpu else f"cpu-{_slug(str(environment.get('machine') or 'unknown'))}"


def _commit(environment: Mapping[str, Any]) -> str:
    """The commit, such as ``805772cd87e9``, with ``+dirty`` if files differed from it; empty if it is unknown."""
    commit = str(environment.get("commit") or "")[:12]
    return f"{commit}+dirty" if commit and environment.get("dirty") else commit


def _short(value: Any) -> Any:
    """Rounds all floats in nested dictionaries and lists to ten digits, which is finer than any rule distinguishes."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.").lower() or "unknown"
