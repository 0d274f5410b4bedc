"""Formats for other programs: CSV, JSON and JUnit XML.

CSV has one row for each figure of each cell, one row for each cell, the suite's targets, and the points of each figure.
JSON is the view model itself, from which a published report is rendered again. JUnit has one test case for each cell of
a run, or for each figure that a gate judged: a regression is a failure, a cell without a figure is an error, and a case
that can't be decided is skipped. The figures stand in the text of a case, because some readers drop its attributes.
"""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from d2obench.record import dump
from d2obench.report.render import Drawn, Files
from d2obench.report.view import Case, CsvRow, Figure, Report, printable

AXES = CsvRow.__struct_fields__[: CsvRow.__struct_fields__.index("metric")]
"""The columns of ``results.csv`` that say which cell a row belongs to."""
MAX_TEXT = 4000
"""Characters of one text in JUnit XML."""


def csv_files(report: Report, drawn: Drawn) -> Files:
    """One table with a row for each figure, one with a row for each cell, and one with the suite's targets, if any."""
    made = [("results.csv", results(report)), ("results-wide.csv", wide(report))]
    return [*made, ("targets.csv", targets(report))] if report.targets else made


def json_files(report: Report, drawn: Drawn) -> Files:
    """The view model itself."""
    return [(f"{report.name}.json", dump(report).decode("utf-8", "replace") + "\n")]


def junit_files(report: Report, drawn: Drawn) -> Files:
    """A test case for each cell of a run, or for each figure that a gate judged."""
    return [("junit.xml", junit(report))]


def results(report: Report) -> str:
    """Every figure of every cell, in base units and full precision; ``shown`` is the text that every view prints."""
    names = CsvRow.__struct_fields__
    return _csv(names, ([getattr(row, name) for name in names] for row in report.results))


def wide(report: Report) -> str:
    """One row for each cell: its axes, then each metric, followed by its bounds if any cell has bounds for it."""
    metrics = list(dict.fromkeys(row.metric for row in report.results))
    bounded = {row.metric for row in report.results if row.lo is not None}
    columns = [name for key in metrics for name in ((key, f"{key}_lo", f"{key}_hi") if key in bounded else (key,))]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in report.results:
        found = cells.setdefault(tuple(getattr(row, name) for name in AXES), {"flags": row.flags})
        found |= {row.metric: row.value, f"{row.metric}_lo": row.lo, f"{row.metric}_hi": row.hi}
    rows = ([*axes, *(values.get(name) for name in columns), values["flags"]] for axes, values in cells.items())
    return _csv([*AXES, *columns, "flags"], rows)


def targets(report: Report) -> str:
    """The suite's targets as every view shows them; the bounds of a measured figure have columns of their own."""
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
    return _csv(head, rows)


def points(figure: Figure) -> str:
    """The points of a figure as CSV."""
    return _csv(figure.columns, figure.rows)


def junit(report: Report) -> str:
    """JUnit XML with one suite for each run and task, or for each cell of a gate.

    What the report says in sentences is the output of the first suite.
    """
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in report.cases:
        groups[case.run, case.group].append(case)
    root = ET.Element("testsuites", name=_xml(report.title))
    for (run, group), cases in groups.items():
        counts = {
            "tests": str(len(cases)),
            "errors": str(sum(case.outcome == "error" for case in cases)),
            "skipped": str(sum(case.outcome == "skipped" for case in cases)),
            "failures": str(sum(case.outcome == "failure" for case in cases)),
            "time": f"{sum(case.seconds for case in cases):.3f}",
        }
        suite = ET.SubElement(root, "testsuite", {"name": _xml(f"{run}: {group}"), **counts})
        for case in cases:
            _add_case(suite, case)
    if len(root):
        words = "\n".join(filter(None, (report.subtitle, *report.verdict, *report.warnings, *report.again)))
        ET.SubElement(root[0], "system-out").text = _xml(words)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add_case(suite: ET.Element, case: Case) -> None:
    head = {"classname": _xml(case.group), "name": _xml(case.id), "time": f"{case.seconds:.3f}"}
    element = ET.SubElement(suite, "testcase", head)
    if case.outcome != "passed":
        ended = ET.SubElement(element, case.outcome, type=_xml(case.status), message=_xml(case.reason))
        ended.text = _xml(f"{case.status}: {case.reason}")
    if case.text:
        ET.SubElement(element, "system-out").text = _xml(case.text)


def _xml(text: str) -> str:
    """At most MAX_TEXT characters, all of which XML 1.0 allows; ElementTree escapes markup."""
    return printable(text[:MAX_TEXT], keep="\n\t")


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_safe(value) for value in row] for row in rows)
    return out.getvalue()


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula gets an apostrophe in front; NUL is replaced."""
    if not isinstance(value, str):
        return value
    value = value.replace("\0", "�")
    return f"'{value}" if value.startswith(("=", "@", "\t", "\r")) else value
