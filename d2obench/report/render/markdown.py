"""Markdown within GitHub's limits: tables, SVG figures linked relatively, the long parts folded away."""

from __future__ import annotations

import re
from collections.abc import Iterable

from d2obench.report.render import Drawn, Files
from d2obench.report.view import FIRST, Column, Field, Figure, Mark, Report, Table, printable

MAX_ROWS, MAX_TEXT = 120, 160
SUMMARY_BYTES = 900_000
"""GitHub drops a step's summary above 1 MiB."""
COMMENT_BYTES = 64_000
"""A comment on a pull request holds 65,536 characters."""
_RESERVE = 1_000
SIGNS: dict[Mark, str] = {"bad": "❌ ", "warn": "❔ ", "best": "✅ ", "quiet": "✔️ ", "": ""}
"""Stand before a verdict; colours are lost in markdown."""
_SPECIAL = re.compile(r"[\\`*<>|~$]|(?<![^\W_])[_@]|[_@](?![^\W_])|&(?=[#\w]+;)|!(?=\[)|\](?=[(\[:])")


def files(report: Report, drawn: Drawn) -> Files:
    """One Markdown file that shows the figures."""
    return [(f"{report.name}.md", markdown(report, drawn))]


def markdown(report: Report, figures: Iterable[str] = (), limit: int | None = None) -> str:
    """The page.

    Args:
        report: what stands on it.
        figures: ids of the figures that lie as SVG in ``figures/`` beside it.
        limit: bytes; tables lose their last rows first, then parts are left out from the end.
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
    """A table of at most ``limit`` rows; the best figures are bold, an interval follows its figure."""
    lines = ["| " + " | ".join(escape(column.title) for column in shown.columns) + " |"]
    lines.append("|" + "|".join(" ---: " if column.numeric else " :--- " for column in shown.columns) + "|")
    lines += ["| " + " | ".join(map(_field, shown.columns, row)) + " |" for row in shown.rows[:limit]]
    hidden = shown.left_out + max(0, len(shown.rows) - limit)
    notes = [*shown.notes, *([f"{hidden} more rows are in the CSV or JSON file."] if hidden else [])]
    return "\n".join(lines) + "".join(f"\n\n{escape(note, None)}" for note in notes)


def escape(text: str, limit: int | None = MAX_TEXT) -> str:
    """Text that shows as it is: no markup, no HTML, no table break, no mention, no control or bidi characters."""
    text = " ".join(text.split())
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return _SPECIAL.sub(r"\\\g<0>", printable(text))


def code(text: str, language: str = "") -> str:
    """A fenced block whose fence is longer than any inside."""
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
    """The parts as far as they fit; of the first that does not, as many whole lines as do (never of a folded one)."""
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
