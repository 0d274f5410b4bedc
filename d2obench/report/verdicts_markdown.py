"""Verdicts as GitHub markdown, cut to a size: a step summary holds 1 MiB, a comment 65,536 characters.

The rows stand worst first, so what is cut is what matters least; the OK rows are folded.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from d2obench.gate.verdict import Row, Verdict, Verdicts

SUMMARY_BYTES = 900_000
COMMENT_BYTES = 64_000
_RESERVE = 2_000
_HEAD = "| verdict | cell | metric | base | head | change | why |\n|---|---|---|--:|--:|--:|---|\n"
_SIGN = {
    Verdict.REGRESSED: "❌",
    Verdict.INCOMPARABLE: "🚫",
    Verdict.INCONCLUSIVE: "❔",
    Verdict.IMPROVED: "✅",
    Verdict.OK: "✔️",
}


def markdown(verdicts: Verdicts, limit: int = SUMMARY_BYTES, figures: Iterable[str] = ()) -> str:
    """The whole as markdown of at most ``limit`` bytes; ``figures`` are the ids of those that lie beside it as SVG."""
    parts = [
        f"### {_SIGN[verdicts.worst]} {_plain(verdicts.title)}: {verdicts.worst.value}\n\n",
        f"`{_code(verdicts.base)}` → `{_code(verdicts.head)}`: ",
        ", ".join(f"{count} {verdict.value}" for verdict, count in verdicts.counts.items()) + "\n\n",
    ]
    parts += [f"- {_plain(note)}\n" for note in verdicts.notes[:20]]
    if verdicts.notes:
        parts.append("\n")
    if verdicts.commands:
        parts.append("```console\n" + "\n".join(map(_code, verdicts.commands[:20])) + "\n```\n\n")
    parts += [f"![{name}]({name}.svg)\n\n" for name in figures]
    room = limit - _RESERVE - sum(len(part.encode()) for part in parts)
    eyes, fine = verdicts.of(*list(Verdict)[:-1]), verdicts.of(Verdict.OK)
    table = _fit(eyes, room)
    folded = _fit(fine, room - len(table.encode()))
    if folded:
        folded = f"\n<details><summary>{len(fine)} OK</summary>\n\n{folded}\n</details>\n"
    return "".join([*parts, table, folded])


def comment(verdicts: Verdicts) -> str:
    """What fits into a pull-request comment."""
    return markdown(verdicts, COMMENT_BYTES)


def _fit(rows: Iterable[Row], room: int) -> str:
    rows, lines, used = list(rows), [], len(_HEAD)
    for row in rows:
        line = _line(row)
        used += len(line.encode())
        if used > room:
            break
        lines.append(line)
    if not rows:
        return ""
    rest = len(rows) - len(lines)
    return (
        _HEAD * bool(lines)
        + "".join(lines)
        + (f"\n… and {rest} more rows; the JSON output has them all.\n" if rest else "")
    )


def _line(row: Row) -> str:
    figures = (row.shown(row.base), row.shown(row.head), row.change, row.reason)
    words = (f"{_SIGN[row.verdict]} {row.verdict.value}", row.cell, row.header, *figures)
    return "| " + " | ".join(map(_plain, words)) + " |\n"


def _plain(text: str) -> str:
    """One line without markup: no HTML, no cell border, no control character, no mention, no link."""
    flat = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return re.sub(r"([|`*_\[\]\\@])", r"\\\1", html.escape(flat, quote=False))[:2000]


def _code(text: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f`|<>]+", " ", text)[:500]
