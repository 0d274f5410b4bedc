"""Comparisons of finished measurements: of two cells by their facts, and of two runs cell by cell.

The facts of a cell are its figures sorted by statistical kind. They come from a run's record, from a committed baseline
or from one side of a gate, and are judged in the same way. Timed figures are not among them, because times can only be
compared within one run whose rounds take turns.

Two runs that were made at different times are judged by what the machine can't change: bytes, counts, quality, and
ratios of caches that took turns inside each run. Their times and rates are shown side by side without a verdict. On
different machines, peaks of memory are incomparable as well. Cells that only one run has are mentioned in a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from d2obench.gate.rules import (
    judge_bounded,
    judge_exact,
    judge_ratio,
    judge_ratios,
    judge_repeats,
    judge_sampled,
    missing,
    side_by_side,
    tolerance,
)
from d2obench.gate.verdict import Row, Verdict, Verdicts, gather
from d2obench.measure.environment import differences
from d2obench.metric import METRICS
from d2obench.record import CellRecord, Run, Value, read_samples
from d2obench.stats.ratios import STREAMING, ratio
from d2obench.suite.definition import SPEED

REPEATED = {
    "kv_bytes": "kv_bytes",
    "kv_prompt_bytes": "kv_prompt_bytes",
    "state_bytes": "state_bytes",
    "kept": "kept_layers",
    "tokens_digest": "tokens_digest",
}
"""Field of a raw round → the exact figure that it must equal in every round of a run."""
LATER = "measured at another time: the machine may have changed"


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """The figures of one cell, by statistical kind.

    Args:
        status: of the cell's record.
        exact: figure by metric, or by ``kept_layers`` and ``tokens_digest``.
        bounded: figure by metric.
        ratio: paired ratio with its interval, by metric.
        sampled: metric → item id → figure.
        clusters: item id → document, for items that are parts of a document.
        unstable: a row for each exact figure that differed between repeats; these are not stored.
    """

    status: str = "ok"
    exact: dict[str, float | str | tuple[float, ...]] = {}
    bounded: dict[str, float] = {}
    ratio: dict[str, Value] = {}
    sampled: dict[str, dict[str, float]] = {}
    clusters: dict[str, str] = {}
    unstable: tuple[Row, ...] = ()


def facts_of(cell: str, status: str, values: Mapping[str, Value], samples: Mapping[str, Any]) -> Facts:
    """Sorts a cell's figures and raw samples by kind; ``samples`` holds ``rounds`` or ``items``, as stored."""
    exact: dict[str, Any] = {}
    bounded, ratio = {}, {}
    for key, value in values.items():
        kind = METRICS[key].kind if key in METRICS else "info"
        if value.value is None:
            continue
        if kind == "exact":
            exact[key] = value.value
        elif kind == "bounded":
            bounded[key] = value.value
        elif kind == "ratio":
            ratio[key] = value
    rounds = [part for part in samples.get("rounds") or () if isinstance(part, dict)]
    unstable = []
    for field, key in REPEATED.items():
        repeats = [_figure(part[field]) for part in rounds if part.get(field) is not None]
        row = judge_repeats(cell, key, repeats)
        if row:
            unstable.append(row)
        if repeats and repeats[0] != ():
            exact.setdefault(key, repeats[0])
    sampled, clusters = items_of(samples.get("items") or ())
    return Facts(status, exact, bounded, ratio, sampled, clusters, tuple(unstable))


def facts_of_run(run: Run) -> dict[str, Facts]:
    """The facts of a run by cell id, including the ratio ``to_streaming``; a cell that failed has only its status."""
    found = {}
    for cell in run.cells:
        samples = read_samples(run.path, cell) if cell.status == "ok" else {}
        values = {**cell.values, **_to_streaming(run, cell, samples)}
        found[cell.id] = facts_of(cell.id, cell.status, values, samples)
    return found


def _to_streaming(run: Run, cell: CellRecord, samples: dict[str, Any]) -> dict[str, Value]:
    """The cell's decode speed relative to StreamingLLM at the same budget, paired by round."""
    partner = next((other for other in run.cells if _is_streaming_of(other, cell)), None)
    if partner is None or cell.axes.task != SPEED or cell.status != "ok":
        return {}
    found = ratio("to_streaming", samples, read_samples(run.path, partner))
    return {} if found is None else {"to_streaming": found}


def _is_streaming_of(other: CellRecord, cell: CellRecord) -> bool:
    """Whether ``other`` is the cell of StreamingLLM that differs from ``cell`` only in its policy."""
    same = ("task", "model", "dtype", "device", "budget", "shape", "batch", "seed")
    alike = all(getattr(other.axes, key) == getattr(cell.axes, key) for key in same)
    return alike and other.axes.policy == STREAMING != cell.axes.policy


def items_of(items: Any) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The figures of items by metric and item id, and the document of each item that is part of one.

    A list, which holds one number for each position, counts as its mean.
    """
    sampled: dict[str, dict[str, float]] = {}
    clusters: dict[str, str] = {}
    for item in items:
        if not isinstance(item, dict) or "id" not in item:
            continue
        name = str(item["id"])
        figures = {key: value for key, value in item.items() if key in METRICS and METRICS[key].kind == "sampled"}
        if _number(item.get("gold_logprob")) and item.get("gold_bytes"):
            figures["gold_bpb"] = -item["gold_logprob"] / math.log(2) / item["gold_bytes"]
        for key, value in figures.items():
            numbers = value if isinstance(value, list) else [value]
            if numbers and all(map(_number, numbers)):
                sampled.setdefault(key, {})[name] = math.fsum(numbers) / len(numbers)
                if str(item.get("document", name)) != name:
                    clusters[name] = str(item["document"])
    return sampled, clusters


def judge_facts(
    cell: str,
    base: Facts | None,
    head: Facts | None,
    overrides: Mapping[str, float] | None = None,
    *,
    both_measured: bool = False,
    comparisons: int = 1,
) -> list[Row]:
    """One row for every figure that either side has.

    Args:
        cell: the cell's id.
        base, head: its facts on both sides; None if that side has no such cell.
        overrides: the suite's tolerances by metric.
        both_measured: whether the base's ratios were measured in another run and so have noise of their own; those of
            a committed baseline count as exact.
        comparisons: number of rows of the whole comparison that are based on intervals; see
            :mod:`d2obench.stats.claims`.
    """
    if base is None or head is None:
        return [missing(cell, "status", "exact", base.status if base else None, head.status if head else None)]
    if base.status != "ok" or head.status != "ok":
        return [judge_status(cell, base.status, head.status)]
    unstable = [*base.unstable, *head.unstable]
    rows = [*unstable]
    skip = {row.metric for row in unstable}
    for key in _both(base.exact, head.exact):
        if key not in skip:
            rows.append(judge_exact(cell, key, base.exact.get(key), head.exact.get(key)))
    for key in _both(base.bounded, head.bounded):
        limit = tolerance(key, overrides)
        rows.append(judge_bounded(cell, key, base.bounded.get(key), head.bounded.get(key), limit))
    for key in _both(base.ratio, head.ratio):
        stored = base.ratio.get(key)
        limit = tolerance(key, overrides)
        if both_measured:
            rows.append(judge_ratios(cell, key, stored, head.ratio.get(key), limit, comparisons))
        else:
            rows.append(judge_ratio(cell, key, stored.value if stored else None, head.ratio.get(key), limit))
    for key in _both(base.sampled, head.sampled):
        before, after = base.sampled.get(key, {}), head.sampled.get(key, {})
        limit = tolerance(key, overrides)
        clusters = base.clusters or head.clusters
        rows.append(judge_sampled(cell, key, before, after, limit, clusters, comparisons=comparisons))
    return rows


def judge_status(cell: str, base: str, head: str, reason: str = "") -> Row:
    """The row of a cell that ended badly on at least one side.

    It is a regression if only the head failed, an improvement if only the base failed, and incomparable if both did.
    """
    if base == head and base in ("oom", "skipped"):
        return Row(cell, "status", Verdict.OK, "exact", base, head, reason=reason)
    if base == "ok":
        verdict = Verdict.OK if head == "ok" else Verdict.REGRESSED
    else:
        verdict = Verdict.IMPROVED if head == "ok" else Verdict.INCOMPARABLE
    return Row(cell, "status", verdict, "exact", base, head, reason=reason)


def _both(base: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*base, *head]))


def _figure(value: Any) -> Any:
    """A figure in the form in which it is judged: tokens by layer and sequence are summed to tokens by layer."""
    if isinstance(value, list | tuple):
        return tuple(float(sum(layer)) if isinstance(layer, list | tuple) else float(layer) for layer in value)
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def compare_runs(base: Run, head: Run) -> Verdicts:
    """Compares two finished runs: every figure of every cell that both have.

    Raises:
        UsageError: no cell is in both.
    """
    # 1. whether the two were made on the same machine
    before, after = facts_of_run(base), facts_of_run(head)
    apart = differences(base.info.environment, head.info.environment)
    machine = ", ".join(f"{key}: {a} → {b}" for key, (a, b) in apart.items())
    # 2. the figures of the cells that both have
    timed = {cell.id: cell for cell in base.cells}
    comparisons = sum(len(one.ratio) + len(one.sampled) for name, one in after.items() if name in before) or 1
    rows: list[Row] = []
    for cell in head.cells:
        if cell.id in before:
            facts = before[cell.id], after[cell.id]
            rows += judge_facts(cell.id, *facts, both_measured=True, comparisons=comparisons)
            rows += _times(timed[cell.id], cell, f"another machine: {machine}" if machine else LATER)
    if machine:
        rows = [_elsewhere(row, machine) if row.kind == "bounded" else row for row in rows]
    # 3. notes on the files, on the machines, and on cells that only one of them has
    names = [run.path.name for run in (base, head)]
    notes = [f"{warning} ({name})" for name, run in zip(names, (base, head), strict=True) for warning in run.warnings]
    if machine:
        notes.append(f"the machines differ: {machine}")
    for name, mine, other in ((names[0], before, after), (names[1], after, before)):
        alone = [cell for cell in mine if cell not in other]
        if alone:
            notes.append(f"{len(alone)} cells are in {name} only, for example {alone[0]}")
    return gather("compare", names[0], names[1], rows, notes)


def _times(base: CellRecord, head: CellRecord, reason: str) -> list[Row]:
    if base.status != "ok" or head.status != "ok":
        return []
    keys = [key for key in base.values if key in METRICS and METRICS[key].kind == "timed" and key in head.values]
    pairs = [(key, base.values[key], head.values[key]) for key in keys]
    return [side_by_side(head.id, key, a, b, reason) for key, a, b in pairs if a.value and b.value]


def _elsewhere(row: Row, machine: str) -> Row:
    return msgspec.structs.replace(row, verdict=Verdict.INCOMPARABLE, reason=f"other machine: {machine}")
