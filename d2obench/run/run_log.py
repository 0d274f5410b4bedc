"""The run log: a row for each cell that ended, and the samples of cells that still run.

Rounds of a speed cell go to ``samples/<hash>.json`` as they come, each time in one step, so that a kill loses one
request at most. A run that goes on reads them back and measures what is missing; a cell is finished when its row
stands in ``cells.jsonl``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, RecordError
from d2obench.measure.trace import RequestTrace
from d2obench.measure.windows import Window
from d2obench.metric import METRICS, show
from d2obench.record import CellRecord, append_cell, dump, write_atomic
from d2obench.run.plan import larger
from d2obench.run.progress import Display
from d2obench.tasks.base import Cell


class RunLog:
    """Rows of one run.

    Args:
        folder: the run folder, locked by the caller.
        watcher: is told of every row.
        records: rows that stand from an earlier part of this run, by cell id.
        cells: the run's; those whose rows say that memory ended make larger ones be skipped.
        environment: hash of the fingerprint that its cells are measured under.

    ``records`` keeps the heads of the rows only, so that a run of any length holds little memory. Cells may be ended
    from several threads.
    """

    def __init__(
        self,
        folder: Path,
        watcher: Display,
        records: Mapping[str, CellRecord] | None = None,
        environment: str = "",
        cells: Iterable[Cell] = (),
    ) -> None:
        self.folder, self.watcher, self.environment = folder, watcher, environment
        self.records: dict[str, CellRecord] = {name: _head(one) for name, one in (records or {}).items()}
        self._ran_out = [one for one in cells if one.id in self.records and self.records[one.id].status == "oom"]
        self._began: dict[str, tuple[str, float]] = {}
        self._flags: dict[str, list[str]] = {}
        self._one_at_a_time = threading.RLock()
        self._noted: set[str] = set()

    def open(self, cell: Cell) -> bool:
        """Whether the cell still needs a row."""
        return cell.id not in self.records

    def begin(self, cell: Cell) -> None:
        """Notes when a cell started; the first time stands."""
        self._began.setdefault(cell.id, (now(), time.monotonic()))

    def flag(self, cell: Cell, text: str) -> None:
        """A flag that the cell's row will have beside those it gets when it ends."""
        self._flags.setdefault(cell.id, []).append(text)

    def end(self, cell: Cell, status: str, **fields: Any) -> None:
        """Writes a cell's row; ``fields`` are those of :class:`d2obench.record.CellRecord`."""
        self.begin(cell)
        started, since = self._began.pop(cell.id)
        fields.setdefault("seconds", round(time.monotonic() - since, 3))
        fields["environment"] = self.environment
        if flags := self._flags.pop(cell.id, []):
            fields["flags"] = (*fields.get("flags", ()), *flags)
        record = CellRecord(cell.id, cell.hash, cell.axes, status, started=started, **fields)
        with self._one_at_a_time:
            append_cell(self.folder, record)
            self.records[cell.id] = _head(record)
            if status == "oom":
                self._ran_out.append(cell)
            self.watcher.cell(cell.id, status, record.reason or headline(record))

    def fail(self, cell: Cell, problem: D2OBenchError, samples: Samples | None = None) -> None:
        """The row of a cell that an error ended. A run folder that can't be written ends the run instead."""
        if isinstance(problem, RecordError):
            raise problem
        kept = samples.name if samples is not None and samples.rounds else None
        self.end(cell, "oom" if isinstance(problem, OutOfMemory) else "failed", reason=str(problem), samples=kept)

    def note_once(self, text: str) -> None:
        """Shows a note about the whole run, the first time it is given."""
        with self._one_at_a_time:
            if text not in self._noted:
                self._noted.add(text)
                self.watcher.note(text)

    def skip_if_too_large(self, cell: Cell) -> None:
        """Ends a cell as ``skipped`` where one of the same kind and no larger ran out of memory."""
        with self._one_at_a_time:
            smaller = next((one for one in self._ran_out if larger(cell, one)), None)
        if smaller is not None and self.open(cell):
            self.end(cell, "skipped", reason=f"{smaller.id} ran out of memory and is no larger")


def _head(record: CellRecord) -> CellRecord:
    return msgspec.structs.replace(record, values={}, details={})


def headline(record: CellRecord) -> str:
    """The few figures of a row that the progress display has room for."""
    keys = ("tpot_s", "decode_tok_s", "speedup", "nvml_used_bytes", "rss_peak_bytes", "kl", "top1", "score", "gold_bpb")
    known = [(key, record.values[key].value) for key in keys if key in record.values]
    return "  ".join(
        f"{METRICS[key].header} {show(key, value, unit=True)}" for key, value in known if value is not None
    )


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

    def has_windows(self, process: int) -> bool:
        """Whether the windows of a worker process were measured."""
        return any(found["process"] == process for found in self.data.get("windows", ()))

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
        started = bool(found.rounds or found.windows)
        complete = not started or (found.batch > 0 and found.model and found.counts is not None)
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
    windows: list[Window] = []
    plan: dict[str, int] | None = None


def forget_cut_round(folder: Path, cells: Iterable[Cell]) -> None:
    """Removes the last round of a group where only some of its cells have it.

    The other cells would measure it on another device, but both times of a ratio must come from the same one.
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


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
