"""The figures of a report as data, each only where the records carry what it needs.

The charts are drawn from these rows by ``d2obench.report.charts``; the same rows are the table behind each figure.
Raw samples are read for the largest setting only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from d2obench.metric import METRICS
from d2obench.record import Value, read_samples
from d2obench.report.fields import varying
from d2obench.report.layers import layers
from d2obench.report.memory import Point, Samples, axis_title, rounds_of, split, timeline
from d2obench.report.needle import needles
from d2obench.report.quality import front, held, loss, primary, tasks_of
from d2obench.report.rows import Entry, Row, grouped, volume
from d2obench.report.view import Figure
from d2obench.suite.definition import SPEED

MAX_TASKS, MAX_SETTINGS, MAX_POINTS, MAX_LINES, MAX_BARS = 3, 6, 64, 12, 24


def figures(found: Sequence[Entry], rows: Sequence[Row]) -> list[Figure]:
    """Every figure the records can carry, in the order of the page."""
    main = _main(rows)
    timed = [(row, read_samples(row.speed.run.path, row.speed.record)) for row in main[:MAX_LINES] if row.speed]
    made: list[Figure | None] = [*_tradeoffs(rows), _speedups(rows), _throughput(rows), _positions(timed)]
    made += [split(main), timeline(timed), *layers(found), *needles(found)]
    return [figure for figure in made if figure is not None]


def _main(rows: Sequence[Row]) -> list[Row]:
    """The largest setting with timed cells."""
    groups = [[row for row in group if row.speed and row.speed.record.status == "ok"] for group in grouped(rows)]
    groups = [group for group in groups if group]
    return max(groups, key=lambda group: (len(group) > 1, volume(group[0].key), len(group))) if groups else []


def _tradeoffs(rows: Sequence[Row]) -> Iterator[Figure]:
    """Quality against KV bytes, one figure a task, one panel a setting."""
    for number, task in enumerate(tasks_of(rows)[:MAX_TASKS], 1):
        points: list[Point] = []
        panel = panels(rows)
        metric, stands = METRICS[primary(rows, task)], front(rows, task)
        for row in (row for group in grouped(rows)[:MAX_SETTINGS] for row in group):
            quality, kv = loss(row, task, metric.key), held(row)
            if quality is None or kv is None:
                continue
            shown = (
                kv * METRICS["kv_bytes"].scale,
                quality * metric.scale,
                *_bounds(row.value(task, metric.key), metric.scale),
            )
            points.append((panel(row), row.key.policy, row.key.label, budget_of(row), *shown, row.key in stands))
        if len({point[2] for point in points}) > 1:
            yield Figure(
                f"tradeoff-{number}-{_slug(task)}", "tradeoff", f"Quality against KV memory: {task}",
                f"{metric.header}: {metric.about}. The line joins the points that nothing beats in both.",
                ("setting", "policy", "label", "budget", "kv", "quality", "lo", "hi", "front"), tuple(points),
                {"x": axis_title("kv_bytes"), "y": axis_title(metric.key), "wide": _wide(points)},
            )  # fmt: skip


def _wide(points: Sequence[Point]) -> bool:
    """Whether a figure has panels side by side."""
    return len({point[0] for point in points}) > 1


def _speedups(rows: Sequence[Row]) -> Figure | None:
    points: list[Point] = []
    panel, (rows, said) = panels(rows), _lean(rows, MAX_BARS)
    for row in (row for group in grouped(rows)[:MAX_SETTINGS] for row in group):
        value, bound = row.value(SPEED, "speedup"), row.value(SPEED, "speedup_bound")
        if value and value.value is not None:
            ends = (value.value, *_bounds(value, 1), bound.value if bound else None)
            points.append((panel(row), row.key.policy, row.key.label, *ends))
    if not points:
        return None
    return Figure(
        "speedup", "speedup", "Decode speed-up over the full cache, equal batch",
        f"Bar: median of the rounds; line: its 95 % interval; tick: what memory traffic alone would allow.{said}",
        ("setting", "policy", "label", "speedup", "lo", "hi", "bound"), tuple(points),
        {"x": axis_title("speedup"), "wide": _wide(points)},
    )  # fmt: skip


def _throughput(rows: Sequence[Row]) -> Figure | None:
    """Decode tok/s against batch; out of memory is the wall."""
    points: list[Point] = []
    panel, (rows, said) = panels(rows, ("policy", "budget", "batch")), _lean(rows, MAX_LINES)
    shown = list(dict.fromkeys(panel(row) for row in rows))[:MAX_SETTINGS]
    for row in (row for row in rows if panel(row) in shown):
        value = row.value(SPEED, "decode_tok_s")
        wall = row.speed is not None and row.speed.record.status == "oom"
        if isinstance(row.key.batch, int) and (wall or value):
            rate = value.value if value else None
            where = (panel(row), row.key.policy, row.key.label, budget_of(row))
            points.append((*where, row.key.batch, rate, *_bounds(value, 1), wall))
    if len({point[4] for point in points if point[5] is not None}) < 2:
        return None
    return Figure(
        "throughput", "throughput", "Decode throughput against batch",
        f"Band: 95 % interval; ✕: the batch at which memory ended.{said}",
        ("setting", "policy", "label", "budget", "batch", "tok_s", "lo", "hi", "wall"), tuple(points),
        {"y": axis_title("decode_tok_s"), "wide": _wide(points)},
    )  # fmt: skip


def _positions(timed: Sequence[tuple[Row, Samples]]) -> Figure | None:
    """Step time against position, the median of all rounds in each of MAX_POINTS bins."""
    points: list[Point] = []
    scale = METRICS["tpot_s"].scale
    for row, samples in timed:
        at: dict[int, list[float]] = {}
        for part in rounds_of(samples):
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
                (row.key.policy, row.key.label, budget_of(row), bin_[-1] + 1, round(median(values) * scale, 4))
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
    """The rows that a figure can still show apart, and words for those that are left out."""
    labels = dict.fromkeys((row.key.policy, row.key.label) for row in rows)
    if len(labels) <= most:
        return rows, ""
    first: dict[str, str] = {}
    for policy, label in labels:
        first.setdefault(policy, label)
    kept = set(list(first.values())[:most])
    return [row for row in rows if row.key.label in kept], " Only the first budget of each policy is drawn."


def budget_of(row: Row) -> str:
    """The budget of a row; a policy without one keeps everything."""
    return row.key.budget or "all"


def panels(rows: Sequence[Row], inside: tuple[str, ...] = ("policy", "budget")) -> Callable[[Row], str]:
    """Names the panel of a row by the axes that vary and are not shown inside a panel."""
    names = [name for name in varying(list(rows)) if name not in inside]

    def name(row: Row) -> str:
        values = [(axis, getattr(row.key, axis)) for axis in names]
        words = [
            f"{axis} {value}" if axis in ("batch", "seed") else str(value)
            for axis, value in values
            if value is not None
        ]
        return ", ".join(words) or row.key.shape or row.key.model

    return name


def _bounds(value: Value | None, scale: float) -> tuple[float | None, float | None]:
    if value is None or value.lo is None or value.hi is None:
        return None, None
    return value.lo * scale, value.hi * scale


def _slug(text: str) -> str:
    """A task's name as part of a file name."""
    return (
        "".join(char if char.isascii() and char.isalnum() else "-" for char in text)[:40].strip("-").lower() or "task"
    )
