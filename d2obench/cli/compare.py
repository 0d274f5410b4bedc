"""``d2obench compare A B``: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2obench.cli.options import AllRows, Formats, VerdictFolder

Base = Annotated[Path, typer.Argument(metavar="A", help="The folder of the run to compare with.")]
Head = Annotated[Path, typer.Argument(metavar="B", help="The folder of the other run.")]


def command(
    base: Base, head: Head, formats: Formats = None, output: VerdictFolder = None, every: AllRows = False
) -> None:
    """Compare two runs: effect, interval and verdict of every figure. It informs and never fails.

    Example: d2obench compare d2obench-runs/monday d2obench-runs/tuesday --format markdown
    """
    from d2obench.cli.verdicts import show
    from d2obench.gate.compare import compare_runs
    from d2obench.record import read_run

    show(compare_runs(read_run(base), read_run(head)), formats or ["text"], output, every=every)
