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

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are put side by side.")]
Formats = Annotated[
    str, typer.Option("--format", help="Any of md,csv,html,json,junit,github, or a plugin's, joined by commas.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write to; a single run's own where not given.")]
Rescore = Annotated[bool, typer.Option("--rescore", help="First work out scores again from the recorded predictions.")]


@app.callback()
def root() -> None:
    """Render finished or partial runs again, or keep one for good.

    \b
    d2obench report RUN [RUN ...] [--format csv,md,html,json,junit,github] [--out FOLDER] [--rescore]
    d2obench report publish RUN [--name NAME] [--reports FOLDER] [--replace]
    """


@app.command()
def render(runs: Runs, formats: Formats = "csv,md,html", out: Out = None, rescore: Rescore = False) -> None:
    """Render runs; the same as d2obench report RUN [RUN ...]."""
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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    name: Annotated[
        str, typer.Option("--name", help="Name of the published folder; the suite's where not given.")
    ] = "",
    reports: Annotated[Path, typer.Option("--reports", help="Where published runs live.")] = Path("reports"),
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a published run of that name.")] = False,
) -> None:
    """Copy what is worth keeping of a run to reports/NAME and rebuild reports/README.md."""
    from d2obench.report.publish import publish as keep

    for path in keep(run, reports, name, replace):
        if path.suffix != ".svg":
            typer.echo(path)
