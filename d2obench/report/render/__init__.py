"""Renderers: a :class:`~d2obench.report.view.Report` in one format each. They format and escape, and compute nothing.

A renderer is called with the report and with its figures as SVG by id (empty unless a format that shows them was
asked for); it returns file names with their texts. Another package offers one under the entry-point group
``d2obench.renderers``; ``d2obench report --format`` then takes its name.
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
    {
        "md": "d2obench.report.render.markdown:files",
        "csv": "d2obench.report.render.csvs:files",
        "html": "d2obench.report.render.html:files",
        "json": "d2obench.report.render.json:files",
        "junit": "d2obench.report.render.junit:files",
        "github": "d2obench.report.render.github:files",
    },
    UsageError,
)
FORMATS = ("md", "csv", "html", "json", "junit", "github")
DRAWN = frozenset({"md", "html"})
"""Formats that show the figures."""
