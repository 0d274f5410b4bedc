"""``d2obench compare A B``: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    base: Annotated[Path, typer.Argument(metavar="A", help="A run folder: what to compare with.")],
    head: Annotated[Path, typer.Argument(metavar="B", help="Another run folder.")],
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="text, json, markdown, html, github or junit; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A folder for files in these formats and comment.md.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List the OK rows too.")] = False,
) -> None:
    """Compare two runs: effect, interval and verdict of every figure. Informs and never fails."""
    from d2obench.cli.verdicts import show
    from d2obench.gate.compare import compare_runs
    from d2obench.record import read_run

    show(compare_runs(read_run(base), read_run(head)), formats or ["text"], output, every=every)
