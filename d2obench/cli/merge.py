"""``d2obench merge``: the shards of one suite → one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Shards of one suite, in any order.")],
    out: Annotated[Path, typer.Option(help="the folder of the whole run")],
) -> None:
    """Make one run of shards (run --shard, run --engine slurm); cells that no shard has are missing in it."""
    from d2obench.cli.run import show_results
    from d2obench.record import read_run
    from d2obench.run.run_folder import merge

    for warning in merge(runs, out):
        typer.echo(f"d2obench: {warning}", err=True)
    missing = read_run(out).missing
    show_results(out)
    if missing:
        typer.echo(f"d2obench: {len(missing)} cells are missing, the first is {missing[0]}", err=True)
        typer.echo(f"d2obench: run them here with: d2obench run --resume {out}", err=True)
