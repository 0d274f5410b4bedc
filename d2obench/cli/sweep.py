"""``d2obench run --engine slurm``: the array script, and its submission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from d2obench.suite.definition import Suite

MOST_SHARDS = 8


def sweep(
    named: str,
    suite: Suite,
    given: Mapping[str, str],
    *,
    out: Path | None,
    shards: int | None,
    options: Sequence[str],
    submit: bool,
    allow_busy: bool,
) -> None:
    """Writes the script, prints it, submits it where asked, and says how to go on.

    Args:
        named: the suite as typed.
        suite: as read, with what was given laid over it.
        given: dotted keys of the suite → text.
        out: the folder of the sweep.
        shards: tasks of the array; None: one for each group of cells, eight at most.
        options: of sbatch.
        submit: hand the script to sbatch.
        allow_busy: passed on.
    """
    from d2obench.errors import UsageError
    from d2obench.run.check import check_words
    from d2obench.run.engines import slurm
    from d2obench.run.plan import group
    from d2obench.run.run_folder import new_folder
    from d2obench.suite.definition import cells

    check_words(suite)
    groups = len(group(cells(suite)))
    if shards is not None and shards > groups:
        raise UsageError(f"{shards} shards are too many", why=f"the suite has {groups} groups of cells")
    count = shards or min(groups, MOST_SHARDS)
    words = slurm.words_of(named, given, allow_busy=allow_busy)
    slurm.script(suite, Path("/"), count, words, options)  # before a folder is made
    folder = new_folder(suite.name, out).resolve()
    text = slurm.script(suite, folder, count, words, options)
    path = slurm.write(folder, text)
    typer.echo(text, nl=False)
    typer.echo(f"d2obench: {path}: {count} tasks for {groups} groups of cells", err=True)
    typer.echo(f"d2obench: {slurm.submit(path)}" if submit else f"d2obench: submit it with: sbatch {path}", err=True)
    typer.echo(f"d2obench: when all are done: d2obench merge {folder}/shards/* --out {folder}/run", err=True)
