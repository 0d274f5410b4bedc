"""GitHub: the summary of a job (``$GITHUB_STEP_SUMMARY``) and annotations, both kept below GitHub's limits."""

from __future__ import annotations

from d2obench.report.render import Drawn, Files
from d2obench.report.render.markdown import SUMMARY_BYTES, markdown
from d2obench.report.view import Case, Report, printable

MOST_ANNOTATIONS = 9
"""GitHub shows ten a step; the tenth counts all."""
LEVELS = {"failure": "error", "error": "error", "skipped": "warning"}


def files(report: Report, drawn: Drawn) -> Files:
    """A job summary."""
    return [("summary.md", summary(report))]


def summary(report: Report) -> str:
    """The page as markdown, cut to what GitHub takes of a step."""
    return markdown(report, limit=SUMMARY_BYTES)


def workflow_commands(report: Report) -> str:
    """``::error title=…::…`` lines in the order of the cases, worst first, and a last ``::notice`` with the verdict."""
    bad = [case for case in report.cases if case.outcome in LEVELS]
    lines = [_command(LEVELS[case.outcome], f"{case.status} {case.id}", _message(case)) for case in bad]
    more = f"; {len(bad) - MOST_ANNOTATIONS} more in the summary" if len(bad) > MOST_ANNOTATIONS else ""
    verdict = report.verdict[0] if report.verdict else ""
    notice = _command("notice", f"d2obench {report.title}", verdict + more)
    return "\n".join([*lines[:MOST_ANNOTATIONS], notice]) + "\n"


def _message(case: Case) -> str:
    return "; ".join(filter(None, (case.group, case.reason)))[:1000]


def _command(level: str, title: str, message: str) -> str:
    named = _escape(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={named}::{_escape(message)}"


def _escape(text: str) -> str:
    """One line in which nothing is a command."""
    return printable(" ".join(text.split())).replace("%", "%25")
