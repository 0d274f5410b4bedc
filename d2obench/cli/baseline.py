"""``d2obench baseline update``: the one command that writes a committed baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2obench.errors import UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False)


Reason = Annotated[
    str, typer.Option(help='Why the figures change; it is kept in the file: --reason "fewer operators in decode".')
]
Suite = Annotated[str, typer.Option(help="The suite to run: --suite ci. Give this or --run.", show_default=False)]
Run = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="A finished run to take instead of running the suite.")
]
Folder = Annotated[Path, typer.Option(help="Where baselines are kept, as SUITE/DEVICE.json.")]


@app.callback()
def root() -> None:
    """Committed baselines, by which d2obench gate judges runs."""


@app.command()
def update(reason: Reason, suite: Suite = "", run: Run = None, folder: Folder = Path("reports/baselines")) -> None:
    """Rewrite a baseline on purpose; the diff of the file is the review.

    Example: d2obench baseline update --suite ci --reason "one operator less in a decode step"
    """
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
