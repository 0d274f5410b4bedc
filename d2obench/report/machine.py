"""The machine card, the roofline of decode steps, the environment, and the suite and command to run a run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from d2obench.metric import METRICS, show
from d2obench.record import Run
from d2obench.report.rows import Row
from d2obench.report.tables import table_of
from d2obench.report.view import Column, Field, Table, show_value, value_column
from d2obench.suite.definition import SPEED

ROOFLINE = (
    "weights_bytes",
    "kv_bytes",
    "kv_step_bytes",
    "step_bytes",
    "decode_tok_s",
    "ceiling_tok_s",
    "mbu",
    "speedup",
    "speedup_bound",
    "speedup_largest",
)
"""Columns of the roofline table."""
CARD = (
    "cpu",
    "gpu",
    "device",
    "cores",
    "threads",
    "memory",
    "bandwidth",
    "power",
    "clock",
    "governor",
    "torch",
    "transformers",
)
"""Words that occur in the names of the facts on the machine card."""
SAMPLING = "samplers of memory and power"
MEASURED = ("started", SAMPLING)
"""Facts that differ between any two runs and therefore are not marked as different."""
MAX_TEXT = 300
"""Characters of one fact."""


def cards(runs: Sequence[tuple[str, Run]], rows: Sequence[Row]) -> tuple[Table, ...]:
    """The facts of the machine that figures depend on, and the table that compares each row with the speed that its
    memory traffic allows."""
    return (*_card(runs), *_roofline(rows))


def _card(runs: Sequence[tuple[str, Run]]) -> list[Table]:
    flat = [_flat(run.info.environment) for _, run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for facts in flat for key in facts)
        if any(word in key.lower() for word in CARD)
    ]
    overheads = [_sampling(run) for _, run in runs]
    if any(overheads):
        flat = [facts | ({SAMPLING: text} if text else {}) for facts, text in zip(flat, overheads, strict=True)]
        keys.append(SAMPLING)
    return [_facts("Machine", runs, flat, keys)] if keys else []


def _sampling(run: Run) -> str:
    """What sampling memory and power cost during the measurements: ``0.4 % of one core, at most 0.9``."""
    found = [cell.values["sampler_overhead"] for cell in run.cells if "sampler_overhead" in cell.values]
    known = [one.value for one in found if one.value is not None]
    if not known:
        return ""
    middle, most = show("sampler_overhead", median(known), unit=True), show("sampler_overhead", max(known))
    return middle if len(known) == 1 else f"{middle}, at most {most}"


def environment(runs: Sequence[tuple[str, Run]]) -> tuple[Table, ...]:
    """Every fact of every run's environment; if there are several runs, facts that differ are marked."""
    flat = [_flat(run.info.environment) for _, run in runs]
    for facts, (_, run) in zip(flat, runs, strict=True):
        facts["d2obench"], facts["suite"], facts["started"] = (
            run.info.version,
            run.info.suite_digest[:12],
            run.info.started,
        )
    return (_facts("Environment", runs, flat, list(dict.fromkeys(key for facts in flat for key in facts))),)


def unlike(runs: Sequence[tuple[str, Run]]) -> tuple[str, ...]:
    """A warning if the runs of one report were made in different environments."""
    if len({run.info.environment_hash for _, run in runs}) < 2:
        return ()
    flat = [_flat(run.info.environment) for _, run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for facts in flat for key in facts)
        if len({facts.get(key) for facts in flat}) > 1
    ]
    differ = ", ".join(keys[:8]) + (" and more" if len(keys) > 8 else "")
    return (
        f"These runs were made in unlike environments ({differ or 'by their hash'}): "
        "their times can't be compared with each other.",
    )


def suites(runs: Sequence[tuple[str, Run]]) -> tuple[tuple[str, str], ...]:
    """Pairs of a run and its resolved suite as TOML."""
    return tuple((name, toml(run.info.suite)) for name, run in runs)


def again(runs: Sequence[tuple[str, Run]]) -> tuple[str, ...]:
    """The commands that made the runs, each once."""
    return tuple(dict.fromkeys(shlex.join(run.info.command) for _, run in runs if run.info.command))


def toml(table: Mapping[str, Any], path: str = "") -> str:
    """A table as TOML: plain values first, then sub-tables. None is left out, because TOML can't express it."""
    lines = [
        f"{_name(key)} = {_toml(value)}"
        for key, value in table.items()
        if not isinstance(value, dict) and value is not None
    ]
    for key, value in table.items():
        if isinstance(value, dict) and value:
            name = f"{path}{_name(key)}"
            lines += ["", f"[{name}]", toml(value, f"{name}.")]
    return "\n".join(lines)


def _roofline(rows: Sequence[Row]) -> list[Table]:
    known = [row for row in rows if row.value(SPEED, "step_bytes") or row.value(SPEED, "mbu")]
    metrics = [metric for metric in ROOFLINE if any(row.value(SPEED, metric) for row in known)]
    if not known or not metrics:
        return []
    note = (
        "A decode step has to read the weights once and the KV cache of every sequence; "
        "the copy bandwidth measured in this run bounds how fast."
    )
    columns = [value_column(METRICS[metric]) for metric in metrics]

    def figures(row: Row) -> list[Field]:
        return [show_value(metric, row.value(SPEED, metric)) for metric in metrics]

    return [table_of("Roofline of a decode step", known, columns, figures, notes=(note,))]


def _facts(
    title: str, runs: Sequence[tuple[str, Run]], flat: Sequence[Mapping[str, str]], keys: Sequence[str]
) -> Table:
    columns = [Column("fact", "", numeric=False)] + [
        Column(f"run{i}", name, numeric=False) for i, (name, _) in enumerate(runs)
    ]
    body = []
    for key in keys:
        values = [facts.get(key, "–") for facts in flat]
        mark = "warn" if len(set(values)) > 1 and key not in MEASURED else ""
        body.append((Field(key), *(Field(value, mark=mark) for value in values)))  # type: ignore[arg-type]
    return Table(title, tuple(columns), tuple(body))


def _flat(facts: Any, path: str = "") -> dict[str, str]:
    """Nested facts as a flat table from ``a.b`` to text; long texts are cut."""
    if isinstance(facts, dict):
        return {
            key: text
            for name, value in sorted(facts.items())
            for key, text in _flat(value, f"{path}.{name}" if path else str(name)).items()
        }
    if isinstance(facts, list | tuple):
        facts = ", ".join(str(value) for value in facts)
    if path.endswith("_bytes") and isinstance(facts, int | float):
        return {path.removesuffix("_bytes"): f"{facts / 2**30:.1f} GiB"}
    text = {True: "yes", False: "no", None: "–"}[facts] if facts is None or isinstance(facts, bool) else str(facts)
    return {path: text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"}


def _name(key: Any) -> str:
    text = str(key)
    return text if text and all(char.isascii() and (char.isalnum() or char in "-_") for char in text) else _toml(text)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_name(key)} = {_toml(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, int | float):
        return repr(value)
    escaped = "".join(
        char if char.isprintable() and char not in '"\\' else "\\" + char if char in '"\\' else f"\\U{ord(char):08x}"
        for char in str(value)
    )
    return f'"{escaped}"'
