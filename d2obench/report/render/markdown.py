"""Markdown within GitHub's limits: tables, SVG figures linked relatively, the long parts folded away."""

from __future__ import annotations

import re
from collections.abc import Iterable

from d2obench.report.view import Entry, Report, Table

MAX_ROWS, MAX_TEXT = 120, 160
_SPECIAL = re.compile(r"[\\`*<>|~$]|(?<![^\W_])[_@]|[_@](?![^\W_])|&(?=[#\w]+;)|!(?=\[)|\](?=[(\[:])")


def markdown(report: Report, figures: Iterable[str] = ()) -> str:
    """The page; ``figures`` are the ids of those that lie as SVG in ``figures/``."""
    drawn = set(figures)
    parts = [f"# {escape(report.title)}"]
    if report.subtitle:
        parts.append(f"**About.** {escape(report.subtitle, 1000)}")
    parts += ["\n".join(f"- {escape(line, None)}" for line in report.verdict)]
    parts += [f"> **Note.** {escape(line, 1000)}" for line in report.warnings]
    for shown in report.headline:
        parts += [f"## {escape(shown.title)}", table(shown)]
    if report.headline:
        parts += ["\n".join(f"- {escape(line, None)}" for line in report.reading)]
    for shown in (*report.targets, *report.tables, *report.machine):
        parts += [f"## {escape(shown.title)}", table(shown)]
    if drawn:
        parts.append("## Figures")
    for figure in report.figures:
        if figure.id in drawn:
            parts += [f"### {escape(figure.title)}", f"![{escape(figure.title)}](figures/{figure.id}.svg)"]
            parts.append(f"{escape(figure.about, None)} Data: [{figure.id}.csv](figures/{figure.id}.csv)")
    parts += [f"## {escape(report.cells.title)}", _folded("every cell and how it ended", table(report.cells))]
    for shown in report.environment:
        parts += [f"## {escape(shown.title)}", _folded("every fact of it", table(shown))]
    for name, suite in report.suites:
        parts.append(_folded(f"the suite of {escape(name)}, resolved", code(suite, "toml")))
    if report.again:
        parts += ["## Run it again", code("\n".join(report.again), "sh")]
    return "\n\n".join(parts) + "\n"


def table(shown: Table, limit: int = MAX_ROWS) -> str:
    """A table of at most ``limit`` rows; the best figures are bold, an interval follows its figure."""
    lines = ["| " + " | ".join(escape(column.title) for column in shown.columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.numeric else " :--- " for column in shown.columns) + "|")
    lines += ["| " + " | ".join(map(_field, row)) + " |" for row in shown.rows[:limit]]
    hidden = shown.left_out + max(0, len(shown.rows) - limit)
    notes = [*shown.notes, *([f"{hidden} more rows are in results.csv."] if hidden else [])]
    return "\n".join(lines) + "".join(f"\n\n{escape(note, None)}" for note in notes)


def escape(text: str, limit: int | None = MAX_TEXT) -> str:
    """Text that shows as it is: no markup, no HTML, no table break, no mention, no control or bidi characters."""
    text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    text = "".join(char if char.isprintable() else "�" for char in text)
    return _SPECIAL.sub(r"\\\g<0>", text)


def code(text: str, language: str = "") -> str:
    """A fenced block whose fence is longer than any inside."""
    text = "".join(char if char.isprintable() or char == "\n" else "�" for char in text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _field(entry: Entry) -> str:
    text = escape(entry.text)
    if entry.mark == "best":
        text = f"**{text}**"
    if entry.interval:
        text += f" <sub>{escape(entry.interval)}</sub>"
    return text


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"
