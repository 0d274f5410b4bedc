"""``d2obench models pull NAME``: models in the local cache."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="embedded, a hub id such as Qwen/Qwen2.5-0.5B, or a folder or .gguf file.")
]


@app.callback()
def models() -> None:
    """Bring models to the local cache, so that a run finds them there."""


@app.command()
def pull(name: Name) -> None:
    """Fetch a model and verify all of it; nothing is fetched twice.

    Example: d2obench models pull embedded
    """
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
