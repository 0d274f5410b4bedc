"""What a cell leaves for a gate: its figures sorted by statistical kind, and the judgement of two such sets.

Facts come from a run's record, from a committed baseline or from one arm of an A/B run, and are judged alike. Timed
figures are never among them: those are only compared inside one interleaved run.
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
    tolerance,
)
from d2obench.gate.verdict import Row, Verdict
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
"""Field of a raw round → the exact figure it must give in every round of a run."""


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """One cell.

    Args:
        status: the record's.
        exact: figure by metric (or ``kept_layers``, ``tokens_digest``).
        bounded: value by metric.
        ratio: paired ratio with its interval by metric.
        sampled: metric → item id → value.
        clusters: item id → document, of items that are not documents themselves.
        unstable: rows on exact figures that differed between repeats; never stored.
    """

    status: str = "ok"
    exact: dict[str, float | str | tuple[float, ...]] = {}
    bounded: dict[str, float] = {}
    ratio: dict[str, Value] = {}
    sampled: dict[str, dict[str, float]] = {}
    clusters: dict[str, str] = {}
    unstable: tuple[Row, ...] = ()


def facts_of(cell: str, status: str, values: Mapping[str, Value], samples: Mapping[str, Any]) -> Facts:
    """Sorts a cell's figures and raw samples (``rounds`` or ``items``, as a run keeps them) by kind."""
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
    """Facts by cell id, ``to_streaming`` among the ratios; a cell that did not end well has only its status."""
    found = {}
    for cell in run.cells:
        samples = read_samples(run.path, cell) if cell.status == "ok" else {}
        values = {**cell.values, **_to_streaming(run, cell, samples)}
        found[cell.id] = facts_of(cell.id, cell.status, values, samples)
    return found


def _to_streaming(run: Run, cell: CellRecord, samples: dict[str, Any]) -> dict[str, Value]:
    """The cell's decode time against streaming's at the same budget, round by round."""
    partner = next((other for other in run.cells if _is_streaming_of(other, cell)), None)
    if partner is None or cell.axes.task != SPEED or cell.status != "ok":
        return {}
    found = ratio("to_streaming", samples, read_samples(run.path, partner))
    return {} if found is None else {"to_streaming": found}


def _is_streaming_of(other: CellRecord, cell: CellRecord) -> bool:
    """Whether ``other`` is streaming where everything but the policy is like in ``cell``."""
    same = ("task", "model", "dtype", "device", "budget", "shape", "batch", "seed")
    alike = all(getattr(other.axes, key) == getattr(cell.axes, key) for key in same)
    return alike and other.axes.policy == STREAMING != cell.axes.policy


def items_of(items: Any) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Per-item figures by metric, and the documents of items that are parts of one.

    A list (one number a position) counts by its mean.
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
        cell: its id.
        base, head: its figures on both sides; None where one side has no such cell.
        overrides: the suite's tolerances.
        both_measured: the base's ratios are another run's, with noise of their own, not a committed baseline.
        comparisons: rows of the whole comparison that rest on intervals; see ``d2obench.stats.claims``.
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
    """A cell that no longer ends well is a regression, one that now does an improvement; two failures tell nothing."""
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
    """A figure as it is judged: tokens by layer and sequence become tokens by layer."""
    if isinstance(value, list | tuple):
        return tuple(float(sum(layer)) if isinstance(layer, list | tuple) else float(layer) for layer in value)
    return value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
