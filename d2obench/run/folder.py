"""Where a run lives: ``d2obench-runs/<time>-<suite>/`` or ``--out``; made, checked and described here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from d2obench import __version__
from d2obench.errors import RecordError
from d2obench.record import Run, RunInfo, cannot_write, dump, read_run, write_atomic
from d2obench.suite.definition import Cell, Suite

RUNS = Path("d2obench-runs")
LEAST_FREE = 32 * 2**20


def new_folder(suite: str, out: Path | None = None) -> Path:
    """Makes the folder of a new run and checks that it can be written.

    Raises:
        RecordError: the folder holds a run already, can't be written, or its disk is full.
    """
    name = re.sub(r"[^\w.-]+", "-", suite)  # a suite's name is free text
    path = out or RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    if out is None:
        base, count = path, 1
        while path.exists():
            count += 1
            path = base.with_name(f"{base.name}-{count}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if out is None and not (RUNS / ".gitignore").exists():
            (RUNS / ".gitignore").write_text("*\n")
        free = shutil.disk_usage(path).free
    except OSError as problem:
        raise cannot_write(path, problem) from None
    if (path / "run.json").exists():
        raise RecordError(
            f"{path} holds a run already", remedy=f"go on with --resume {path}, or choose another folder with --out"
        )
    if free < LEAST_FREE:
        raise RecordError(
            f"{path} has {free / 2**20:.0f} MiB of free space",
            why=f"a run needs {LEAST_FREE // 2**20}",
            remedy="free some or choose another folder with --out",
        )
    probe = path / ".probe"
    write_atomic(probe, b"")
    probe.unlink(missing_ok=True)
    return path


def describe_run(
    suite: Suite, cells: Sequence[Cell], environment: dict[str, Any], environment_hash: str, command: Sequence[str]
) -> RunInfo:
    """The head of a run, as ``run.json`` keeps it."""
    return RunInfo(
        name=suite.name,
        suite=msgspec.to_builtins(suite),
        suite_digest=suite.digest,
        cells=tuple(cell.id for cell in cells),
        environment=environment,
        environment_hash=environment_hash,
        command=tuple(command),
        version=__version__,
        started=now(),
    )


def write_info(folder: Path, info: RunInfo) -> None:
    """Writes ``run.json`` in one step."""
    write_atomic(folder / "run.json", dump(info))


def suite_of(folder: Path) -> tuple[Run, Suite]:
    """A run to go on with and the suite it was started with.

    Raises:
        RecordError: not a run folder, or one whose suite this version can't read.
    """
    run = read_run(folder)
    try:
        return run, msgspec.convert(run.info.suite, Suite)
    except msgspec.ValidationError as problem:
        raise RecordError(
            f"{folder / 'run.json'} holds a suite that this version can't read",
            why=str(problem),
            remedy="start a new run",
        ) from None


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
