"""What is kept of a cell while it runs, so that a kill loses one request at most.

Rounds of a speed cell are written to ``samples/<hash>.json`` as they come, each time in one step. A run that goes on
reads them back and measures what is missing; a cell is finished when its row stands in ``cells.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from d2obench.measure.trace import RequestTrace
from d2obench.record import CellRecord, dump, write_atomic
from d2obench.suite.definition import Cell

KEPT = ("ok", "oom", "skipped", "incomparable")
"""Statuses that stand when a run goes on; a failed cell is tried again."""


class Samples:
    """The samples file of one cell: ``data`` is what it holds, ``name`` its path in the run folder.

    A file that is damaged, or that belongs to other content, counts as empty.
    """

    def __init__(self, folder: Path, cell: Cell) -> None:
        self.name = f"samples/{cell.hash}.json"
        self._path = folder / self.name
        self.data: dict[str, Any] = self._read() or {"cell": cell.id, "rounds": []}

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Raw rounds, in the order they were measured."""
        rounds: list[dict[str, Any]] = self.data.setdefault("rounds", [])
        return rounds

    def has(self, number: int) -> bool:
        """Whether round ``number`` was measured."""
        return any(found.get("round") == number for found in self.rounds)

    def add(self, one: dict[str, Any]) -> None:
        """Adds a round and writes the file."""
        self.rounds.append(one)
        self.save()

    def save(self, **values: Any) -> None:
        """Sets keys beside the rounds and writes the file."""
        self.data.update(values)
        write_atomic(self._path, dump(self.data))

    def _read(self) -> dict[str, Any] | None:
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
            whole: dict[str, Any] = msgspec.json.decode(self._path.read_bytes())
        except (OSError, msgspec.DecodeError, RecursionError):
            return None
        complete = not found.rounds or (found.batch > 0 and found.model and found.counts is not None)
        return whole if complete else None


class _Round(RequestTrace, kw_only=True):
    """A round as it must be on the disk."""

    seconds: float


class _File(msgspec.Struct):
    """What a samples file must hold to be gone on with."""

    cell: str
    rounds: list[_Round] = []
    batch: int = 0
    model: dict[str, Any] = {}
    counts: dict[str, float] | None = None


def forget_cut_round(folder: Path, cells: Iterable[Cell]) -> None:
    """Takes the last round of a group back where only some of its cells have it.

    The rest of it would be measured on another device, and rounds are paired: both times of a ratio must come from one.
    """
    group = [one for one in (Samples(folder, cell) for cell in cells) if "stopped" not in one.data]
    last = max((part["round"] for one in group for part in one.rounds), default=0)
    if all(one.has(last) for one in group):
        return
    for one in group:
        if one.has(last):
            one.rounds[:] = [part for part in one.rounds if part["round"] != last]
            one.save()


def finished(cells: Iterable[Cell], records: Iterable[CellRecord]) -> dict[str, CellRecord]:
    """Records that still stand, by cell id: the content hash is the same and the cell came to an end."""
    hashes = {cell.id: cell.hash for cell in cells}
    return {one.id: one for one in records if one.status in KEPT and hashes.get(one.id) == one.hash}
