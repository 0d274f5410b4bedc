"""``d2obench history``: figures of runs and gates over time, in one file of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)

Source = Annotated[
    Path, typer.Argument(metavar="RUN|VERDICTS", help="Give the folder of a run, or the verdicts.json of a gate.")
]
File = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="Keep the history in this file: --file reports/history.jsonl.")
]
CellName = Annotated[
    str,
    typer.Option(
        "--cell", metavar="TEXT", help="Show only cells whose name contains this text: --cell d2o. By default, all."
    ),
]
MetricName = Annotated[
    str, typer.Option("--metric", metavar="NAME", help="Show only this figure: --metric tpot_s. By default, all.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write history.html, with a line per figure, and history.md to this folder. By default, only the table is "
        "printed.",
    ),
]
Keep = Annotated[
    int, typer.Option("--keep", min=1, help="Keep so many entries of each suite on each class of machine: --keep 500.")
]
DEFAULT = Path("d2obench-history.jsonl")


@app.callback()
def root() -> None:
    """Keep figures of runs and gates over time, and see when a level changed.

    The file only grows at its end, one line for each run or gate. Commit it, or keep it on a branch of its own: git
    merges the lines of two branches by itself.

    Example: d2obench history add d2obench-gate/verdicts.json
    """


@app.command()
def add(source: Source, file: File = DEFAULT) -> None:
    """Append the figures of a run, or of the head of a gate. An entry that is there already is not added again.

    Example: d2obench history add d2obench-runs/20260101-quick
    """
    from d2obench.gate.history import add as append
    from d2obench.gate.history_entry import entry_of_run, entry_of_verdicts
    from d2obench.record import read_run

    verdicts = source if source.suffix == ".json" else source / "verdicts.json"
    entry = entry_of_verdicts(verdicts) if verdicts.is_file() else entry_of_run(read_run(source))
    added = append(file, entry)
    figures = sum(map(len, entry.figures.values()))
    typer.echo(f"{file}: {figures} figures of {entry.commit[:12]} {'added' if added else 'are there already'}")


@app.command()
def show(file: File = DEFAULT, cell: CellName = "", metric: MetricName = "", output: Output = None) -> None:
    """Show every figure's last value, its level, and the commit at which the level last changed.

    Example: d2obench history show --metric tpot_s --output history
    """
    from rich.console import Console

    from d2obench.errors import UsageError
    from d2obench.gate.history import read
    from d2obench.metric import METRICS
    from d2obench.report.history import view
    from d2obench.report.render import write_report
    from d2obench.report.render.console import show_report

    if metric and metric not in METRICS:
        raise UsageError(f"no metric is called '{metric}'", remedy="see d2obench list metrics")
    page = view(read(file), cell=cell, metric=metric)
    show_report(page, Console())
    if output is not None:
        for written in write_report(page, output, ["html", "md"]):
            if written.parent == output:
                typer.echo(str(written))


@app.command()
def repair(file: File = DEFAULT) -> None:
    """Remove lines that can't be read, such as an incomplete last one or the marks of an unsolved merge.

    Example: d2obench history repair
    """
    from d2obench.gate.history import repair as mend

    removed = mend(file)
    for line in removed:
        typer.echo(line)
    typer.echo(f"{file}: {len(removed)} lines removed")


@app.command()
def prune(keep: Keep, file: File = DEFAULT) -> None:
    """Remove all but the newest entries of each suite on each class of machine.

    Example: d2obench history prune --keep 500
    """
    from d2obench.gate.history import prune as shorten

    typer.echo(f"{file}: {shorten(file, keep)} entries removed")
