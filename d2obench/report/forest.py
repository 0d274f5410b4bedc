"""The forest plot of a gate or a comparison: each figure's change with its interval on the band that is let pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from d2obench.gate.verdict import Row, Verdicts, short_names
from d2obench.metric import METRICS
from d2obench.report.view import Figure

MAX_ROWS, MAX_NAME, LONGEST = 40, 48, 90
COLUMNS = ("label", "cell", "metric", "verdict", "value", "lo", "hi", "least", "most")
Point = tuple[str | float | None, ...]


def forest(verdicts: Verdicts) -> list[Figure]:
    """One figure of ratios (head ÷ base) and one of quality (difference ÷ limit), worst first; none without numbers.

    The band of a ratio is 1 ÷ (1 + δ) … 1 + δ. A figure that must not change is shown where it did.
    """
    names = short_names(verdicts.rows)
    ratios = [row for row in verdicts.rows if row.kind != "sampled" and _moved(row)]
    quality = [row for row in verdicts.rows if row.kind == "sampled" and _moved(row) and row.limit > 0]
    made = []
    if ratios:
        made.append(
            Figure(
                "forest-ratio", "forest", "Each figure against its limit, worst first",
                f"Point: head ÷ base; line: its interval; grey: the band that is let pass.{_rest(ratios)}",
                COLUMNS, _points(ratios, names, middle=1.0),
                {"x": "head ÷ base", "middle": 1.0, "longest": LONGEST, "wide": True},
            )
        )  # fmt: skip
    if quality:
        made.append(
            Figure(
                "forest-quality", "forest", "Each quality figure against its limit, worst first",
                f"Point: mean of head − base ÷ the limit; line: its 95 % interval; grey: what is let pass."
                f"{_rest(quality)}",
                COLUMNS, _points(quality, names, middle=0.0),
                {"x": "(head − base) ÷ limit", "middle": 0.0, "longest": LONGEST, "wide": True},
            )
        )  # fmt: skip
    return made


def _moved(row: Row) -> bool:
    """Whether there is something to draw: a change, or one that might have been within an interval or a limit."""
    numbers = [row.effect, *(end for end in (row.lo, row.hi) if end is not None)]
    if any(end is None or not math.isfinite(end) or (row.kind != "sampled" and end <= -1) for end in numbers):
        return False
    return row.effect != 0 or row.lo is not None or row.limit > 0


def _rest(rows: Sequence[Row]) -> str:
    return f" {len(rows) - MAX_ROWS} more rows are in the table." if len(rows) > MAX_ROWS else ""


def _points(rows: Sequence[Row], names: dict[str, str], middle: float) -> tuple[Point, ...]:
    points: list[Point] = []
    seen: Counter[str] = Counter()
    for row in rows[:MAX_ROWS]:
        label = f"{_short(names[row.cell])} · {_headed(row)}"
        seen[label] += 1
        label += f" ({seen[label]})" if seen[label] > 1 else ""
        assert row.effect is not None
        unit = 1.0 if middle else row.limit
        value, lo, hi = (_round(end, middle, unit) for end in (row.effect, row.lo, row.hi))
        band = (1 / (1 + row.limit), 1 + row.limit) if middle else (-1.0, 1.0)
        points.append((label, row.cell, row.metric, row.verdict.value, value, lo, hi, round(band[0], 6), band[1]))
    return tuple(points)


def _round(end: float | None, middle: float, unit: float) -> float | None:
    return None if end is None else round(middle + end / unit, 6)


def _headed(row: Row) -> str:
    """The metric with the direction that is better."""
    direction = METRICS[row.metric].direction if row.metric in METRICS else "none"
    return row.header + {"lower": " ↓", "higher": " ↑", "none": ""}[direction]


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
