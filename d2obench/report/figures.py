"""The figures of a report as data; a figure is left out if the records lack what it needs.

:mod:`d2obench.report.charts` draws the charts from these rows, and the same rows are the table behind each figure. Raw
samples are read for the largest setting only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from d2obench.metric import METRICS
from d2obench.record import Value, read_samples
from d2obench.report.detail_figures import MAX_LINES, Point, details
from d2obench.report.evidence import MAX_FRONTS, doubtful, front, impossible
from d2obench.report.rows import Result, Row, grouped, held, kv_bytes, loss, primary, short_name, tasks_of, volume
from d2obench.report.tables import setting, varying
from d2obench.report.view import KINDS, Figure, axis_title
from d2obench.suite.definition import SPEED

MAX_SETTINGS, MAX_POINTS, MAX_BARS = 6, 64, 24
MAX_TIMELINES, MAX_TIMELINE_POINTS = 8, 200
ALLOCATOR, RESIDENT, DEVICE = "alloc_peak_bytes", "rss_peak_bytes", "nvml_used_bytes"
PHASES = ("prefill", "compress", "decode")
Samples = dict[str, Any]


def figures(found: Sequence[Result], rows: Sequence[Row]) -> list[Figure]:
    """Every figure that the records allow, in the order of the page."""
    main = _main(rows)
    timed = [(row, read_samples(row.speed.run.path, row.speed.record)) for row in main[:MAX_LINES] if row.speed]
    made: list[Figure | None] = [
        _overview(main),
        *_tradeoffs(rows),
        *_budgets(rows),
        _speedups(rows),
        _throughput(rows),
        _positions(timed),
    ]
    made += [_peak(main), _timeline(timed), *details(found)]
    return in_order(figure for figure in made if figure is not None)


def in_order(made: Iterable[Figure]) -> list[Figure]:
    """Figures in the order of the page."""
    return sorted(made, key=lambda figure: KINDS.index(figure.kind))


def _main(rows: Sequence[Row]) -> list[Row]:
    """The largest setting with timed cells."""
    groups = [[row for row in group if row.speed and row.speed.record.status == "ok"] for group in grouped(rows)]
    groups = [group for group in groups if group]
    return max(groups, key=lambda group: (len(group) > 1, volume(group[0].key), len(group))) if groups else []


def _overview(group: Sequence[Row]) -> Figure | None:
    """Quality and decode speed against KV bytes at the largest setting: the figure that everybody should see."""
    tasks = tasks_of(group)
    metric = METRICS[primary(group, tasks[0])] if tasks else None
    points: list[Point] = []
    for row in group:
        kv, speed = kv_bytes(row), row.value(SPEED, "speedup")
        if kv is None:
            continue
        quality = loss(row, tasks[0], metric.key) if metric else None
        spread = _bounds(row.value(tasks[0], metric.key), metric.scale) if metric else (None, None)
        if row.key.policy == "full":
            speed = Value(1.0)
        elif doubtful(row, "speedup", group) or impossible(row):
            speed = None
        fast = speed.value if speed else None
        lost = quality * metric.scale if metric and quality is not None else None
        where = (row.key.policy, row.key.label, _budget_of(row), round(kv * METRICS["kv_bytes"].scale, 3))
        points.append((*where, lost, *spread, fast, *_bounds(speed, 1)))
    if len(points) < 2 or not any(point[4] is not None or point[7] not in (None, 1.0) for point in points):
        return None
    what = f"{metric.header} on {short_name(tasks[0])}" if metric and tasks else ""
    shown = " and ".join(filter(None, (what, "decode speed")))
    return Figure(
        "overview", "overview", f"{shown} against KV memory ({group[0].key.setting})",
        "Each point is a policy at a budget; lines are intervals, or ranges where there are too few samples for one.",
        ("policy", "label", "budget", "kv", "quality", "lo", "hi", "speed", "slow", "fast"), tuple(points),
        {"x": axis_title("kv_bytes"), "y": axis_title(metric.key) if metric else "", "speed": "decode speed, × full"},
    )  # fmt: skip


def _tradeoffs(rows: Sequence[Row]) -> Iterator[Figure]:
    """Quality against KV bytes: one figure for each task, one panel for each setting."""
    for number, task in enumerate(tasks_of(rows)[:MAX_FRONTS], 1):
        points: list[Point] = []
        panel = _panels(rows)
        metric, (stands, _) = METRICS[primary(rows, task)], front(rows, task)
        for row in (row for group in grouped(rows)[:MAX_SETTINGS] for row in group):
            quality, kv = loss(row, task, metric.key), kv_bytes(row)
            if quality is None or kv is None:
                continue
            shown = (
                kv * METRICS["kv_bytes"].scale,
                quality * metric.scale,
                *_bounds(row.value(task, metric.key), metric.scale),
            )
            points.append((panel(row), row.key.policy, row.key.label, _budget_of(row), *shown, row.key in stands))
        if len({point[2] for point in points}) > 1:
            yield Figure(
                f"tradeoff-{number}-{_slug(task)}", "tradeoff", f"Quality against KV memory: {task}",
                f"{metric.header}: {metric.about} The dashed line joins the points that are shown to be beaten by "
                "no other in both.",
                ("setting", "policy", "label", "budget", "kv", "quality", "lo", "hi", "front"), tuple(points),
                {"x": axis_title("kv_bytes"), "y": axis_title(metric.key), "wide": _wide(points)},
            )  # fmt: skip


def _budgets(rows: Sequence[Row]) -> Iterator[Figure]:
    """Quality against the budget, for runs that measured no KV bytes: one figure for each task, one panel for each
    setting. A policy with one budget is a point."""
    rows = [row for row in rows if kv_bytes(row) is None and row.key.budget]
    for number, task in enumerate(tasks_of(rows)[:MAX_FRONTS], 1):
        points: list[Point] = []
        panel, metric = _panels(rows), METRICS[primary(rows, task)]
        for row in (row for group in grouped(rows)[:MAX_SETTINGS] for row in group):
            value = row.value(task, metric.key)
            if value is not None and value.value is not None:
                spread = (value.value * metric.scale, *_bounds(value, metric.scale))
                points.append((panel(row), row.key.policy, row.key.label, round(100 * held(row, task), 2), *spread))
        if len({point[3] for point in points}) > 1 and len({point[1] for point in points}) > 1:
            log = all(bound > 0 for point in points for bound in point[4:] if isinstance(bound, float | int))
            yield Figure(
                f"budgets-{number}-{_slug(task)}", "budgets", f"Quality against budget: {task}",
                f"{metric.header}: {metric.about} Lines join the budgets of a policy; upright ones are intervals.",
                ("setting", "policy", "label", "budget", "quality", "lo", "hi"), tuple(points),
                {"x": "budget, % of the prompt", "y": axis_title(metric.key), "log": log, "wide": _wide(points)},
            )  # fmt: skip


def _wide(points: Sequence[Point]) -> bool:
    """Whether a figure has panels side by side."""
    return len({point[0] for point in points}) > 1


def _speedups(rows: Sequence[Row]) -> Figure | None:
    points: list[Point] = []
    panel, (rows, left_out) = _panels(rows), _lean(rows, MAX_BARS)
    for row in (row for group in grouped(rows)[:MAX_SETTINGS] for row in group):
        value, bound = row.value(SPEED, "speedup"), row.value(SPEED, "speedup_bound")
        if value and value.value is not None:
            ends = (value.value, *_bounds(value, 1), bound.value if bound else None)
            points.append((panel(row), row.key.policy, row.key.label, *ends))
    if not points:
        return None
    return Figure(
        "speedup", "speedup", "Decode speed-up over the full cache, equal batch",
        f"Bar: median of the pairs; line: its interval, or the range of too few; tick: what reading the bytes of a "
        f"step would allow at most.{left_out}",
        ("setting", "policy", "label", "speedup", "lo", "hi", "bound"), tuple(points),
        {"x": axis_title("speedup"), "wide": _wide(points)},
    )  # fmt: skip


def _throughput(rows: Sequence[Row]) -> Figure | None:
    """Decode throughput against batch; a cross marks the batch at which memory ended."""
    points: list[Point] = []
    panel, (rows, left_out) = _panels(rows, ("policy", "budget", "batch")), _lean(rows, MAX_LINES)
    shown = list(dict.fromkeys(panel(row) for row in rows))[:MAX_SETTINGS]
    for row in (row for row in rows if panel(row) in shown):
        value = row.value(SPEED, "decode_tok_s")
        wall = row.speed is not None and row.speed.record.status == "oom"
        if isinstance(row.key.batch, int) and (wall or value):
            rate = value.value if value else None
            where = (panel(row), row.key.policy, row.key.label, _budget_of(row))
            points.append((*where, row.key.batch, rate, *_bounds(value, 1), wall))
    if len({point[4] for point in points if point[5] is not None}) < 2:
        return None
    return Figure(
        "throughput", "throughput", "Decode throughput against batch",
        f"Band: interval, or the range of too few rounds; ✕: the batch at which memory ended.{left_out}",
        ("setting", "policy", "label", "budget", "batch", "tok_s", "lo", "hi", "wall"), tuple(points),
        {"y": axis_title("decode_tok_s"), "wide": _wide(points)},
    )  # fmt: skip


def _positions(timed: Sequence[tuple[Row, Samples]]) -> Figure | None:
    """Time of a decode step against its position: the median over all rounds in each of MAX_POINTS bins."""
    points: list[Point] = []
    scale = METRICS["tpot_s"].scale
    for row, samples in timed:
        at: dict[int, list[float]] = {}
        for part in _rounds_of(samples):
            steps = part.get("step_s") or []
            for place, step in zip(part.get("step_at") or range(len(steps)), steps, strict=False):
                if isinstance(step, int | float):
                    at.setdefault(place, []).append(step)
        places = sorted(at)
        width = max(1, -(-len(places) // MAX_POINTS))
        for start in range(0, len(places), width):
            bin_ = places[start : start + width]
            values = [step for place in bin_ for step in at[place]]
            points.append(
                (row.key.policy, row.key.label, _budget_of(row), bin_[-1] + 1, round(median(values) * scale, 4))
            )
    if len({point[3] for point in points}) < 4:
        return None
    return Figure(
        "position", "position", f"Time of a decode step against its position ({timed[0][0].key.setting})",
        "Median of all rounds; a cache of bounded size should stay flat while a full one climbs.",
        ("policy", "label", "budget", "position", "tpot"), tuple(points),
        {"x": "decode step", "y": axis_title("tpot_s")},
    )  # fmt: skip


def _lean(rows: Sequence[Row], most: int) -> tuple[Sequence[Row], str]:
    """As many rows as a figure can show distinctly, and a sentence about those that are left out."""
    labels = dict.fromkeys((row.key.policy, row.key.label) for row in rows)
    if len(labels) <= most:
        return rows, ""
    first: dict[str, str] = {}
    for policy, label in labels:
        first.setdefault(policy, label)
    kept = set(list(first.values())[:most])
    return [row for row in rows if row.key.label in kept], " Only the first budget of each policy is drawn."


def _budget_of(row: Row) -> str:
    """The budget of a row in words; a policy without a budget keeps everything."""
    return row.key.budget or "all"


def _panels(rows: Sequence[Row], inside: tuple[str, ...] = ("policy", "budget")) -> Callable[[Row], str]:
    """A function that names the panel of a row: by the axes that vary and are not shown inside a panel."""
    names = [name for name in varying(list(rows)) if name not in inside]

    return lambda row: setting(row.key, names) or row.key.shape or row.key.model


def _bounds(value: Value | None, scale: float) -> tuple[float | None, float | None]:
    if value is None or value.lo is None or value.hi is None:
        return None, None
    return value.lo * scale, value.hi * scale


def _slug(text: str) -> str:
    """A task's name as part of a file name."""
    return (
        "".join(char if char.isascii() and char.isalnum() else "-" for char in text)[:40].strip("-").lower() or "task"
    )


def _timeline(timed: Sequence[tuple[Row, Samples]]) -> Figure | None:
    """Memory over time in the last round of each row: the device's if NVML reported it, else the process's resident
    memory."""
    points: list[Point] = []
    phases: list[list[str | float]] = []
    metric = RESIDENT
    for row, samples in timed[:MAX_TIMELINES]:
        rounds = _rounds_of(samples)
        line, found = _memory_line(rounds[-1]) if rounds else ([], metric)
        if not line or not rounds[-1].get("marks"):
            continue
        metric = found
        width = -(-len(line) // MAX_TIMELINE_POINTS)
        for start in range(0, len(line), width):
            t, memory = max(line[start : start + width], key=lambda point: point[1])
            points.append((row.key.policy, row.key.label, round(t, 4), round(memory * METRICS[metric].scale, 1)))
        phases += [[row.key.label, *span] for span in _spans(rounds[-1]["marks"])]
    if not points:
        return None
    whose = "used on the device, all processes" if metric == DEVICE else "resident memory of the process"
    return Figure(
        "timeline", "timeline", f"Memory over time ({timed[0][0].key.setting})",
        f"Line: {whose}, weights included, in the last round; shaded: prefill, compress, decode.",
        ("policy", "label", "t", "memory"), tuple(points),
        {"x": "time, s", "y": f"memory, {METRICS[metric].unit}", "phases": phases, "wide": True},
    )  # fmt: skip


def _memory_line(part: dict[str, Any]) -> tuple[list[tuple[float, float]], str]:
    """The samples (time, bytes) of a round, and the metric that they belong to."""
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


def _spans(marks: Sequence[Sequence[Any]]) -> list[tuple[str, float, float]]:
    """(phase, start, end) of each phase. Phases that alternate layer by layer become one span each."""
    found: dict[str, tuple[float, float]] = {}
    for (start, phase), (stop, _) in pairwise(marks):
        if stop > start and phase in PHASES:
            low, high = found.get(phase, (start, stop))
            found[phase] = (min(low, start), max(high, stop))
    return [(phase, round(low, 4), round(high, 4)) for phase, (low, high) in found.items()]


def _peak(group: Sequence[Row]) -> Figure | None:
    """The peak of memory divided into weights, KV and the rest."""
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


def _rounds_of(samples: Samples) -> list[dict[str, Any]]:
    """The rounds of a timed cell, in order."""
    parts = samples.get("rounds")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
