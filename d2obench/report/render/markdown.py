"""Markdown within GitHub's limits, and what GitHub Actions reads: a job's summary and its annotations.

The page links its SVG figures by relative paths and folds its long parts away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from d2obench.report.render import Drawn, Files
from d2obench.report.view import FIRST, Case, Column, Field, Figure, Mark, Report, Table, printable

MAX_ROWS, MAX_TEXT = 120, 160
"""Rows of a table, and characters of a field."""
SUMMARY_BYTES = 900_000
"""GitHub drops the summary of a step (``$GITHUB_STEP_SUMMARY``) if it is larger than 1 MiB."""
COMMENT_BYTES = 64_000
"""A comment on a pull request holds 65,536 characters."""
MAX_ANNOTATIONS = 9
"""GitHub shows ten annotations of a step; the tenth is a notice with the verdict."""
LEVELS = {"failure": "error", "error": "error", "skipped": "warning"}
"""How a case ended → the level of its annotation; other cases have none."""
SIGNS: dict[Mark, str] = {"bad": "❌ ", "warn": "❔ ", "best": "✅ ", "quiet": "✔️ ", "": ""}
"""Signs in front of a verdict, because Markdown shows no colours."""
_RESERVE = 1_000
"""Bytes kept free for the sentence that says what was cut off."""
_SPECIAL = re.compile(r"[\\`*<>|~$]|(?<![^\W_])[_@]|[_@](?![^\W_])|&(?=[#\w]+;)|!(?=\[)|\](?=[(\[:])")


def files(report: Report, drawn: Drawn) -> Files:
    """One Markdown file that shows the figures."""
    return [(f"{report.name}.md", markdown(report, drawn))]


def github_files(report: Report, drawn: Drawn) -> Files:
    """A job summary for GitHub."""
    return [("summary.md", summary(report))]


def summary(report: Report) -> str:
    """The page as Markdown, cut to the size that GitHub accepts as the summary of a step."""
    return markdown(report, limit=SUMMARY_BYTES)


def workflow_commands(report: Report) -> str:
    """GitHub's workflow commands, one a line: ``::error title=…::…`` for the worst cases, then a ``::notice`` with the
    verdict."""
    bad = [case for case in report.cases if case.outcome in LEVELS]
    lines = [_command(LEVELS[case.outcome], f"{case.status} {case.id}", _message(case)) for case in bad]
    more = f"; {len(bad) - MAX_ANNOTATIONS} more in the summary" if len(bad) > MAX_ANNOTATIONS else ""
    verdict = report.verdict[0] if report.verdict else ""
    notice = _command("notice", f"d2obench {report.title}", verdict + more)
    return "\n".join([*lines[:MAX_ANNOTATIONS], notice]) + "\n"


def markdown(report: Report, figures: Iterable[str] = (), limit: int | None = None) -> str:
    """The page.

    Args:
        report: the content of the page.
        figures: ids of the figures that are stored as SVG in the folder ``figures/`` beside the page.
        limit: the largest size in bytes. A longer page ends with the last part, or the last row of a table, that fits.
    """
    drawn = set(figures)
    shown = [figure for figure in report.figures if figure.id in drawn]
    parts = [f"# {escape(report.title)}"]
    if report.subtitle:
        parts.append(escape(report.subtitle, 1000))
    parts += [f"> **Note.** {escape(line, 1000)}" for line in report.warnings]
    parts += ["\n".join(f"- {escape(line, None)}" for line in report.verdict)]
    for made in report.headline:
        parts += [f"## {escape(made.title)}", table(made)]
    parts += [_figure(figure) for figure in shown if figure.kind == FIRST]
    for made in report.targets:
        parts += [f"## {escape(made.title)}", table(made)]
    if report.reading or report.notes:
        parts += ["\n".join(f"- {escape(line, None)}" for line in (*report.reading, *report.notes))]
    if report.again:
        parts += [f"## {report.again_title}", code("\n".join(report.again), "sh")]
    parts += [_folded(made.title, table(made)) for made in (*report.tables, *report.glossary, *report.machine)]
    parts += [_folded(figure.title, _figure(figure)) for figure in shown if figure.kind != FIRST]
    parts += [_folded(made.title, table(made)) for made in (report.cells, *report.environment) if made.columns]
    parts += [_folded(f"The suite of {name}, resolved", code(suite, "toml")) for name, suite in report.suites]
    return _within(parts, limit) if limit else "\n\n".join(parts) + "\n"


def _figure(figure: Figure) -> str:
    picture = f"![{escape(figure.title)}](figures/{figure.id}.svg)"
    return f"{picture}\n\n{escape(figure.about, None)} Data: [{figure.id}.csv](figures/{figure.id}.csv)"


def table(shown: Table, limit: int = MAX_ROWS) -> str:
    """A table of at most ``limit`` rows. The best figures are bold; an interval follows its figure in small print."""
    lines = ["| " + " | ".join(escape(column.title) for column in shown.columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.numeric else " :--- " for column in shown.columns) + "|")
    lines += ["| " + " | ".join(map(_field, shown.columns, row)) + " |" for row in shown.rows[:limit]]
    hidden = shown.left_out + max(0, len(shown.rows) - limit)
    notes = [*shown.notes, *([f"{hidden} more rows are in the CSV or JSON file."] if hidden else [])]
    return "\n".join(lines) + "".join(f"\n\n{escape(note, None)}" for note in notes)


def escape(text: str, limit: int | None = MAX_TEXT) -> str:
    """Text that is shown literally: without effect as markup, HTML, table separator or mention of a user, and without
    control characters and characters that change the direction of text."""
    text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return _SPECIAL.sub(r"\\\g<0>", printable(text))


def code(text: str, language: str = "") -> str:
    """A fenced block of code; its fence is longer than any fence inside."""
    text = printable(text, keep="\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _field(column: Column, field: Field) -> str:
    text = escape(field.text)
    if column.key in ("verdict", "outcome"):
        return f"{SIGNS[field.mark]}{text}"
    if field.mark == "best":
        text = f"**{text}**"
    if field.interval:
        text += f" <sub>{escape(field.interval)}</sub>"
    return text


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n\n{body}\n\n</details>"


def _within(parts: Iterable[str], limit: int) -> str:
    """The parts that fit into ``limit`` bytes.

    Of the first part that does not fit, as many whole lines are kept as fit; a folded part or a code block is left out,
    because half of it would break the page.
    """
    kept: list[str] = []
    room = limit - _RESERVE
    for part in parts:
        size = len(part.encode()) + 2
        if size > room:
            lines = [] if part.startswith(("<", "`")) else part.split("\n")
            while lines and len("\n".join(lines).encode()) > room:
                lines.pop()
            cut = part.count("\n") + 1 - len(lines)
            kept += ["\n".join(lines)] if lines else []
            kept.append(f"{cut} more rows and whatever stood below did not fit here; the files have everything.")
            break
        kept.append(part)
        room -= size
    return "\n\n".join(kept) + "\n"


def _message(case: Case) -> str:
    return "; ".join(filter(None, (case.group, case.reason)))[:1000]


def _command(level: str, title: str, message: str) -> str:
    named = _workflow_text(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={named}::{_workflow_text(message)}"


def _workflow_text(text: str) -> str:
    """One line of text in which GitHub finds no further command."""
    return printable(" ".join(text.split())).replace("%", "%25")
