"""JUnit XML: a test case per cell. Failed and out-of-memory cells are errors, skipped and missing ones skipped."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict

from d2obench.report.view import Case, Report

MAX_TEXT = 4000


def junit(report: Report) -> str:
    """One suite per run and task; the figures of a cell are its system-out."""
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in report.cases:
        groups[case.run, case.group].append(case)
    root = ET.Element("testsuites", name=_clean(report.title))
    for (run, task), cases in groups.items():
        errors = sum(case.status in ("failed", "oom", "incomparable") for case in cases)
        skipped = sum(case.status in ("skipped", "missing") for case in cases)
        seconds = f"{sum(case.seconds for case in cases):.3f}"
        counts = {
            "tests": str(len(cases)),
            "errors": str(errors),
            "skipped": str(skipped),
            "failures": "0",
            "time": seconds,
        }
        suite = ET.SubElement(root, "testsuite", {"name": _clean(f"{run}: {task}"), **counts})
        for case in cases:
            _case(suite, case)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _case(suite: ET.Element, case: Case) -> None:
    head = {"classname": _clean(case.group), "name": _clean(case.id), "time": f"{case.seconds:.3f}"}
    element = ET.SubElement(suite, "testcase", head)
    if case.status in ("skipped", "missing"):
        ET.SubElement(element, "skipped", message=_clean(case.reason))
    elif case.status != "ok":
        ET.SubElement(element, "error", type=case.status, message=_clean(case.reason)).text = _clean(
            f"{case.status}: {case.reason}"
        )
    if case.text:
        ET.SubElement(element, "system-out").text = _clean(case.text)


def _clean(text: str) -> str:
    """Text of characters that XML 1.0 allows, cut to MAX_TEXT."""
    good = (char if char in "\n\t" or char.isprintable() else "�" for char in text[:MAX_TEXT])
    return "".join(good)
