"""Progress bars of commands that load, fetch or measure something; a run has a display of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, TaskID


@contextmanager
def bars(*columns: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``progress(what, done, total)``, which shows a bar for each ``what`` on stderr if that is a terminal.

    Args:
        columns: what stands behind a bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, console=console, disable=not console.is_terminal
    ) as shown:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield progress
