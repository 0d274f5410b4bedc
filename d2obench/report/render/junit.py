"""JUnit XML: a test case for each cell of a run, or for each figure that a gate judged.

A regression is a failure, a cell without a figure an error, and what can't be told is skipped. The numbers stand in
the text, as some readers drop the attributes.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict

from d2obench.report.render import Drawn, Files
from d2obench.report.view import Case, Report, printable

MAX_TEXT = 4000


def files(report: Report, drawn: Drawn) -> Files:
    """A test case for each cell."""
    return [("junit.xml", junit(report))]


def junit(report: Report) -> str:
    """One suite for each run and task, or for each cell of a gate; what the report says stands in the first."""
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in report.cases:
        groups[case.run, case.group].append(case)
    root = ET.Element("testsuites", name=_text(report.title))
    for (run, group), cases in groups.items():
        counts = {
            "tests": str(len(cases)),
            "errors": str(sum(case.outcome == "error" for case in cases)),
            "skipped": str(sum(case.outcome == "skipped" for case in cases)),
            "failures": str(sum(case.outcome == "failure" for case in cases)),
            "time": f"{sum(case.seconds for case in cases):.3f}",
        }
        suite = ET.SubElement(root, "testsuite", {"name": _text(f"{run}: {group}"), **counts})
        for case in cases:
            _case(suite, case)
    if len(root):
        words = "\n".join(filter(None, (report.subtitle, *report.verdict, *report.warnings, *report.again)))
        ET.SubElement(root[0], "system-out").text = _text(words)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, case: Case) -> None:
    head = {"classname": _text(case.group), "name": _text(case.id), "time": f"{case.seconds:.3f}"}
    element = ET.SubElement(suite, "testcase", head)
    if case.outcome != "passed":
        ended = ET.SubElement(element, case.outcome, type=_text(case.status), message=_text(case.reason))
        ended.text = _text(f"{case.status}: {case.reason}")
    if case.text:
        ET.SubElement(element, "system-out").text = _text(case.text)


def _text(text: str) -> str:
    """Text of characters that XML 1.0 allows, cut to MAX_TEXT; ElementTree escapes the rest."""
    return printable(text[:MAX_TEXT], keep="\n\t")
