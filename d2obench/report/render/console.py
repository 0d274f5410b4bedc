"""A report on a terminal, by rich: what it says, one table that fits 100 columns, and how to read it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from d2obench.report.view import Field, Report, Table, printable

STYLES = {"": "", "best": "bold green", "warn": "yellow", "bad": "red", "quiet": "dim"}


def show_report(report: Report, console: Console) -> None:
    """Prints what a reader wants first; the files hold the rest."""
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
    """A gate's or comparison's outcome; ``every`` adds what is in order."""
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
    """A table in one piece; what is too wide for the terminal is broken inside its fields."""
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
    return text
