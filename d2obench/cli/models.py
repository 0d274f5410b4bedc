"""``d2obench models pull NAME``."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def models() -> None:
    """Bring models to the local cache."""


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="embedded, a hub id, or another name d2obench list models shows.")],
) -> None:
    """Fetch a model and verify it in full; nothing is fetched twice."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from d2obench.models import pull as fetch

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        shown: dict[str, int] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = int(bars.add_task(what, total=total))
            bars.update(bars.task_ids[list(shown).index(what)], completed=done, total=total)

        place = fetch(name, progress)
    typer.echo(f"{name}: {place}" if place else f"{name}: nothing to fetch")
