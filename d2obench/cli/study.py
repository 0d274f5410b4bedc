"""``d2obench doctor --study``: the gate's timed rule tried on this machine, shown and kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from d2obench.study.trials import Study


def show_study(console: Console, gates: int, output: Path | None, *, load: bool) -> None:
    """Runs it and prints what came out; with ``output`` files are kept up to date after every gate."""
    from d2obench.study.gate import CHANGES, study, write_study

    def keep(found: Study) -> None:
        if output is not None:
            write_study(output, found)

    def watch(words: str) -> None:
        console.print(words, style="dim", markup=False)

    found = study(gates=dict.fromkeys(CHANGES, gates), burn=load, watch=watch, keep=keep)
    for outcome in found.outcomes:
        console.print(str(outcome), markup=False)
    if output is not None:
        console.print(f"{output / 'README.md'}", markup=False)
