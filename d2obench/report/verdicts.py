"""The formats of a gate's or comparison's outcome: name → function from :class:`Verdicts` to text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from d2obench.errors import UsageError
from d2obench.gate.verdict import Verdicts
from d2obench.report.verdicts_github import workflow_commands
from d2obench.report.verdicts_html import draw, page
from d2obench.report.verdicts_json import to_json
from d2obench.report.verdicts_junit import junit
from d2obench.report.verdicts_markdown import markdown
from d2obench.report.verdicts_text import text

FORMATS: dict[str, Callable[[Verdicts, Mapping[str, str] | None], str]] = {
    "text": lambda verdicts, drawn: text(verdicts),
    "json": lambda verdicts, drawn: to_json(verdicts),
    "markdown": lambda verdicts, drawn: markdown(verdicts, figures=drawn or ()),
    "html": lambda verdicts, drawn: page(verdicts, draw(verdicts) if drawn is None else drawn),
    "github": lambda verdicts, drawn: workflow_commands(verdicts),
    "junit": lambda verdicts, drawn: junit(verdicts),
}


def render(name: str, verdicts: Verdicts, drawn: Mapping[str, str] | None = None) -> str:
    """``verdicts`` in the format ``name``; ``drawn`` are forest plots that lie beside the file, SVG by id.

    Raises:
        UsageError: no such format.
    """
    check([name])
    return FORMATS[name](verdicts, drawn)


def check(names: Iterable[str]) -> None:
    """An unknown format is a UsageError, before anything is written."""
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"unknown format '{name}'", remedy=f"use one of {', '.join(FORMATS)}")
