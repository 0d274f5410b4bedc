"""The folder of a run, ``d2obench-runs/<time>-<suite>/`` or ``--out``: made, checked, locked, described, and merged."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from d2obench import __version__
from d2obench.errors import RecordError
from d2obench.measure.environment import differences
from d2obench.record import CellRecord, Run, RunInfo, cannot_write, dump, read_run, write_atomic
from d2obench.run.plan import cells
from d2obench.run.run_log import KEPT, now
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

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


LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process.

    The file keeps the owner's pid for the message only; what counts is the kernel's lock, so a lock left by a dead
    process is simply taken over.

    Raises:
        RecordError: another process holds the folder, or it can't be written.
    """
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise cannot_write(path, problem) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise RecordError(
                f"{folder} is in use by another run (pid {owner})",
                remedy="wait for it, or choose another folder with --out",
            ) from None
        except OSError as problem:
            raise cannot_write(path, problem) from None
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as problem:
            raise cannot_write(path, problem) from None
        yield
    finally:
        os.close(handle)


def merge(folders: Sequence[Path], out: Path) -> tuple[str, ...]:
    """Writes a run of all cells of the suite into ``out``; what no shard has is missing there, and can be run there.

    Args:
        folders: runs of the same suite on like hardware.
        out: a folder without a run.

    Returns:
        Warnings, such as damaged lines of a shard.

    Raises:
        RecordError: a folder is no run, the suites differ, the machines differ, or ``out`` holds a run.
    """
    runs = [suite_of(folder) for folder in folders]
    (first, suite), info = runs[0], runs[0][0].info
    for run, _ in runs[1:]:
        _check_alike(first, run)
    wanted = {cell.id: cell.hash for cell in cells(suite)}
    found: dict[str, tuple[Run, CellRecord]] = {}
    for run, _ in runs:
        for one in run.cells:
            if wanted.get(one.id) == one.hash and (one.id not in found or found[one.id][1].status not in KEPT):
                found[one.id] = run, one
    folder = new_folder(info.name, out)
    with locked(folder):
        for run, one in found.values():
            _copy_samples(run, one, folder)
        ordered = [found[name][1] for name in wanted if name in found]
        write_atomic(folder / "cells.jsonl", b"".join(dump(one) + b"\n" for one in ordered))
        started = min(run.info.started for run, _ in runs)
        write_info(
            folder,
            msgspec.structs.replace(info, cells=tuple(wanted), started=started, command=_command(info.command)),
        )
    return tuple(f"{run.path}: {warning}" for run, _ in runs for warning in run.warnings)


def _check_alike(first: Run, other: Run) -> None:
    if other.info.suite_digest != first.info.suite_digest:
        raise RecordError(
            f"{other.path} is a run of another suite than {first.path}",
            why=f"{other.info.name} {other.info.suite_digest[:12]}, {first.info.name} {first.info.suite_digest[:12]}",
            remedy=f"put them side by side: d2obench report {first.path} {other.path} --out FOLDER",
        )
    if other.info.environment_hash != first.info.environment_hash:
        differ = ", ".join(differences(first.info.environment, other.info.environment))
        raise RecordError(
            f"{other.path} was measured in another environment than {first.path}",
            why=f"it differs in {differ}",
            remedy="run that shard again on like hardware, or show both: d2obench report RUN … --out FOLDER",
        )


def _copy_samples(run: Run, one: CellRecord, folder: Path) -> None:
    if not one.samples:
        return
    name = f"samples/{one.hash}.json"
    if one.samples != name or "/" in one.hash:
        raise RecordError(f"the samples of {one.id} in {run.path} are not where a run writes them")
    try:
        data = (run.path / name).read_bytes()
    except OSError:  # taken away since: the row stands without them
        return
    write_atomic(folder / name, data)


def _command(words: Sequence[str]) -> tuple[str, ...]:
    """The command of the whole in place of a shard's."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word not in ("--shard", "--out") and not word.startswith(("--shard=", "--out=")):
            kept.append(word)
        skip = not skip and word in ("--shard", "--out")
    return tuple(kept)
