"""The summary of a GitHub job (``$GITHUB_STEP_SUMMARY``): verdict and headline tables, kept below its size limit."""

from __future__ import annotations

from d2obench.report.render.markdown import escape, table
from d2obench.report.view import Report

LIMIT = 900_000
"""Bytes; GitHub drops a step's summary above 1 MiB."""


def summary(report: Report) -> str:
    """Verdict, notes, cells that gave nothing, headline tables; what would pass LIMIT is left out."""
    parts = [f"## {escape(report.title)}", "\n".join(f"- {escape(line, None)}" for line in report.verdict)]
    parts += [f"> {escape(line, 1000)}" for line in report.warnings]
    bad = [case for case in report.cases if case.status != "ok"]
    if bad:
        lines = [f"- `{case.status}` {escape(case.id)}: {escape(case.reason, 300)}" for case in bad[:50]]
        more = [f"- and {len(bad) - 50} more"] if len(bad) > 50 else []
        parts.append(
            f"<details><summary>{len(bad)} cells without figures</summary>\n\n"
            + "\n".join(lines + more)
            + "\n\n</details>"
        )
    for shown in (*report.headline, *report.targets):
        parts += [f"### {escape(shown.title)}", table(shown)]
    parts += ["\n".join(f"- {escape(line, None)}" for line in report.reading)]
    kept: list[str] = []
    for part in parts:
        if sum(len(text.encode()) + 2 for text in kept) + len(part.encode()) > LIMIT - 200:
            kept.append("The rest is too long for a summary; see report.md.")
            break
        kept.append(part)
    return "\n\n".join(kept) + "\n"
