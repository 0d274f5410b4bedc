"""Scores made again from the recorded predictions, without the model."""

from __future__ import annotations

from pathlib import Path

import msgspec

from d2obench.errors import RecordError
from d2obench.record import append_cell, read_run, read_samples


def rescore(folder: Path) -> list[str]:
    """Works out the figures of every quality cell again; returns the ids of the cells that changed.

    A changed cell is appended to ``cells.jsonl``, where the last record of a cell stands. Figures that are not made
    from items (KV bytes, kept tokens) stay as they are.
    """
    from d2obench import tasks

    changed = []
    for cell in read_run(folder).cells:
        items = read_samples(folder, cell).get("items")
        if cell.status != "ok" or not isinstance(items, list) or not items:
            continue
        try:
            values = cell.values | tasks.rescore(cell.axes.task, items)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            why = f"{type(problem).__name__}: {problem}"
            raise RecordError(
                f"the items of {cell.id} can't be scored", why=why, remedy="report without --rescore"
            ) from None
        if values != cell.values:
            append_cell(folder, msgspec.structs.replace(cell, values=values))
            changed.append(cell.id)
    return changed
