"""Runs cells on this machine: one worker process, one cell or one interleaved group at a time, every cell a row.

Memory that ends, a crash, a kill and a hang end one cell and are its row. Ctrl-C and a full disk end the run and leave
it readable; what was measured until then is on the disk and is not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2obench.errors import RecordError
from d2obench.measure.environment import differences, environment_hash
from d2obench.record import CellRecord, Run, read_run
from d2obench.runner.check import Checked
from d2obench.runner.folder import describe_run, write_info
from d2obench.runner.ledger import Ledger, Watcher
from d2obench.runner.lock import locked
from d2obench.runner.plan import group
from d2obench.runner.protocol import WorkerClient, again
from d2obench.runner.quality import evaluate
from d2obench.runner.reference import Reference
from d2obench.runner.resume import finished
from d2obench.runner.speed import SpeedGroup
from d2obench.suite import SPEED, Cell, Suite


def run_suite(
    checked: Checked,
    folder: Path,
    client: WorkerClient,
    watcher: Watcher,
    *,
    command: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Runs a checked suite into a folder, or goes on with it.

    Args:
        checked: what to run.
        folder: a new run folder, or one to go on with.
        client: the worker.
        watcher: is told how it goes.
        command: the words it was started with, for the record.
        resume: go on with the run that is in the folder.

    Raises:
        RecordError: another process uses the folder, it can't be written, or what is in it was measured on a machine
            or software whose figures can't stand beside this one's.
    """
    with locked(folder):
        facts = again(lambda: client.call("environment", {"device": checked.suite.axes.device[0]}))
        records: tuple[CellRecord, ...] = ()
        if resume:
            records = _earlier(folder, facts, watcher).cells
        else:
            write_info(folder, describe_run(checked.suite, checked.cells, facts, environment_hash(facts), command))
        ledger = Ledger(folder, watcher, finished(checked.cells, records))
        for cell in checked.cells:
            if cell.id in checked.too_long and ledger.open(cell):
                ledger.end(cell, "skipped", reason=checked.too_long[cell.id])
        run_cells(checked.suite, checked.cells, client, ledger)


def run_cells(suite: Suite, cells: Sequence[Cell], client: WorkerClient, ledger: Ledger) -> None:
    """Brings every cell to its row.

    Args:
        suite: resolved; says how often timed cells repeat and whether each group gets a fresh worker.
        cells: of that suite, in order.
        client: the worker.
        ledger: holds the rows that stand already and takes the new ones.

    Raises:
        RecordError: the run folder can't be written any more.
    """
    reference = Reference(client, ledger.watcher)
    for together in group(cells):
        for cell in together:
            ledger.skip_if_too_large(cell)
        if not any(ledger.open(cell) for cell in together):
            continue
        if suite.worker.mode == "fresh":
            client.close()
        if together[0].axes.task == SPEED:
            SpeedGroup(suite, together, client, ledger, reference).run()
        else:
            evaluate(suite, together[0], client, ledger)


def _earlier(folder: Path, facts: Mapping[str, Any], watcher: Watcher) -> Run:
    """The run in ``folder``, if its figures can stand beside those of this environment."""
    run = read_run(folder)
    if run.info.environment_hash != environment_hash(facts):
        other = ", ".join(differences(run.info.environment, facts))
        raise RecordError(
            f"{folder} was measured in another environment", why=f"it differs in {other}", remedy="start a new run"
        )
    for warning in run.warnings:
        watcher.note(warning)
    return run
