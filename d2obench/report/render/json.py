"""JSON: the view model itself, from which a published report is rendered again."""

from __future__ import annotations

from d2obench.record import dump
from d2obench.report.render import Drawn, Files
from d2obench.report.view import Report


def files(report: Report, drawn: Drawn) -> Files:
    """The view model itself."""
    return [(f"{report.name}.json", dump(report).decode("utf-8", "replace") + "\n")]
