"""Verdicts as JUnit XML: a test case a row; the numbers stand in the text, as some readers drop the attributes."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from d2obench.gate.verdict import Row, Verdict, Verdicts

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(verdicts: Verdicts) -> str:
    """One suite: failure = regression, error = a cell that ended without a figure, skipped = can't tell."""
    cases = [_case(row) for row in verdicts.rows]
    kinds = [case[0].tag if len(case) else "" for case in cases]
    counts = {
        f"{kind}s" if kind != "skipped" else kind: str(kinds.count(kind)) for kind in ("failure", "error", "skipped")
    }
    suite = ET.Element("testsuite", {"name": _clean(verdicts.title), "tests": str(len(cases)), **counts})
    suite.extend(cases)
    out = ET.SubElement(suite, "system-out")
    out.text = _clean("\n".join([f"{verdicts.base} → {verdicts.head}", *verdicts.notes, *verdicts.commands]))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, "unicode") + "\n"


def _case(row: Row) -> ET.Element:
    case = ET.Element("testcase", {"classname": _clean(row.cell), "name": _clean(row.header)})
    if row.verdict is Verdict.REGRESSED:
        _add(case, "error" if row.metric == "status" else "failure", row)
    elif row.verdict in (Verdict.INCONCLUSIVE, Verdict.INCOMPARABLE):
        _add(case, "skipped", row)
    return case


def _add(case: ET.Element, tag: str, row: Row) -> None:
    words = f"{row.verdict.value}: {row.shown(row.base)} → {row.shown(row.head)} {row.change}".strip()
    child = ET.SubElement(case, tag, {"message": _clean(words)})
    child.text = _clean("; ".join(filter(None, (words, row.reason))))


def _clean(text: str) -> str:
    return _NOT_XML.sub("�", text)
