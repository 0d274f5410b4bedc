"""One quality cell: the worker evaluates it, its items go to the samples, its figures to the row."""

from __future__ import annotations

import msgspec

from d2obench.errors import D2OBenchError
from d2obench.record import Value
from d2obench.run.client import Client
from d2obench.run.ledger import Ledger
from d2obench.run.protocol import again
from d2obench.run.resume import Samples
from d2obench.suite.definition import Cell, Suite


def evaluate(suite: Suite, cell: Cell, client: Client, ledger: Ledger) -> None:
    """Brings a quality cell to its row."""
    ledger.begin(cell)
    ledger.watcher.cell(cell.id, "running")
    request = {"cell": msgspec.to_builtins(cell), "quality": msgspec.to_builtins(suite.quality)}

    def progress(done: int, total: int, words: str) -> None:
        ledger.watcher.phase(words or f"{cell.axes.task} {done}/{total}", done, total)
        if not words:
            ledger.watcher.cell(cell.id, "running", share=done / max(1, total))

    try:
        found = again(lambda: client.call("evaluate", request, progress=progress))
    except D2OBenchError as problem:
        ledger.fail(cell, problem)
        return
    samples = Samples(ledger.folder, cell)
    samples.save(items=found["items"])
    ledger.end(
        cell,
        "ok",
        values=msgspec.convert(found["values"], dict[str, Value]),
        details={**found["details"], "model": found["model"]},
        flags=tuple(found["flags"]),
        samples=samples.name,
    )
