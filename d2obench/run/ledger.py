"""The book a run keeps: which cells have ended, and the row of each, written the moment it is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, RecordError
from d2obench.metric import METRICS, show
from d2obench.record import CellRecord, append_cell
from d2obench.run.folder import now
from d2obench.run.plan import larger
from d2obench.run.resume import Samples
from d2obench.suite.definition import Cell


class Watcher(Protocol):
    """Who is told how a run goes on, such as a ``Display`` of d2obench.report.display."""

    def cell(self, cell: str, state: str, text: str = "", share: float = 0.0) -> None:
        """A cell is ``running``, with a share of its work done, or ended with a status."""

    def phase(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """What is going on now, and how far it is."""

    def note(self, text: str) -> None:
        """Something to know about the whole run."""


class Ledger:
    """Rows of one run.

    Args:
        folder: the run folder, locked by the caller.
        watcher: is told of every row.
        records: rows that stand from an earlier part of this run, by cell id.
        environment: hash of the fingerprint that its cells are measured under.

    ``records`` keeps the heads of the rows only, so that a run of any length holds little memory. Cells may be ended
    from several threads.
    """

    def __init__(
        self,
        folder: Path,
        watcher: Watcher,
        records: Mapping[str, CellRecord] | None = None,
        environment: str = "",
    ) -> None:
        self.folder, self.watcher, self.environment = folder, watcher, environment
        self.records: dict[str, CellRecord] = {name: _head(one) for name, one in (records or {}).items()}
        self._began: dict[str, tuple[str, float]] = {}
        self._one_at_a_time = threading.RLock()

    def open(self, cell: Cell) -> bool:
        """Whether the cell still needs a row."""
        return cell.id not in self.records

    def begin(self, cell: Cell) -> None:
        """Notes when a cell started; the first time stands."""
        self._began.setdefault(cell.id, (now(), time.monotonic()))

    def end(self, cell: Cell, status: str, **fields: Any) -> None:
        """Writes a cell's row; ``fields`` are those of :class:`d2obench.record.CellRecord`."""
        self.begin(cell)
        started, since = self._began.pop(cell.id)
        fields.setdefault("seconds", round(time.monotonic() - since, 3))
        fields["environment"] = self.environment
        record = CellRecord(cell.id, cell.hash, cell.axes, status, started=started, **fields)
        with self._one_at_a_time:
            append_cell(self.folder, record)
            self.records[cell.id] = _head(record)
            self.watcher.cell(cell.id, status, record.reason or headline(record))

    def fail(self, cell: Cell, problem: D2OBenchError, samples: Samples | None = None) -> None:
        """The row of a cell that an error ended. A run folder that can't be written ends the run instead."""
        if isinstance(problem, RecordError):
            raise problem
        kept = samples.name if samples is not None and samples.rounds else None
        self.end(cell, "oom" if isinstance(problem, OutOfMemory) else "failed", reason=str(problem), samples=kept)

    def skip_if_too_large(self, cell: Cell) -> None:
        """Ends a cell as ``skipped`` where one of the same kind and no larger ran out of memory."""
        with self._one_at_a_time:
            ended = [one for one in self.records.values() if one.status == "oom"]
        smaller = next((one for one in ended if larger(cell.axes, one.axes)), None)
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
