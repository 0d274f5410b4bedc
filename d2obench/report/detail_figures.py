"""Figures drawn from what a row says of positions, layers and depths; a figure is left out if no row says it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from d2obench.metric import METRICS, show
from d2obench.report.rows import Result, volume
from d2obench.report.view import Figure, axis_title

MAX_LINES, MAX_HEATMAPS = 12, 12
FATES = ("merged", "lost")
Point = tuple[str | int | float | bool | None, ...]
Grid = dict[tuple[float, float], tuple[float, int]]


def details(found: Sequence[Result]) -> Iterator[Figure]:
    """Every such figure that the records allow."""
    yield from filter(None, (_drift(found), _diagnosis(found)))
    yield from _layers(found)
    yield from _needles(found)


def _drift(found: Sequence[Result]) -> Figure | None:
    """KL to full against the position in the generation, of each policy and budget at its longest shape. If there are
    too many lines, those of the smallest budget are drawn."""
    points: list[Point] = []
    best: dict[str, Result] = {}
    for result in found:
        if result.record.status == "ok" and result.key.policy != "full" and _drifts(result):
            label = result.key.label
            if label not in best or volume(result.key) > volume(best[label].key):
                best[label] = result
    if len(best) > MAX_LINES:
        least = min(float(one.key.budget or math.inf) for one in best.values())
        best = {label: one for label, one in best.items() if float(one.key.budget or math.inf) == least}
    for label, result in list(best.items())[:MAX_LINES]:
        for place, kl in _drifts(result):
            points.append((result.key.policy, label, result.key.budget or "all", place, round(kl, 6)))
    if len({point[3] for point in points}) < 4:
        return None
    return Figure(
        "drift", "drift", "KL to full against the position in the generation",
        "Mean over documents in each part of the generation; a line that climbs shows a loss that grows as it goes on.",
        ("policy", "label", "budget", "position", "kl"), tuple(points),
        {"x": "generated token", "y": axis_title("kl")},
    )  # fmt: skip


def _drifts(result: Result) -> list[tuple[int, float]]:
    """(position, KL) of each part of the generation, from the cell's details."""
    parts = result.record.details.get("drift")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return []
    pairs = [(part.get("position"), part.get("kl")) for part in parts]
    return [(place, float(kl)) for place, kl in pairs if isinstance(place, int) and isinstance(kl, int | float)]


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
