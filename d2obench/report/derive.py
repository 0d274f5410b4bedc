"""Figures computed from the raw samples after a run: comparisons of two cells, and scores computed again.

Two cells are compared if they differ only in policy and budget: quality with the full cache's, speed with other caches,
D2O with its rivals, which are other policies at the same budget, and a policy that merges by mass with itself without
that. Differences of quality are paired on the items that both cells have, with documents as clusters; ratios are paired
on samples that were measured beside each other (:mod:`d2obench.stats.ratios`). A figure that the record already holds
is never replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import RecordError
from d2obench.metric import METRICS, Metric
from d2obench.policies import LIBRARY_CACHES
from d2obench.record import CellRecord, Run, Value, append_cell, read_run, read_samples
from d2obench.report.rows import Result, yardstick
from d2obench.stats.claims import least
from d2obench.stats.intervals import mean, paired_difference
from d2obench.stats.ratios import FULL, STREAMING, ratio

OURS, RIVAL = "d2o", "_rival"
MAX_RIVALS = 8
Samples = dict[str, Any]


def results(runs: Sequence[tuple[str, Run]]) -> list[Result]:
    """Every cell of every run, in order, with its derived figures; ``runs`` are pairs of the name shown and the run."""
    found: dict[int, Result] = {}
    for name, run in runs:
        groups: dict[tuple[Any, ...], list[CellRecord]] = {}
        for cell in run.cells:
            groups.setdefault(yardstick(cell.axes), []).append(cell)
        for group in groups.values():
            for cell, values in _group(run, group):
                found[id(cell)] = Result(run, name, cell, values)
    return [found[id(cell)] for _, run in runs for cell in run.cells]


def metric_of(key: str) -> Metric | None:
    """The metric of a figure; the metric of ``kl_rival:h2o`` is ``kl_rival``. None if it is unknown."""
    return METRICS.get(key.partition(":")[0])


def _group(run: Run, group: Sequence[CellRecord]) -> list[tuple[CellRecord, dict[str, Value]]]:
    """Cells that differ only in policy and budget, each with its figures; the samples of one group are in memory at a
    time."""
    good = [cell for cell in group if cell.status == "ok"]
    kinds = [cell.axes.policy for cell in good]
    compared = any(name in (FULL, STREAMING) or without_mass(name) != name for name in kinds) or any(map(_ours, good))
    needed = len(good) > 1 and compared
    samples = {cell.id: read_samples(run.path, cell) for cell in good} if needed else {}
    done = []
    for cell in group:
        derived = _ceiling(cell) if cell.status == "ok" else {}
        if cell.id in samples:
            derived |= _ratios(cell, good, samples)
            derived |= _differences(cell, good, samples)
        done.append((cell, derived | cell.values))
    return done


def _ours(cell: CellRecord) -> bool:
    return cell.axes.policy.split("(")[0].split("+")[0] == OURS


def _rivals(cell: CellRecord, good: Sequence[CellRecord]) -> list[CellRecord]:
    """What a cell is compared with, at the same budget: other policies for a cell of D2O, and the policy without its
    merge by mass for one that has it."""
    if not cell.axes.budget:
        return []
    alike = [other for other in good if other.axes.budget == cell.axes.budget and other is not cell]
    others = [other for other in alike if not _ours(other)][:MAX_RIVALS] if _ours(cell) else []
    plain = without_mass(cell.axes.policy)
    return others + [other for other in alike if other.axes.policy == plain != cell.axes.policy and other not in others]


def without_mass(policy: str) -> str:
    """A policy without its merge by mass: ``h2o`` of ``h2o(merge=mass,equal=bytes)``; the same text if it has none."""
    if "merge=mass" not in policy:
        return policy
    text = re.sub(r",?\b(merge=mass|equal=bytes)\b", "", policy)
    return text.replace("(,", "(").replace("()", "")


def _ceiling(cell: CellRecord) -> dict[str, Value]:
    """The decode rate if a step did nothing but move its bytes: the measured rate divided by the share of the bandwidth
    that was reached."""
    rate, share = (cell.values[key].value if key in cell.values else None for key in ("decode_tok_s", "mbu"))
    return {"ceiling_tok_s": Value(rate / share)} if rate and share else {}


def _ratios(cell: CellRecord, good: Sequence[CellRecord], samples: Mapping[str, Samples]) -> dict[str, Value]:
    """The ratios that the runner does not record. A cell with batch ``max`` has none, because its batch is its own."""
    if cell.axes.batch == "max":
        return {}
    policy, mine = cell.axes.policy, samples[cell.id]
    found: dict[str, Value | None] = {}
    for other in good:
        if other.axes.policy == STREAMING != policy and other.axes.budget == cell.axes.budget:
            found["to_streaming"] = ratio("to_streaming", mine, samples[other.id])
        if other.axes.policy == FULL != policy:
            found["prefill_peak_cost"] = ratio("prefill_peak_cost", mine, samples[other.id])
    for other in _rivals(cell, good):
        found[f"decode_rival:{other.axes.policy}"] = ratio("decode_rival", mine, samples[other.id])
    if policy == FULL:
        found["to_library"] = _fastest_library(cell, good, samples)
    return {key: value for key, value in found.items() if value is not None}


def _fastest_library(cell: CellRecord, good: Sequence[CellRecord], samples: Mapping[str, Samples]) -> Value | None:
    """Decode speed of the full cache relative to the fastest of the library's own caches.

    Which of them is fastest is decided by the same measurements, so all of the ratios count as comparisons.
    """
    rivals = {other.axes.policy: samples[other.id] for other in good if other.axes.policy in LIBRARY_CACHES}
    named = {name: ratio("to_library", samples[cell.id], theirs) for name, theirs in rivals.items()}
    known = {name: value for name, value in named.items() if value and value.value}
    if not known:
        return None
    best = min(known, key=lambda name: known[name].value or math.inf)
    note = f"The fastest of {', '.join(rivals)} is {best}."
    return msgspec.structs.replace(least(list(known.values())), note=note)


def _differences(cell: CellRecord, good: Sequence[CellRecord], samples: Mapping[str, Samples]) -> dict[str, Value]:
    """The cell's quality minus the full cache's (``score_diff``) and minus each rival's (``kl_rival:h2o``)."""
    found: dict[str, Value] = {}
    full = next((other for other in good if other.axes.policy == FULL), None)
    if full is not None and full is not cell:
        found |= _items(samples[cell.id], samples[full.id], ("score", "gold_bpb"), "_diff")
        found |= _length_drift(samples[cell.id], samples[full.id])
    for rival in _rivals(cell, good):
        values = _items(samples[cell.id], samples[rival.id], ("kl", "score", "gold_bpb"), RIVAL)
        found |= {f"{key}:{rival.axes.policy}": value for key, value in values.items()}
    return found


def _items(mine: Samples, theirs: Samples, metrics: Sequence[str], suffix: str) -> dict[str, Value]:
    """The mean difference of each metric, on the items and on the positions within an item that both cells have."""
    base = {item.get("id"): item for item in _dicts(theirs.get("items"))}
    pairs = [(base[item["id"]], item) for item in _dicts(mine.get("items")) if item.get("id") in base]
    found = {}
    for metric in metrics:
        before: list[float] = []
        after: list[float] = []
        clusters: list[str] = []
        for one, other in pairs:
            a, b = _flat(one.get(metric)), _flat(other.get(metric))
            if len(a) == len(b):
                before, after = before + a, after + b
                clusters += [str(other.get("document", other["id"]))] * len(a)
        if before:
            bounded = METRICS[metric].unit == "%"
            found[metric + suffix] = paired_difference(before, after, clusters, bounded=bounded)
    return found


def _length_drift(mine: Samples, theirs: Samples) -> dict[str, Value]:
    """Tokens of long answers ÷ those with the full cache. With R the ratio of the two sums, the interval is that of
    the mean of ``R + (m − R·t) ÷ mean(t)`` over the pairs (m, t) of lengths."""
    base = {item.get("id"): item for item in _dicts(theirs.get("items"))}
    pairs = [
        (float(item["generated"]), float(other["generated"]))
        for item in _dicts(mine.get("items"))
        if "repeated" in item and (other := base.get(item.get("id"))) and "generated" in other
    ]
    whole = sum(length for _, length in pairs)
    if not whole:
        return {}
    ratio = sum(length for length, _ in pairs) / whole
    parts = [ratio + (own - ratio * length) * len(pairs) / whole for own, length in pairs]
    return {"length_drift": mean(parts, ends=(0.0, math.inf))}


def _dicts(parts: Any) -> list[dict[str, Any]]:
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _flat(value: Any) -> list[float]:
    """A figure of an item as a list of finite numbers; empty if it is anything else."""
    values = value if isinstance(value, list) else [value]
    good = all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    return [float(x) for x in values] if good else []


def rescore(folder: Path) -> list[str]:
    """Computes the scores of every quality cell again from its recorded answers, without the model.

    A cell whose scores change is appended to ``cells.jsonl``, where the last record of a cell is the valid one. Figures
    that are not computed from items, such as KV bytes, stay as they are.

    Returns: the ids of the cells that changed.

    Raises:
        RecordError: the items of a cell can't be scored.
    """
    from d2obench import tasks

    changed = []
    for cell in read_run(folder).cells:
        items = read_samples(folder, cell).get("items")
        if cell.status != "ok" or not isinstance(items, list) or not items:
            continue
        try:
            values = cell.values | tasks.rescore(cell.axes.task, items)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            why = f"{type(problem).__name__}: {problem}"
            raise RecordError(
                f"the items of {cell.id} can't be scored", why=why, remedy="report without --rescore"
            ) from None
        if values != cell.values:
            append_cell(folder, msgspec.structs.replace(cell, values=values))
            changed.append(cell.id)
    return changed
