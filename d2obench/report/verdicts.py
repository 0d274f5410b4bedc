"""The verdicts of a gate or a comparison as a :class:`~d2obench.report.view.Report`, and as JSON.

The page has a table of the figures that need a look, a table of those that are in order, and forest plots, which show
the change of each figure with its interval beside the band that the gate tolerates.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from d2obench.gate.verdict import BUDGET, Row, Verdict, Verdicts, short_names
from d2obench.metric import METRICS
from d2obench.record import finite
from d2obench.report.view import Case, Column, Field, Figure, Mark, Outcome, Report, Table

SCHEMA = 1
"""The version of the JSON."""
MAX_ROWS, MAX_POINTS, MAX_NAME, LONGEST = 2500, 40, 48, 90
"""Rows of a table, points of a plot, characters of a cell's name, and characters of a label in a plot."""
MARKS: dict[Verdict, Mark] = {
    Verdict.REGRESSED: "bad",
    Verdict.INCOMPARABLE: "bad",
    Verdict.INCONCLUSIVE: "warn",
    Verdict.IMPROVED: "best",
    Verdict.OK: "quiet",
    Verdict.NOT_JUDGED: "quiet",
}
COLUMNS = (
    Column("verdict", "verdict", numeric=False),
    Column("cell", "cell", numeric=False),
    Column("metric", "metric", numeric=False),
    Column("base", "base"),
    Column("head", "head"),
    Column("change", "change", about="head ÷ base − 1, or head − base for quality, with its interval"),
    Column("why", "why", numeric=False),
)
POINT_COLUMNS = ("label", "cell", "metric", "verdict", "value", "lo", "hi", "least", "most")
Point = tuple[str | float | None, ...]


def view(verdicts: Verdicts) -> Report:
    """The page of a comparison; figures that are OK have a table of their own."""
    names = short_names(verdicts.rows)
    fine, beside = verdicts.of(Verdict.OK), verdicts.of(Verdict.NOT_JUDGED)
    attention = [row for row in verdicts.rows if row.verdict not in (Verdict.OK, Verdict.NOT_JUDGED)]
    return Report(
        title=f"{verdicts.title}: {verdicts.worst.value}",
        subtitle=f"{verdicts.base} → {verdicts.head}",
        verdict=(verdicts.summary,),
        warnings=verdicts.notes,
        headline=tuple(_table("What needs a look", attention, names)),
        tables=(
            *_table("What is in order", fine, names),
            *_table("Times side by side, without a verdict", beside, names),
        ),
        figures=tuple(forest(verdicts)),
        again=verdicts.commands,
        cases=tuple(_case(verdicts.title, row) for row in verdicts.rows),
        name="verdicts",
        again_title="What to do next",
    )


def as_json(verdicts: Verdicts) -> str:
    """One document: ``schema``, ``verdict``, ``counts``, ``exit_code`` and the fields of :class:`Verdicts`."""
    document = {
        "schema": SCHEMA,
        "verdict": verdicts.worst.value,
        "counts": {verdict.value: count for verdict, count in verdicts.counts.items()},
        "exit_code": verdicts.exit_code(),
        **msgspec.to_builtins(verdicts),
    }
    return json.dumps(finite(document), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _table(title: str, rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[Table]:
    if rows:
        body = tuple(_fields(row, names) for row in rows[:MAX_ROWS])
        rest = len(rows) - len(body)
        notes = (f"{rest} more rows are in the JSON output.",) if rest else ()
        yield Table(f"{title}: {len(rows)} figures", COLUMNS, body, notes=notes)


def _fields(row: Row, names: Mapping[str, str]) -> tuple[Field, ...]:
    figures = (
        Field(row.shown(figure), sort=float(figure) if isinstance(figure, int | float) else None)
        for figure in (row.base, row.head)
    )
    return (
        Field(row.verdict.value, sort=float(row.verdict.severity), mark=MARKS[row.verdict]),
        Field(names[row.cell], note=row.cell),
        Field(row.header),
        *figures,
        Field(row.change, sort=row.effect),
        Field(row.reason),
    )


def _case(title: str, row: Row) -> Case:
    outcomes: dict[Verdict, Outcome] = {
        Verdict.REGRESSED: "error" if row.metric == "status" else "failure",
        Verdict.INCOMPARABLE: "error",
        Verdict.INCONCLUSIVE: "skipped",
    }
    figures = f"{row.shown(row.base)} → {row.shown(row.head)} {row.change}".strip()
    reason = "; ".join(filter(None, (figures if row.base is not None or row.head is not None else "", row.reason)))
    outcome = outcomes.get(row.verdict, "passed")
    return Case(title, row.header, row.cell, row.verdict.value, reason, 0.0, "", outcome)


def forest(verdicts: Verdicts) -> list[Figure]:
    """A forest plot of ratios (head ÷ base) and one of quality (difference ÷ limit), each with the worst figure first.

    The tolerated band of a ratio is 1 ÷ (1 + δ) … 1 + δ. A figure that must not change is shown only if it changed.
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
                POINT_COLUMNS, _points(ratios, names, middle=1.0),
                {"x": "head ÷ base", "middle": 1.0, "longest": LONGEST, "wide": True},
            )
        )  # fmt: skip
    if quality:
        made.append(
            Figure(
                "forest-quality", "forest", "Each quality figure against its limit, worst first",
                f"Point: mean of head − base ÷ the limit; line: its 95 % interval; grey: what is let pass."
                f"{_rest(quality)}",
                POINT_COLUMNS, _points(quality, names, middle=0.0),
                {"x": "(head − base) ÷ limit", "middle": 0.0, "longest": LONGEST, "wide": True},
            )
        )  # fmt: skip
    return made


def _moved(row: Row) -> bool:
    """Whether a row can be drawn and is worth it: it compares the sides, its numbers are finite, and it changed or was
    allowed to change."""
    if row.verdict is Verdict.NOT_JUDGED or row.kind == BUDGET:
        return False
    numbers = [row.effect, *(end for end in (row.lo, row.hi) if end is not None)]
    if any(end is None or not math.isfinite(end) or (row.kind != "sampled" and end <= -1) for end in numbers):
        return False
    return row.effect != 0 or row.lo is not None or row.limit > 0


def _rest(rows: Sequence[Row]) -> str:
    return f" {len(rows) - MAX_POINTS} more rows are in the table." if len(rows) > MAX_POINTS else ""


def _points(rows: Sequence[Row], names: dict[str, str], middle: float) -> tuple[Point, ...]:
    points: list[Point] = []
    seen: Counter[str] = Counter()
    for row in rows[:MAX_POINTS]:
        label = f"{_cut(names[row.cell])} · {_headed(row)}"
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
    """The header of the metric with an arrow in the direction that is better."""
    direction = METRICS[row.metric].direction if row.metric in METRICS else "none"
    return row.header + {"lower": " ↓", "higher": " ↑", "none": ""}[direction]


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
