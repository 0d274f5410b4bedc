"""``d2obench merge``: the shards of one suite → one run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="The folders of the shards, in any order: runs of the same suite."),
]
Out = Annotated[
    Path, typer.Option(metavar="FOLDER", help="The folder of the whole run; it must not hold a run: --out whole.")
]


def command(runs: Runs, out: Out) -> None:
    """Make one run of the shards that run --shard or run --engine slurm left.

    Cells that no shard has are missing in the result; run --resume measures them.

    Example: d2obench merge sweep/shards/* --out sweep/run
    """
    from d2obench.cli.run import show_results, tell
    from d2obench.record import read_run
    from d2obench.run.run_folder import merge

    for warning in merge(runs, out):
        tell(warning)
    missing = read_run(out).missing
    show_results(out)
    if missing:
        tell(f"{len(missing)} cells are missing, the first is {missing[0]}")
        tell(f"run them here with: d2obench run --resume {out}")
