"""A report on a terminal, printed by rich: its sentences, one table that fits 100 columns, and how to read the table.

The format ``svg`` is a picture of such a terminal.
"""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from d2obench.report.render import Drawn, Files
from d2obench.report.view import Field, Report, Table, printable

STYLES = {"": "", "best": "bold green", "warn": "yellow", "bad": "red", "quiet": "dim"}
WIDTH = 100
"""Columns of the terminal in the picture."""


def files(report: Report, drawn: Drawn) -> Files:
    """A picture of the terminal on which the report is printed."""
    return [("terminal.svg", picture(report))]


def picture(report: Report) -> str:
    """The printed report as SVG. It is drawn in a font of the reader's machine, so that nothing is fetched."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, color_system="truecolor", no_color=False)
    show_report(report, console)
    text = console.export_svg(title=printable(report.title), unique_id="terminal")
    return re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)


def show_report(report: Report, console: Console) -> None:
    """Prints what a reader needs first; the files hold the rest."""
    for line in report.warnings:
        console.print(Text(f"! {printable(line)}", style="bold yellow"))
    for line in report.verdict:
        console.print(Text(f"• {printable(line)}"))
    console.print()
    for table in (*(report.headline or report.tables), *report.targets):
        show_table(table, console)
    for line in (*report.reading, *report.notes):
        console.print(Text(printable(line), style="dim"))


def show_verdicts(report: Report, console: Console, *, every: bool = False) -> None:
    """Prints the outcome of a gate or a comparison; ``every`` adds the figures that are in order."""
    console.print(Text(printable(f"{report.title}; {report.subtitle}")))
    for table in (*report.headline, *(report.tables if every else ())):
        show_table(table, console)
    for line in report.warnings:
        console.print(Text(f"note: {printable(line)}"))
    for line in report.again:
        console.print(Text(f"run: {printable(line)}"), soft_wrap=True)
    for line in report.verdict:
        console.print(Text(printable(line), style="bold"))


def show_table(table: Table, console: Console) -> None:
    """Prints a table; if it is too wide for the terminal, lines are broken within its fields."""
    made = RichTable(title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    made.title = Text(printable(table.title), style="bold")
    for column in table.columns:
        head = Text(printable(column.title).replace(" − ", " −\n").replace(", ", "\n").replace(" · ", "\n· "))
        made.add_column(head, justify="right" if column.numeric else "left", overflow="fold", vertical="bottom")
    for number, row in enumerate(table.rows):
        if number in table.groups and made.row_count:
            made.add_row()
        made.add_row(*map(_text, row))
    console.print(made)
    notes = [*table.notes, *([f"{table.left_out} more rows are in results.csv."] if table.left_out else [])]
    for note in notes:
        console.print(Text(printable(note), style="dim"))


def _text(field: Field) -> Text:
    text = Text(printable(field.text), style=STYLES[field.mark])
    if field.half:
        text.append(f" ±{field.half}", style="not bold dim")
    elif field.lo and not field.range_of:
        text.append(f"\n{field.lo}…{field.hi}", style="not bold dim")
    return text
