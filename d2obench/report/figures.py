"""The figures of a report as data; a figure is left out if the records lack what it needs.

:mod:`d2obench.report.charts` draws the charts from these rows, and the same rows are the table behind each figure. Raw
samples are read for the largest setting only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from d2obench.metric import METRICS, show
from d2obench.record import Value, read_samples
from d2obench.report.evidence import MAX_FRONTS, doubtful, front, impossible
from d2obench.report.rows import Result, Row, grouped, kv_bytes, loss, primary, short_name, tasks_of, volume
from d2obench.report.tables import setting, varying
from d2obench.report.view import KINDS, Figure
from d2obench.suite.definition import SPEED

MAX_SETTINGS, MAX_POINTS, MAX_LINES, MAX_BARS = 6, 64, 12, 24
MAX_TIMELINES, MAX_TIMELINE_POINTS, MAX_HEATMAPS = 8, 200, 12
ALLOCATOR, RESIDENT, DEVICE = "alloc_peak_bytes", "rss_peak_bytes", "nvml_used_bytes"
PHASES = ("prefill", "compress", "decode")
FATES = ("merged", "lost")
Point = tuple[str | int | float | bool | None, ...]
Samples = dict[str, Any]
Grid = dict[tuple[float, float], tuple[float, int]]


def figures(found: Sequence[Result], rows: Sequence[Row]) -> list[Figure]:
    """Every figure that the records allow, in the order of the page."""
    main = _main(rows)
    timed = [(row, read_samples(row.speed.run.path, row.speed.record)) for row in main[:MAX_LINES] if row.speed]
    made: list[Figure | None] = [
        _overview(main),
        *_tradeoffs(rows),
        _speedups(rows),
        _throughput(rows),
        _positions(timed),
    ]
    made += [_drift(found), _peak(main), _timeline(timed), *_layers(found), _diagnosis(found), *_needles(found)]
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
        {"x": _axis_title("kv_bytes"), "y": _axis_title(metric.key) if metric else "", "speed": "decode speed, × full"},
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
                {"x": _axis_title("kv_bytes"), "y": _axis_title(metric.key), "wide": _wide(points)},
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
        {"x": _axis_title("speedup"), "wide": _wide(points)},
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
        {"y": _axis_title("decode_tok_s"), "wide": _wide(points)},
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
        {"x": "decode step", "y": _axis_title("tpot_s")},
    )  # fmt: skip


def _drift(found: Sequence[Result]) -> Figure | None:
    """KL to full against the position in the generation, of each policy and budget at its longest shape."""
    points: list[Point] = []
    best: dict[str, Result] = {}
    for result in found:
        if result.record.status == "ok" and result.key.policy != "full" and _drifts(result):
            label = result.key.label
            if label not in best or volume(result.key) > volume(best[label].key):
                best[label] = result
    for label, result in list(best.items())[:MAX_LINES]:
        for place, kl in _drifts(result):
            points.append((result.key.policy, label, result.key.budget or "all", place, round(kl, 6)))
    if len({point[3] for point in points}) < 4:
        return None
    return Figure(
        "drift", "drift", "KL to full against the position in the generation",
        "Mean over documents in each part of the generation; a line that climbs shows a loss that grows as it goes on.",
        ("policy", "label", "budget", "position", "kl"), tuple(points),
        {"x": "generated token", "y": _axis_title("kl")},
    )  # fmt: skip


def _drifts(result: Result) -> list[tuple[int, float]]:
    """(position, KL) of each part of the generation, from the cell's details."""
    parts = result.record.details.get("drift")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return []
    pairs = [(part.get("position"), part.get("kl")) for part in parts]
    return [(place, float(kl)) for place, kl in pairs if isinstance(place, int) and isinstance(kl, int | float)]


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


def _axis_title(metric: str) -> str:
    """``TPOT, ms``: an axis title from the metric table."""
    return f"{METRICS[metric].header}, {METRICS[metric].unit}" if METRICS[metric].unit else METRICS[metric].header


def _layers(found: Sequence[Result]) -> Iterator[Figure]:
    """Tokens kept and entries evicted in each layer, for each policy and budget at its largest setting. A figure is
    left out if the run has only one layer."""
    shown = _largest(found)
    kept: list[Point] = []
    gone: list[Point] = []
    for label, result in shown.items():
        details, policy = result.record.details, result.key.policy
        merged = result.values.get("merged")
        share = f"{show('merged', merged.value)} {METRICS['merged'].unit} merged" if merged and merged.value else ""
        for layer, tokens in enumerate(_numbers(details.get("kept_layers"))):
            kept.append((policy, f"{label}, {share}" if share else label, layer, round(tokens, 2)))
        pairs = zip(_numbers(details.get("merged_layers")), _numbers(details.get("evicted_layers")), strict=False)
        for layer, (into, out) in enumerate(pairs):
            for fate, count in zip(FATES, (into, out - into), strict=True):
                gone.append((policy, label, layer, fate, int(count), round(100 * count / out, 2) if out else None))
    if _layered(kept):
        yield Figure(
            "layers", "layers", "Tokens kept in each layer after compression",
            "Mean over sequences and KV heads; a policy that gives layers unequal budgets is not flat.",
            ("policy", "label", "layer", "kept"), tuple(kept), {"x": "layer", "y": "tokens kept", "wide": True},
        )  # fmt: skip
    if _layered(gone):
        yield Figure(
            "merges", "merges", "Entries evicted from each layer: merged into a kept one, or lost",
            "Counted over the sequences and KV heads of a request, at the prompt and while decoding.",
            ("policy", "label", "layer", "fate", "entries", "percent"), tuple(gone),
            {"x": "layer", "y": "entries evicted", "wide": True},
        )  # fmt: skip


DIAGNOSED = ("attention evicted, %", "drawn ÷ due by merge targets", "output error, %", "share of budget ÷ mean")
"""The panels of the diagnosis. The last one shows the shares of two rules: the square root of the cost that was
measured for each policy, and D2O's exp(−F) after F was min–max normalised over the layers."""


def _diagnosis(found: Sequence[Result]) -> Figure | None:
    """What each layer lost, for each policy at the budget that most of them have and the largest setting of the task
    diagnosis."""
    known = [one for one in found if one.key.budget and one.record.details.get("diagnosis")]
    budgets = Counter(one.key.budget for one in known)
    budget = max(budgets, key=lambda one: budgets[one], default=None)
    best: dict[str, Result] = {}
    for result in known:
        policy = result.key.policy
        if result.key.budget == budget and (policy not in best or volume(result.key) > volume(best[policy].key)):
            best[policy] = result
    points: list[Point] = []
    variance: list[float] = []
    for policy, result in list(best.items())[:MAX_LINES]:
        columns = {name: _numbers(column) for name, column in result.record.details["diagnosis"].items()}
        if columns["density"]:
            low, high = min(columns["density"]), max(columns["density"])
            variance = [math.exp(-(value - low) / max(high - low, 1e-12)) for value in columns["density"]]
        shown: list[list[float | None]] = [
            [100 * value for value in columns["evicted"]],
            [drawn / due if due else None for due, drawn in zip(columns["due"], columns["drawn"], strict=True)],
            [100 * value for value in columns["error"]],
            [*_shares([max(0.0, value) ** 0.5 for value in columns["cost"]])],
        ]
        for panel, column in zip(DIAGNOSED, shown, strict=True):
            points += _line(policy, panel, column)
    points += _line("exp(−variance)", DIAGNOSED[3], _shares(variance))
    if len({point[2] for point in points}) < 2:
        return None
    return Figure(
        "diagnosis", "diagnosis", f"What compression to {budget} costs each layer, for the prompt's last queries",
        "Attention that goes to evicted entries; attention that merge targets draw in the compressed cache, divided by "
        "what they and the entries merged into them drew before (1 is right); squared error of the attention block's "
        "output; and the share of the budget that a layer gets by the measured cost and by exp(−variance).",
        ("policy", "panel", "layer", "value"), tuple(points), {"x": "layer"},
    )  # fmt: skip


def _line(policy: str, panel: str, column: Sequence[float | None]) -> list[Point]:
    return [(policy, panel, layer, round(value, 4)) for layer, value in enumerate(column) if value is not None]


def _shares(weights: list[float]) -> list[float]:
    """Weights divided by their mean."""
    mean = sum(weights) / max(1, len(weights))
    return [weight / mean if mean else 1.0 for weight in weights]


def _largest(found: Sequence[Result]) -> dict[str, Result]:
    best: dict[str, Result] = {}
    for result in found:
        if result.record.status == "ok" and result.key.budget and _numbers(result.record.details.get("kept_layers")):
            label = result.key.label
            if label not in best or volume(result.key) > volume(best[label].key):
                best[label] = result
    return dict(list(best.items())[:MAX_LINES])


def _layered(points: Sequence[Point]) -> bool:
    return len({point[2] for point in points}) > 1


def _numbers(value: Any) -> list[float]:
    """A list of numbers; empty if the value is anything else."""
    good = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    return [float(x) for x in value] if good else []


def _needles(found: Sequence[Result]) -> Iterator[Figure]:
    """Two figures for a needle task that recorded its grid: the share found by each policy, and the difference to the
    full cache."""
    grids: dict[tuple[str, str], Grid] = {}
    for result in found:
        if result.record.status == "ok" and "needle" in result.record.axes.task:
            grid = _grid(result)
            if grid:
                grids.setdefault((result.key.policy, result.key.label), grid)
    if not grids:
        return
    panels = list(grids.items())[:MAX_HEATMAPS]
    points = [
        (policy, label, context, depth, round(100 * total / n, 1), f"{total:.3g}/{n}")
        for (policy, label), grid in panels
        for (context, depth), (total, n) in sorted(grid.items())
    ]
    columns = ("policy", "label", "context", "depth", "found", "text")
    yield Figure(
        "heatmap-needle", "heatmap", "Needles found, by context length and depth",
        "Share of the needles found, %; a field holds k of n.",
        columns, tuple(points), {"low": 0, "high": 100, "title": "found, %", "wide": True},
    )  # fmt: skip
    full = next((grid for (policy, _), grid in panels if policy == "full"), None)
    if full is None or len(panels) < 2:
        return
    points = []
    for (policy, label), grid in panels:
        for place, (total, n) in sorted(grid.items()):
            if policy != "full" and place in full:
                change = round(100 * (total / n - full[place][0] / full[place][1]), 1)
                points.append((policy, label, *place, change, f"{change:+.0f}" if round(change) else "0"))
    yield Figure(
        "heatmap-difference", "heatmap", "Needles found: difference to the full cache",
        "Points above or below what the full cache finds.",
        columns, tuple(points), {"low": -100, "high": 100, "title": "points", "wide": True},
    )  # fmt: skip


def _grid(result: Result) -> Grid:
    """(context, depth) → (sum of scores, items), from the cell's details."""
    grid: Grid = {}
    points = result.record.details.get("grid")
    for point in points if isinstance(points, list) else ():
        match point:
            case {
                "context": int() | float() as context,
                "depth": int() | float() as depth,
                "score": int() | float() as score,
                "n": int() as n,
            } if n:
                grid[context, depth] = (score * n, n)
    return grid
