"""A report on a terminal: what it says, the headline tables and the notes, by rich."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from d2obench.report.view import Field, Report, Table, printable

STYLES = {"": "", "best": "bold green", "warn": "yellow", "bad": "red", "quiet": "dim"}


def show_report(report: Report, console: Console, *, every: bool = False) -> None:
    """Prints what a reader wants first; the files hold the rest. ``every`` adds the tables that stand below."""
    for table in report.headline[:1] or report.tables:
        show_table(table, console)
    for table in (*report.targets, *(report.tables if every else ())):
        show_whole(table, console)
    for line in report.reading:
        console.print(Text(printable(line), style="dim"))
    for line in report.warnings:
        console.print(Text(f"! {printable(line)}", style="yellow"))
    for line in report.verdict:
        console.print(Text(f"• {printable(line)}"))


def show_verdicts(report: Report, console: Console, *, every: bool = False) -> None:
    """A gate's or comparison's outcome; ``every`` adds what is in order."""
    console.print(Text(printable(f"{report.title}; {report.subtitle}")))
    for table in (*report.headline, *(report.tables if every else ())):
        show_whole(table, console)
    for line in report.warnings:
        console.print(Text(f"note: {printable(line)}"))
    for line in report.again:
        console.print(Text(f"run: {printable(line)}"), soft_wrap=True)
    for line in report.verdict:
        console.print(Text(printable(line), style="bold"))


def show_table(table: Table, console: Console) -> None:
    """A table; where it is wider than the terminal its columns are shown in turns, the axes each time."""
    first = sum(not column.numeric for column in table.columns[: _axes(table)])
    blocks = _blocks(table, first, console)
    for number, places in enumerate(blocks):
        made = _rich(table, places, first if number else 0)
        made.title = Text(printable(table.title) + (" (continued)" if number else ""), style="bold")
        console.print(made)
    if table.left_out:
        console.print(Text(f"{table.left_out} more rows are in results.csv", style="dim"))


def show_whole(table: Table, console: Console) -> None:
    """A table of few columns in one piece; what is too wide for the terminal is broken inside its fields."""
    made = _rich(table, list(range(len(table.columns))))
    made.title = Text(printable(table.title), style="bold")
    console.print(made)


def _axes(table: Table) -> int:
    """How many columns stand before the first figure."""
    return next((i for i, column in enumerate(table.columns) if column.numeric), len(table.columns))


def _blocks(table: Table, first: int, console: Console) -> list[list[int]]:
    blocks: list[list[int]] = [list(range(first))]
    for place in range(first, len(table.columns)):
        tried = [*blocks[-1], place]
        if len(blocks[-1]) > first and _width(table, tried, console) > console.width:
            blocks.append([*range(first), place])
        else:
            blocks[-1] = tried
    return blocks


def _width(table: Table, places: list[int], console: Console) -> int:
    """The width that needs no line to be broken."""
    return Measurement.get(console, console.options.update_width(10_000), _rich(table, places)).maximum


def _rich(table: Table, places: list[int], first: int = 0) -> RichTable:
    """The columns at ``places``; where all from ``first`` on are words, only rows that have any."""
    words = [place for place in places if place >= first] if first else []
    only = bool(words) and not any(table.columns[place].numeric for place in words)
    made = RichTable(title_justify="left", header_style="bold", pad_edge=False)
    for place in places:
        column = table.columns[place]
        head = Text(printable(column.title).replace(" − ", " −\n").replace(", ", "\n").replace(" · ", "\n· "))
        made.add_column(head, justify="right" if column.numeric else "left", overflow="fold")
    for number, row in enumerate(table.rows):
        if only and not any(row[place].text for place in words):
            continue
        if number in table.groups and made.row_count:
            made.add_section()
        made.add_row(*(_text(row[place]) for place in places))
    return made


def _text(field: Field) -> Text:
    text = Text(printable(field.text), style=STYLES[field.mark])
    if field.half or field.range_of:
        text.append(f" ±{field.half}" if field.half else f" (range of {field.range_of})", style="not bold dim")
    return text
