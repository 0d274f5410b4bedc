"""Figures of memory: over time with the phases of a request, and what its peak is made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from d2obench.metric import METRICS
from d2obench.report.rows import Row
from d2obench.report.view import Figure

ALLOCATOR, RESIDENT, DEVICE = "alloc_peak_bytes", "rss_peak_bytes", "nvml_used_bytes"
PHASES = ("prefill", "compress", "decode")
MAX_PANELS, MAX_POINTS = 8, 200
Point = tuple[str | int | float | bool | None, ...]
Samples = dict[str, Any]


def timeline(timed: Sequence[tuple[Row, Samples]]) -> Figure | None:
    """Memory in the last round of each row: the device's where NVML gave it, else the process's resident set."""
    points: list[Point] = []
    phases: list[list[str | float]] = []
    metric = RESIDENT
    for row, samples in timed[:MAX_PANELS]:
        rounds = rounds_of(samples)
        line, found = _line(rounds[-1]) if rounds else ([], metric)
        if not line or not rounds[-1].get("marks"):
            continue
        metric = found
        width = -(-len(line) // MAX_POINTS)
        for start in range(0, len(line), width):
            t, memory = max(line[start : start + width], key=lambda point: point[1])
            points.append((row.key.policy, row.key.label, round(t, 4), round(memory * METRICS[metric].scale, 1)))
        phases += [[row.key.label, *span] for span in spans(rounds[-1]["marks"])]
    if not points:
        return None
    whose = "used on the device, all processes" if metric == DEVICE else "resident memory of the process"
    return Figure(
        "timeline", "timeline", f"Memory over time ({timed[0][0].key.setting})",
        f"Line: {whose}, weights included, in the last round; shaded: prefill, compress, decode.",
        ("policy", "label", "t", "memory"), tuple(points),
        {"x": "time, s", "y": f"memory, {METRICS[metric].unit}", "phases": phases, "wide": True},
    )  # fmt: skip


def _line(part: dict[str, Any]) -> tuple[list[tuple[float, float]], str]:
    """(t, bytes) of a round, and the metric it is."""
    for rows, columns, column, metric in (
        (part.get("device_timeline"), part.get("device_columns"), "used_bytes", DEVICE),
        (part.get("timeline"), part.get("timeline_columns"), "rss_bytes", RESIDENT),
    ):
        if rows and columns and column in columns:
            place = 1 + list(columns).index(column)
            line = [(row[0], row[place]) for row in rows if len(row) > place and row[place] is not None and row[0] >= 0]
            if line:
                return line, metric
    return [], RESIDENT


def spans(marks: Sequence[Sequence[Any]]) -> list[tuple[str, float, float]]:
    """(phase, from, to) of each phase; phases that take turns layer by layer are joined while they do."""
    found: dict[str, tuple[float, float]] = {}
    for (start, phase), (stop, _) in pairwise(marks):
        if stop > start and phase in PHASES:
            low, high = found.get(phase, (start, stop))
            found[phase] = (min(low, start), max(high, stop))
    return [(phase, round(low, 4), round(high, 4)) for phase, (low, high) in found.items()]


def split(group: Sequence[Row]) -> Figure | None:
    """The peak as weights, KV and what remains."""
    points: list[Point] = []
    scale, metric = METRICS["kv_bytes"].scale, RESIDENT
    for row in group:
        values = row.speed.values if row.speed else {}
        known = {key: values[key].value for key in (ALLOCATOR, RESIDENT, "weights_bytes", "kv_bytes") if key in values}
        metric = ALLOCATOR if known.get(ALLOCATOR) else RESIDENT
        peak, weights, kv = known.get(metric), known.get("weights_bytes"), known.get("kv_bytes")
        if peak is None or weights is None or kv is None:
            continue
        rest = max(0.0, peak - weights - kv)
        for order, (part, size) in enumerate((("weights", weights), ("KV", kv), ("workspace and the rest", rest))):
            points.append((row.key.policy, row.key.label, part, order, round(size * scale, 2)))
    if not points:
        return None
    return Figure(
        "peak", "peak", f"What the peak of memory is made of ({group[0].key.setting})",
        "Weights and KV as counted from their tensors; the rest of the peak is activations, workspace and the runtime.",
        ("policy", "label", "part", "order", "memory"), tuple(points), {"x": f"memory, {METRICS[metric].unit}"},
    )  # fmt: skip


def rounds_of(samples: Samples) -> list[dict[str, Any]]:
    """The rounds of a timed cell, in order."""
    parts = samples.get("rounds")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def axis_title(metric: str) -> str:
    """``TPOT, ms``: an axis title from the metric table."""
    return f"{METRICS[metric].header}, {METRICS[metric].unit}" if METRICS[metric].unit else METRICS[metric].header
