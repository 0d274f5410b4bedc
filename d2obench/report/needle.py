"""Needle heatmaps: the share of needles found at each context length and depth, and its difference to full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from d2obench.report.rows import Entry
from d2obench.report.view import Figure

MAX_PANELS = 12
Grid = dict[tuple[float, float], tuple[float, int]]


def needles(found: Sequence[Entry]) -> Iterator[Figure]:
    """Two figures where a needle task left its grid: found by policy, and less what full finds."""
    grids: dict[tuple[str, str], Grid] = {}
    for entry in found:
        if entry.record.status == "ok" and "needle" in entry.record.axes.task:
            grid = _grid(entry)
            if grid:
                grids.setdefault((entry.key.policy, entry.key.label), grid)
    if not grids:
        return
    panels = list(grids.items())[:MAX_PANELS]
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


def _grid(entry: Entry) -> Grid:
    """(context, depth) → (sum of scores, items), from the cell's details."""
    grid: Grid = {}
    points = entry.record.details.get("grid")
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
