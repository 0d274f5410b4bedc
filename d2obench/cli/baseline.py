"""``d2obench baseline update``: the one command that writes a committed baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2obench.errors import UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def root() -> None:
    """Committed baselines, which d2obench gate judges runs by."""


@app.command()
def update(
    reason: Annotated[str, typer.Option(help="Why the figures change; it is kept in the file.")],
    suite: Annotated[str, typer.Option(help="The suite to run.")] = "",
    run: Annotated[Path | None, typer.Option(help="Take a finished run instead of running the suite.")] = None,
    folder: Annotated[Path, typer.Option(help="Where baselines live.")] = Path("reports/baselines"),
) -> None:
    """Rewrite a baseline on purpose: reports/baselines/SUITE/DEVICE.json. The diff is the review."""
    from d2obench.gate.baseline import baseline_of, path_of, write_baseline
    from d2obench.gate.facts import facts_of_run
    from d2obench.record import read_run

    if not reason.strip():
        raise UsageError("a baseline needs a reason", remedy='say why it changes: --reason "fewer operators in decode"')
    if (run is None) == (not suite):
        raise UsageError("a baseline comes from a suite or from a run", remedy="give --suite ci or --run FOLDER")
    found = read_run(run or _measured(suite))
    baseline = baseline_of(found.info, facts_of_run(found), reason)
    path = path_of(baseline.suite, baseline.device_class, folder)
    write_baseline(path, baseline)
    typer.echo(f"{path}: {len(baseline.cells)} cells of {found.path}")


def _measured(suite: str) -> Path:
    """The folder of a new run of the suite."""
    from d2obench.cli.run import execute
    from d2obench.report.display import display
    from d2obench.run.check import check
    from d2obench.run.engines import open_engine
    from d2obench.run.run_folder import new_folder
    from d2obench.suite.definition import load_suite

    chosen = load_suite(suite)
    with open_engine("local", chosen) as place:
        plan = check(place.suite, place.client)
        folder = new_folder(chosen.name)
        if execute(plan, folder, place, None, display()):
            raise typer.Abort
    return folder
