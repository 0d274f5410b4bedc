"""``d2obench report`` renders runs again; ``d2obench report publish`` copies one to the published runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class RunsOrCommand(TyperGroup):
    """Lets ``report RUN …`` mean ``report render RUN …``: a first word that is not a subcommand is a run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        if args[0] not in (*self.commands, "--help"):
            args = ["render", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunsOrCommand, no_args_is_help=True, add_completion=False)

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Give the folders of runs; several are shown side by side.")
]
Formats = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="LIST",
        help="Write these formats, any of csv, md, html, json, junit, github and svg, a picture of the terminal, or "
        "that of a plugin: --format html,json.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Write to this folder; several runs need one: --out both. By default, it is the folder of the run.",
    ),
]
Rescore = Annotated[
    bool,
    typer.Option(
        "--rescore",
        help="Compute the scores again from the recorded answers. By default, the recorded scores are shown.",
    ),
]
PublishedRun = Annotated[Path, typer.Argument(metavar="RUN", help="Give the folder of the run.")]
Name = Annotated[
    str,
    typer.Option(
        "--name",
        show_default=False,
        help="Name the published run: --name quick-cpu. By default, it has the name of its suite.",
    ),
]
Reports = Annotated[
    Path, typer.Option("--reports", metavar="FOLDER", help="Copy the run to this folder of published runs.")
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Overwrite the published run of that name. By default, it is an error if there is one."
    ),
]


@app.callback()
def root() -> None:
    """Render finished or partial runs again, or publish one. d2obench report RUN is short for report render RUN.

    d2obench report render --help and d2obench report publish --help explain the options.

    Example: d2obench report d2obench-runs/mine --format md,html

    Example: d2obench report publish d2obench-runs/mine --name quick-cpu
    """


@app.command()
def render(runs: Runs, formats: Formats = "csv,md,html", out: Out = None, rescore: Rescore = False) -> None:
    """Write the views of runs again and print their tables. The word render can be left out.

    Example: d2obench report d2obench-runs/mine --format md,html
    """
    from rich.console import Console

    from d2obench.errors import UsageError
    from d2obench.report import build, check, write_report
    from d2obench.report.derive import rescore as score_again
    from d2obench.report.render.console import show_report
    from d2obench.suite.grammar import split_list

    asked = split_list(formats)
    check(asked)
    if len(runs) > 1 and out is None:
        raise UsageError("several runs need a place for their common report", remedy="add --out FOLDER")
    for run in runs if rescore else ():
        changed = score_again(run)
        typer.echo(f"{run}: {len(changed)} cells scored anew", err=True)
    report = build(runs)
    written = write_report(report, out or runs[0], asked)
    show_report(report, Console())
    for path in written:
        if path.parent.name != "figures":
            typer.echo(path)


@app.command()
def publish(run: PublishedRun, name: Name = "", reports: Reports = Path("reports"), replace: Replace = False) -> None:
    """Copy what is worth keeping of a run to the published runs, and rebuild their list, reports/README.md.

    Example: d2obench report publish d2obench-runs/mine --name quick-cpu
    """
    from d2obench.report.publish import publish as keep

    for path in keep(run, reports, name, replace):
        if path.parent.name != "figures":
            typer.echo(path)
