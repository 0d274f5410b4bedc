"""The formats of ``d2obench report --format``: names to renderers, built in or of other packages.

A renderer is called with the :class:`~d2obench.report.view.Report` and with its figures as SVG by id (empty unless a
format that shows them was asked for, too); it gives file names and their texts. Another package offers one under the
entry-point group ``d2obench.renderers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from d2obench.errors import UsageError
from d2obench.plugin import Registry
from d2obench.report.view import Report

Drawn = Mapping[str, str]
Files = Iterable[tuple[str, str]]
Renderer = Callable[[Report, Drawn], Files]

RENDERERS = Registry(
    "format",
    "d2obench.renderers",
    {name: f"d2obench.report.formats:{name}_files" for name in ("md", "csv", "html", "json", "junit", "github")},
    UsageError,
)
FORMATS = ("md", "csv", "html", "json", "junit", "github")
DRAWN = frozenset({"md", "html"})
"""Formats that show the figures."""


def md_files(report: Report, drawn: Drawn) -> Files:
    """One Markdown file that shows the figures."""
    from d2obench.report.render.markdown import markdown

    return [("report.md", markdown(report, dict(drawn)))]


def csv_files(report: Report, drawn: Drawn) -> Files:
    """One line a figure, one line a row, and one line a target where the suite states any."""
    from d2obench.report.render import csvs

    files = [("results.csv", csvs.tidy(report)), ("results-wide.csv", csvs.wide(report))]
    return [*files, ("targets.csv", csvs.targets(report))] if report.targets else files


def html_files(report: Report, drawn: Drawn) -> Files:
    """One self-contained page."""
    from d2obench.report.render.html import html

    return [("report.html", html(report, dict(drawn)))]


def json_files(report: Report, drawn: Drawn) -> Files:
    """The view model itself."""
    from d2obench.record import dump

    return [("report.json", dump(report).decode("utf-8", "replace") + "\n")]


def junit_files(report: Report, drawn: Drawn) -> Files:
    """A test case a cell."""
    from d2obench.report.render.junit import junit

    return [("junit.xml", junit(report))]


def github_files(report: Report, drawn: Drawn) -> Files:
    """A job summary."""
    from d2obench.report.render.github import summary

    return [("summary.md", summary(report))]
