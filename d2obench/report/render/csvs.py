"""CSV: tidy (one row per cell and metric) and wide (one row per cell), and the data of each figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from d2obench.report.view import Figure, Report, Tidy

HEAD = Tidy.__struct_fields__[: Tidy.__struct_fields__.index("metric")]


def tidy(report: Report) -> str:
    """Values in base units in full precision; ``shown`` is the text every view prints."""
    return _text(
        Tidy.__struct_fields__, ([getattr(row, name) for name in Tidy.__struct_fields__] for row in report.tidy)
    )


def wide(report: Report) -> str:
    """One row per cell: its axes, then each metric with the bounds of its interval."""
    metrics = list(dict.fromkeys(row.metric for row in report.tidy))
    bounded = {row.metric for row in report.tidy if row.lo is not None}
    columns = [name for key in metrics for name in ((key, f"{key}_lo", f"{key}_hi") if key in bounded else (key,))]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in report.tidy:
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
