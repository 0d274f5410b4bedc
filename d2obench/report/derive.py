"""What follows from two cells: quality against the full cache, D2O against its rivals, and the roofline's ceiling.

Differences of quality are paired on the items both cells have (documents are the clusters), ratios of speed on the
rounds both have. A figure that the record already holds is never replaced. Cells are compared within one run where
they differ in policy and budget only; a rival is another policy at D2O's own budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from d2obench.metric import METRICS, Metric
from d2obench.record import CellRecord, Run, Value, read_samples
from d2obench.report.pairs import STREAMING, pairs
from d2obench.report.rows import Entry, yardstick
from d2obench.stats.bootstrap import paired_ratio
from d2obench.stats.paired import paired_difference

FULL, OURS, RIVAL = "full", "d2o", "_rival"
MAX_RIVALS = 8
Samples = dict[str, Any]


def entries(runs: Sequence[tuple[str, Run]]) -> list[Entry]:
    """Every cell of every run, in order, with its derived figures; ``runs`` are (shown name, run)."""
    found: dict[int, Entry] = {}
    for name, run in runs:
        groups: dict[tuple[Any, ...], list[CellRecord]] = {}
        for cell in run.cells:
            groups.setdefault(yardstick(cell.axes), []).append(cell)
        for group in groups.values():
            for cell, values in _group(run, group):
                found[id(cell)] = Entry(run, name, cell, values)
    return [found[id(cell)] for _, run in runs for cell in run.cells]


def metric_of(key: str) -> Metric | None:
    """The metric of a figure; ``kl_rival:h2o`` is one of ``kl_rival``."""
    return METRICS.get(key.partition(":")[0])


def _group(run: Run, group: Sequence[CellRecord]) -> list[tuple[CellRecord, dict[str, Value]]]:
    """Cells that differ in policy and budget only, each with its figures; their samples are held together."""
    good = [cell for cell in group if cell.status == "ok"]
    needed = len(good) > 1 and any(cell.axes.policy in (FULL, STREAMING) or _ours(cell) for cell in good)
    samples = {cell.id: read_samples(run.path, cell) for cell in good} if needed else {}
    full = next((cell for cell in good if cell.axes.policy == FULL), None)
    rounds = {name: _dicts(sample.get("rounds")) for name, sample in samples.items()}
    done = []
    for cell in group:
        extra = _alone(cell) if cell.status == "ok" else {}
        if needed and cell.id in samples:
            extra |= pairs(cell, good, rounds)
            if full is not None and full is not cell:
                extra |= _items(cell.id, samples[cell.id], samples[full.id], ("score", "gold_bpb"), "_diff")
            rivals = [other for other in good if other.axes.budget == cell.axes.budget and not _ours(other)]
            for rival in rivals[:MAX_RIVALS] if _ours(cell) and cell.axes.budget else ():
                extra |= _against(cell, rival, samples)
        done.append((cell, extra | cell.values))
    return done


def _ours(cell: CellRecord) -> bool:
    return cell.axes.policy.split("(")[0].split("+")[0] == OURS


def _alone(cell: CellRecord) -> dict[str, Value]:
    """The rate at which a step would only move its bytes: the measured rate ÷ the share of the bandwidth it reached."""
    rate, share = (cell.values[key].value if key in cell.values else None for key in ("decode_tok_s", "mbu"))
    return {"ceiling_tok_s": Value(rate / share)} if rate and share else {}


def _against(cell: CellRecord, rival: CellRecord, samples: Mapping[str, Samples]) -> dict[str, Value]:
    """``kl_rival:h2o`` and the like."""
    mine, theirs = samples[cell.id], samples[rival.id]
    name = f"{cell.id}:{rival.axes.policy}"
    found = _items(name, mine, theirs, ("kl", "score", "gold_bpb"), RIVAL)
    base = {part.get("round"): part for part in _dicts(theirs.get("rounds"))}
    pairs = [(base[part["round"]], part) for part in _dicts(mine.get("rounds")) if part.get("round") in base]
    times = [(a, b) for one, other in pairs if (a := one.get("decode_s")) and (b := other.get("decode_s"))]
    if times and cell.axes.batch != "max":
        ratio = paired_ratio([b for _, b in times], [a for a, _ in times], seed=f"{name}:decode_rival")
        found["decode_rival"] = Value(*ratio, n=len(times))
    return {f"{key}:{rival.axes.policy}": value for key, value in found.items()}


def _items(name: str, mine: Samples, theirs: Samples, metrics: Sequence[str], suffix: str) -> dict[str, Value]:
    """The mean difference of each metric on the items, and positions of items, that both have."""
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
            diff = paired_difference(before, after, clusters, seed=f"{name}:{metric}{suffix}")
            found[metric + suffix] = Value(*diff, n=len(before))
    return found


def _dicts(parts: Any) -> list[dict[str, Any]]:
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _flat(value: Any) -> list[float]:
    """A figure of an item as a list of finite numbers; empty where it is none."""
    values = value if isinstance(value, list) else [value]
    good = all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    return [float(x) for x in values] if good else []
