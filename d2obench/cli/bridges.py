"""``d2obench bridges install NAME``: environments for libraries that can't share ours."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The library: kvpress is the one that needs this.")]


@app.callback()
def bridges() -> None:
    """Make Python environments for libraries that can't share ours."""


@app.command()
def install(name: Name) -> None:
    """Make an environment with pip, or make it anew; what it downloads is said first.

    Example: d2obench bridges install kvpress
    """
    from d2obench.run.isolated_workers import install as make

    typer.echo(f"{name}: {make(name, lambda words: typer.echo(words, err=True))}")
