"""``d2obench bridges install NAME``."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def bridges() -> None:
    """Make Python environments for libraries that can't share ours."""


@app.command()
def install(name: Annotated[str, typer.Argument(help="kvpress")]) -> None:
    """Make or renew an environment in the cache folder with pip; it says first what it downloads."""
    from d2obench.run.isolated_workers import install as make

    typer.echo(f"{name}: {make(name, lambda words: typer.echo(words, err=True))}")
