"""Runs quality cells: one at a time, or those that differ in policy and budget alone together, batch by batch.

Together, the worker reads the prompts of a batch once for all cells (``d2obench.cache.reading``), runs the batch under
each of them, and goes on with the next batch. So only the prompts of one batch are in memory, however many cells there
are. What a cell gets is the same as on its own.

Items are written to the cells' samples on the way. A run that was killed goes on from there, and its rows are those of
a run that was not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory
from d2obench.record import Value
from d2obench.run.run_folder import RunLog, Samples
from d2obench.run.worker_client import Client, DeviceFaultError, again, revive
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

SAVE_S = 20.0
"""Seconds of work after which items are written."""


class Partial(msgspec.Struct):
    """What a cell has before it is finished; its samples hold it under "partial".

    Args:
        limit: largest number of items that it was begun with, which ``--within`` may choose.
        parts: number of batches done.
        of: number of all batches; 0 before the first one.
        places: place of each item among all items of the task.
        items: the items so far.
        seconds: time spent on them.
    """

    limit: int
    parts: int = 0
    of: int = 0
    places: list[int] = []
    items: list[dict[str, Any]] = []
    seconds: float = 0.0


class QualityGroup:
    """Quality cells that differ in policy and budget alone.

    Args:
        suite: its table ``quality``.
        cells: those that have no row yet.
        client: the worker that runs them.
        log: takes their rows.
        save_s: seconds of work after which items are written.
    """

    def __init__(
        self, suite: Suite, cells: Sequence[Cell], client: Client, log: RunLog, save_s: float | None = None
    ) -> None:
        self._suite, self._client, self._log = suite, client, log
        self._cells = list(cells)
        self._quality = msgspec.to_builtins(suite.quality)
        self._samples = {cell.id: Samples(log.folder, cell) for cell in cells}
        self._known = {cell.id: self._begun(cell) for cell in cells}
        self._save_s = SAVE_S if save_s is None else save_s
        self._saved = time.monotonic()
        self._apart: set[str] = set()
        """Cells that met a fault of a GPU and do without a part of its path since then."""

    def run(self) -> None:
        """Brings every cell to its row.

        Raises:
            RecordError: the run folder can't be written any more.
        """
        for cell in self._cells:
            self._log.begin(cell)
            self._log.display.cell(cell.id, "running")
        number = 0
        while any(number < max(1, self._known[cell.id].of) for cell in self._cells):
            # those that had this batch before the run was stopped don't take it again
            behind = [cell for cell in self._cells if self._known[cell.id].parts == number]
            together = [cell for cell in behind if cell.id not in self._apart]
            for cells in ([together] if together else []) + [[cell] for cell in behind if cell.id in self._apart]:
                self._part(cells, number)
            self._save()
            number += 1
        for cell in list(self._cells):
            self._conclude(cell)

    def _part(self, cells: Sequence[Cell], number: int) -> None:
        """Runs one batch under these cells; those that fail get their row."""
        request = {"cells": [cell.sent() for cell in cells], "quality": self._quality, "part": number}
        if len(cells) == 1:
            request["cell"] = cells[0].sent()  # by which a worker knows what the cell does without

        def call() -> dict[str, Any]:
            try:
                return self._client.call("evaluate_part", request, progress=self._progress(cells))
            except DeviceFaultError:
                self._apart |= {cell.id for cell in cells if len(cells) == 1}
                raise

        try:
            answer = again(call)
        except D2OBenchError as problem:
            if len(cells) == 1:
                self._fail(cells[0], problem)
                return
            for cell in cells:  # it may be the fault of a single one
                self._part([cell], number)
            return
        for cell in cells:
            found, known = answer["cells"][cell.id], self._known[cell.id]
            if "error" in found:
                error = revive(found["error"])
                if isinstance(error, OutOfMemory):  # there is more memory for a cell alone
                    self._part([cell], number)
                else:
                    self._fail(cell, error)
                continue
            known.places += answer["places"]
            known.items += found["items"]
            known.seconds += found["seconds"]
            known.parts, known.of = number + 1, answer["parts"]
            self._log.display.cell(cell.id, "running", share=len(known.items) / max(1, answer["items"]))

    def _conclude(self, cell: Cell) -> None:
        known = self._known[cell.id]
        items = [item for _, item in sorted(zip(known.places, known.items, strict=True), key=lambda pair: pair[0])]
        request = {"cell": cell.sent(), "quality": self._quality, "items": items}
        try:
            answer = again(lambda: self._client.call("conclude", request))
        except D2OBenchError as problem:
            self._fail(cell, problem)
            return
        end(cell, self._log, {**answer, "items": items}, round(known.seconds, 3))

    def _fail(self, cell: Cell, problem: D2OBenchError) -> None:
        self._cells.remove(cell)
        self._log.fail(cell, problem)

    def _begun(self, cell: Cell) -> Partial:
        """What an earlier part of this run has done of a cell."""
        fresh = Partial(self._suite.quality.limit)
        try:
            found = msgspec.convert(self._samples[cell.id].data.get("partial"), Partial)
        except msgspec.ValidationError:
            return fresh
        usable = found.limit == fresh.limit and len(found.places) == len(found.items)
        return found if usable else fresh

    def _save(self) -> None:
        if time.monotonic() - self._saved < self._save_s:
            return
        for cell in self._cells:
            self._samples[cell.id].save(partial=msgspec.to_builtins(self._known[cell.id]))
        self._saved = time.monotonic()

    def _progress(self, cells: Sequence[Cell]) -> Any:
        def progress(done: int, total: int, text: str) -> None:
            named = f"{cells[0].axes.task}: {text}" if total == len(cells) else text
            self._log.display.phase(named, done, total)

        return progress


def evaluate(suite: Suite, cell: Cell, client: Client, log: RunLog) -> None:
    """Runs a quality cell whose task does not consist of batches, and writes its row."""
    log.begin(cell)
    log.display.cell(cell.id, "running")
    request = {"cell": cell.sent(), "quality": msgspec.to_builtins(suite.quality)}

    def progress(done: int, total: int, text: str) -> None:
        log.display.phase(text or f"{cell.axes.task} {done}/{total}", done, total)
        if not text:
            log.display.cell(cell.id, "running", share=done / max(1, total))

    try:
        answer = again(lambda: client.call("evaluate", request, progress=progress))
    except D2OBenchError as problem:
        log.fail(cell, problem)
        return
    end(cell, log, answer)


def end(cell: Cell, log: RunLog, answer: dict[str, Any], seconds: float | None = None) -> None:
    """Writes the items and the row of a cell; ``seconds`` are those that it took, if it was not alone."""
    samples = Samples(log.folder, cell)
    samples.data.pop("partial", None)
    samples.save(items=answer["items"])
    log.end(
        cell,
        "ok",
        values=msgspec.convert(answer["values"], dict[str, Value]),
        details={**answer["details"], "model": answer["model"]},
        flags=tuple(answer["flags"]),
        samples=samples.name,
        **({} if seconds is None else {"seconds": seconds}),
    )
