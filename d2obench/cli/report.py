"""``d2obench report``: renders runs again; ``d2obench report publish`` keeps one for good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class RunsOrCommand(TyperGroup):
    """``report RUN …`` is ``report render RUN …``: a first word that is no subcommand is a run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        if args[0] not in (*self.commands, "--help"):
            args = ["render", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunsOrCommand, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="The folders of runs; several are put side by side.")
]
Formats = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="LIST",
        help="What to write: any of csv, md, html, json, junit, github or a plug-in's format: --format html,json.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="The folder to write to. Default: that of the run, if it is one."),
]
Rescore = Annotated[bool, typer.Option("--rescore", help="Compute the scores again first, from the recorded answers.")]


@app.callback()
def root() -> None:
    """Render finished or partial runs again, or keep one for good.

    \b
    d2obench report RUN [RUN ...] [--format csv,md,html,json,junit,github] [--out FOLDER] [--rescore]
    d2obench report publish RUN [--name NAME] [--reports FOLDER] [--replace]
    """


@app.command()
def render(runs: Runs, formats: Formats = "csv,md,html", out: Out = None, rescore: Rescore = False) -> None:
    """Write the views of runs again and print their tables; the same as d2obench report RUN [RUN ...].

    Example: d2obench report d2obench-runs/mine --format md,html
    """
    from rich.console import Console

    from d2obench.errors import UsageError
    from d2obench.report import build, check, write_report
    from d2obench.report.render.console import show_report
    from d2obench.report.rescore import rescore as score_again
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
        if path.suffix != ".svg":
            typer.echo(path)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")],
    name: Annotated[
        str, typer.Option("--name", help="Its name under reports: --name quick-cpu. Default: the suite's.")
    ] = "",
    reports: Annotated[Path, typer.Option("--reports", help="The folder of published runs.")] = Path("reports"),
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite the published run of that name.")] = False,
) -> None:
    """Copy what is worth keeping of a run to reports/NAME and rebuild reports/README.md."""
    from d2obench.report.publish import publish as keep

    for path in keep(run, reports, name, replace):
        if path.suffix != ".svg":
            typer.echo(path)
