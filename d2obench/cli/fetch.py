"""Commands that fetch something ahead of a run: ``d2obench models pull`` and ``d2obench bridges install``."""

from __future__ import annotations

from typing import Annotated

import typer

models = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bridges = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Give embedded, a hub id such as Qwen/Qwen2.5-0.5B, a folder, or a .gguf file."
    ),
]
LibraryName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name the library; kvpress is the only one that needs this.")
]


@models.callback()
def models_root() -> None:
    """Fetch models into the local cache, so that a run finds them there.

    Example: d2obench models pull embedded
    """


@models.command()
def pull(name: ModelName) -> None:
    """Fetch a model and verify all of its files. Files that are already there are not fetched again.

    Example: d2obench models pull embedded
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    from d2obench.cli.bars import bars
    from d2obench.models import pull as fetch

    with bars(DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress:
        place = fetch(name, progress)
    typer.echo(f"{name}: {place}" if place else f"{name}: nothing to fetch")


@bridges.callback()
def bridges_root() -> None:
    """Make Python environments for libraries that can't be installed beside d2obench.

    Example: d2obench bridges install kvpress
    """


@bridges.command()
def install(name: LibraryName) -> None:
    """Make an environment for a library with pip. What pip is going to download is printed first.

    An environment that exists already is made anew.

    Example: d2obench bridges install kvpress
    """
    from d2obench.run.isolated_workers import install as make

    typer.echo(f"{name}: {make(name, lambda words: typer.echo(words, err=True))}")
