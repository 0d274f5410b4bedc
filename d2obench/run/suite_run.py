"""A run: the lock, the head and the book of its folder are kept here; an engine brings the cells to their rows.

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
from d2obench.run.check import Checked
from d2obench.run.engines import Engine
from d2obench.run.folder import describe_run, write_info
from d2obench.run.ledger import Ledger, Watcher
from d2obench.run.lock import locked
from d2obench.run.resume import finished


def run_suite(
    checked: Checked,
    folder: Path,
    engine: Engine,
    watcher: Watcher,
    *,
    command: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Runs a checked suite into a folder, or goes on with it.

    Args:
        checked: what to run.
        folder: a new run folder, or one to go on with.
        engine: where it runs.
        watcher: is told how it goes.
        command: the words it was started with, for the record.
        resume: go on with the run that is in the folder.

    Raises:
        RecordError: another process uses the folder, it can't be written, or what is in it was measured on a machine
            or software whose figures can't stand beside this one's.
        WorkerError: nothing is left to run on.
    """
    with locked(folder):
        earlier = read_run(folder) if resume else None
        device = checked.suite.axes.device[0]
        facts = engine.environment(device, like=earlier.info.environment_hash if earlier else "")
        records: tuple[CellRecord, ...] = ()
        if earlier:
            records = _comparable(earlier, facts, watcher).cells
        else:
            write_info(folder, describe_run(checked.suite, checked.cells, facts, environment_hash(facts), command))
        ledger = Ledger(folder, watcher, finished(checked.cells, records), environment_hash(facts))
        for cell in checked.cells:
            if cell.id in checked.too_long and ledger.open(cell):
                ledger.end(cell, "skipped", reason=checked.too_long[cell.id])
        engine.run(checked, ledger)


def _comparable(run: Run, facts: Mapping[str, Any], watcher: Watcher) -> Run:
    """``run``, if its figures can stand beside those of this environment."""
    apart = run.info.environment.get("environments") != facts.get("environments")
    if apart or run.info.environment_hash != environment_hash(facts):
        other = ", ".join([*differences(run.info.environment, facts), *(["environments"] if apart else [])])
        raise RecordError(
            f"{run.path} was measured in another environment", why=f"it differs in {other}", remedy="start a new run"
        )
    for warning in run.warnings:
        watcher.note(warning)
    return run
