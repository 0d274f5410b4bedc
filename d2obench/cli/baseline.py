"""``d2obench baseline``: rewrites a committed baseline, by which ``d2obench gate`` judges a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2obench.errors import UsageError

Reason = Annotated[
    str,
    typer.Option(
        help='Say why the figures change; the file keeps it: --reason "fewer operators in decode".', show_default=False
    ),
]
NewSuite = Annotated[
    str,
    typer.Option(
        "--suite", help="Run this suite: --suite ci. There is no default: give this or --run.", show_default=False
    ),
]
NewRun = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="FOLDER", help="Take the figures of this finished run. By default, the suite is run."
    ),
]
BaselineFolder = Annotated[Path, typer.Option("--folder", help="Keep baselines in this folder, as SUITE/DEVICE.json.")]

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def baseline_root() -> None:
    """Rewrite committed baselines, by which d2obench gate judges runs.

    Example: d2obench baseline update --suite ci --reason "one operator less in a decode step"
    """


@app.command()
def update(
    reason: Reason, suite: NewSuite = "", run: NewRun = None, folder: BaselineFolder = Path("reports/baselines")
) -> None:
    """Rewrite a baseline on purpose. The diff of the file shows a reviewer what changed.

    Example: d2obench baseline update --suite ci --reason "one operator less in a decode step"
    """
    from d2obench.gate.baseline import baseline_of, path_of, write_baseline
    from d2obench.gate.compare import facts_of_run
    from d2obench.record import read_run

    if not reason.strip():
        raise UsageError("a baseline needs a reason", remedy='say why it changes: --reason "fewer operators in decode"')
    if (run is None) == (not suite):
        raise UsageError("a baseline comes from a suite or from a run", remedy="give --suite ci or --run FOLDER")
    found = read_run(run or _measured(suite))
    made = baseline_of(found.info, facts_of_run(found), reason)
    path = path_of(made.suite, made.device_class, folder)
    write_baseline(path, made)
    typer.echo(f"{path}: {len(made.cells)} cells of {found.path}")


def _measured(suite: str) -> Path:
    """Runs the suite. Returns the folder of the run."""
    from d2obench.cli.run import measure
    from d2obench.run.check import check
    from d2obench.run.runner import open_engine
    from d2obench.suite.definition import load_suite

    chosen = load_suite(suite)
    with open_engine("local", chosen) as place:
        folder, stopped = measure(check(place.suite, place.client), place, None, plain=False)
    if stopped:
        raise typer.Abort
    return folder
