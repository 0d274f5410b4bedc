"""CSV: one row for each figure of each cell, one row for each cell, the targets, and the data of each picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from d2obench.report.render import Drawn, Files
from d2obench.report.view import CsvRow, Figure, Report

HEAD = CsvRow.__struct_fields__[: CsvRow.__struct_fields__.index("metric")]


def files(report: Report, drawn: Drawn) -> Files:
    """One line for each figure, one for each row, and one for each target where the suite states any."""
    made = [("results.csv", results(report)), ("results-wide.csv", wide(report))]
    return [*made, ("targets.csv", targets(report))] if report.targets else made


def results(report: Report) -> str:
    """Values in base units in full precision; ``shown`` is the text every view prints."""
    return _text(
        CsvRow.__struct_fields__, ([getattr(row, name) for name in CsvRow.__struct_fields__] for row in report.results)
    )


def wide(report: Report) -> str:
    """One row per cell: its axes, then each metric with the bounds of its interval."""
    metrics = list(dict.fromkeys(row.metric for row in report.results))
    bounded = {row.metric for row in report.results if row.lo is not None}
    columns = [name for key in metrics for name in ((key, f"{key}_lo", f"{key}_hi") if key in bounded else (key,))]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in report.results:
        found = cells.setdefault(tuple(getattr(row, name) for name in HEAD), {"flags": row.flags})
        found |= {row.metric: row.value, f"{row.metric}_lo": row.lo, f"{row.metric}_hi": row.hi}
    rows = ([*head, *(values.get(name) for name in columns), values["flags"]] for head, values in cells.items())
    return _text([*HEAD, *columns, "flags"], rows)


def targets(report: Report) -> str:
    """The suite's targets as every view shows them; a figure with an interval has its bounds beside it."""
    (shown,) = report.targets
    bounds = ("measured", "measured_lo", "measured_hi")
    head = [name for column in shown.columns for name in (bounds if column.key == "measured" else (column.key,))]
    rows = (
        [
            word
            for column, entry in zip(shown.columns, row, strict=True)
            for word in ((entry.text, entry.lo, entry.hi) if column.key == "measured" else (entry.text,))
        ]
        for row in shown.rows
    )
    return _text(head, rows)


def figure(shown: Figure) -> str:
    """The points of a figure."""
    return _text(shown.columns, shown.rows)


def _text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_safe(value) for value in row] for row in rows)
    return out.getvalue()


def _safe(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula is kept from it by an apostrophe; NUL has no place in CSV."""
    if not isinstance(value, str):
        return value
    value = value.replace("\0", "�")
    return f"'{value}" if value.startswith(("=", "@", "\t", "\r")) else value
