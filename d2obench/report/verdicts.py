"""The formats of a gate's or comparison's outcome: name → function from :class:`Verdicts` to text."""

from __future__ import annotations

from collections.abc import Callable

from d2obench.errors import UsageError
from d2obench.report.verdicts_github import workflow_commands
from d2obench.report.verdicts_json import to_json
from d2obench.report.verdicts_junit import junit
from d2obench.report.verdicts_markdown import markdown
from d2obench.report.verdicts_text import text
from d2obench.stats.verdict import Verdicts

FORMATS: dict[str, Callable[[Verdicts], str]] = {
    "text": text,
    "json": to_json,
    "markdown": markdown,
    "github": workflow_commands,
    "junit": junit,
}


def render(name: str, verdicts: Verdicts) -> str:
    """``verdicts`` in the format ``name``.

    Raises:
        UsageError: no such format.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format '{name}'", remedy=f"use one of {', '.join(FORMATS)}")
    return FORMATS[name](verdicts)
