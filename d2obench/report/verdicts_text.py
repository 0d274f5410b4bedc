"""Verdicts on a terminal: a table of what needs eyes, one line for the rest."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from d2obench.gate.verdict import Row, Verdict, Verdicts, short_names

STYLE = {
    Verdict.REGRESSED: "bold red",
    Verdict.INCOMPARABLE: "magenta",
    Verdict.INCONCLUSIVE: "yellow",
    Verdict.IMPROVED: "green",
    Verdict.OK: "dim",
}


def text(verdicts: Verdicts, *, color: bool = False, width: int = 140, every: bool = False) -> str:
    """Tables for people.

    Args:
        color: ANSI colours.
        width: columns of the terminal.
        every: list the OK rows too.
    """
    out = io.StringIO()
    console = Console(
        file=out,
        force_terminal=color,
        color_system="standard" if color else None,
        width=width,
        highlight=False,
        no_color=not color,
    )
    console.print(f"{_plain(verdicts.title)}: {_plain(verdicts.base)} → {_plain(verdicts.head)}")
    rows = list(verdicts.rows) if every else [row for row in verdicts.rows if row.verdict is not Verdict.OK]
    if rows:
        console.print(_table(rows, short_names(verdicts.rows)))
    for note in verdicts.notes:
        console.print(f"note: {_plain(note)}")
    for command in verdicts.commands:
        console.print(f"run: {_plain(command)}", soft_wrap=True)
    console.print(f"[{STYLE[verdicts.worst]}]{_plain(verdicts.summary)}[/]")
    return out.getvalue()


def _plain(words: str) -> str:
    """Without control characters and markup."""
    return escape(re.sub(r"[\x00-\x1f\x7f]+", " ", words))


def _table(rows: list[Row], names: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("cell", overflow="fold", min_width=12)
    table.add_column("metric", overflow="fold", min_width=8)
    for header in ("base", "head", "change"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_column("why", overflow="fold", min_width=16)
    for row in rows:
        figures = (row.shown(row.base), row.shown(row.head), row.change, row.reason)
        words = (names[row.cell], row.header, *figures)
        table.add_row(f"[{STYLE[row.verdict]}]{row.verdict.value}[/]", *map(_plain, words))
    return table
