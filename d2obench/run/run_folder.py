"""The folder of a run, ``d2obench-runs/<time>-<suite>/`` or ``--out``, and everything that a run writes into it.

``run.json`` (:func:`write_info`) holds the suite, the planned cells and the environment. ``cells.jsonl`` gets a row for
each cell that ended (:class:`RunLog`). ``samples/<hash>.json`` holds the raw values of a cell (:class:`Samples`); it is
written anew after every round, so that a kill loses one request at most. A run that goes on reads the samples back and
measures what is missing; a cell is finished when its row stands in ``cells.jsonl``. ``.lock`` is held by the process
that writes (:func:`locked`). :func:`merge` makes one run of the shards of a sweep.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from d2obench import __version__
from d2obench.errors import D2OBenchError, OutOfMemory, RecordError
from d2obench.measure.environment import differences
from d2obench.measure.samples import RequestTrace, Window
from d2obench.record import CellRecord, Run, RunInfo, append_cell, cannot_write, dump, read_run, write_atomic
from d2obench.run.plan import cells, larger
from d2obench.run.progress import Display, headline
from d2obench.suite.definition import Suite
from d2obench.tasks.base import Cell

RUNS = Path("d2obench-runs")
LEAST_FREE = 32 * 2**20
"""Bytes that must be free on the disk before a run begins."""
LOCK = ".lock"
_HELD: set[Path] = set()
"""Lock files that this process holds."""
KEPT = ("ok", "oom", "skipped", "incomparable")
"""Statuses that stand when a run goes on; a failed cell is tried again."""


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
    """What ``run.json`` says of a run."""
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets this process alone write to ``folder`` inside this context.

    The kernel holds the lock for this process and ends it with it: a file that a dead process has left locks nothing,
    and neither does a worker that outlives its parent. (``flock`` would pass to every child until it calls ``exec``.)
    Such a lock does not tell the threads of a process apart, so :data:`_HELD` does. The pid in the file is for the
    error message only.

    Raises:
        RecordError: another process or thread holds the folder, or it can't be written.
    """
    path = (folder / LOCK).resolve()
    if path in _HELD:
        raise _in_use(folder, os.getpid())
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as problem:
        raise cannot_write(path, problem) from None
    _HELD.add(path)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as problem:
            if problem.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                raise _in_use(folder, owner or "unknown") from None
            raise cannot_write(path, problem) from None
        yield
    finally:
        _HELD.discard(path)
        os.close(handle)


def _in_use(folder: Path, owner: object) -> RecordError:
    return RecordError(
        f"{folder} is in use by another run (pid {owner})",
        remedy="wait for it, or choose another folder with --out",
    )


def merge(folders: Sequence[Path], out: Path) -> tuple[str, ...]:
    """Makes one run of several shards. A cell that no shard has measured is missing in it; ``--resume`` measures it.

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
    chosen: dict[str, tuple[Run, CellRecord]] = {}
    for run, _ in runs:
        for record in run.cells:
            known = record.id in chosen and chosen[record.id][1].status in KEPT
            if wanted.get(record.id) == record.hash and not known:
                chosen[record.id] = run, record
    folder = new_folder(info.name, out)
    with locked(folder):
        for run, record in chosen.values():
            _copy_samples(run, record, folder)
        ordered = [chosen[name][1] for name in wanted if name in chosen]
        write_atomic(folder / "cells.jsonl", b"".join(dump(record) + b"\n" for record in ordered))
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


def _copy_samples(run: Run, record: CellRecord, folder: Path) -> None:
    if not record.samples:
        return
    name = f"samples/{record.hash}.json"
    if record.samples != name or "/" in record.hash:
        raise RecordError(f"the samples of {record.id} in {run.path} are not where a run writes them")
    try:
        data = (run.path / name).read_bytes()
    except OSError:  # the file was deleted; the row stands without it
        return
    write_atomic(folder / name, data)


def _command(words: Sequence[str]) -> tuple[str, ...]:
    """A shard's command line without the options that made it a shard."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word not in ("--shard", "--out") and not word.startswith(("--shard=", "--out=")):
            kept.append(word)
        skip = not skip and word in ("--shard", "--out")
    return tuple(kept)


class RunLog:
    """Writes the rows of one run and tells the display of them; cells may end in several threads.

    Args:
        folder: the run folder, locked by the caller.
        display: is told of every row.
        records: rows that stand from an earlier part of this run, by cell id.
        environment: hash of the fingerprint of the machine that the cells are measured on.
        cells: those of the run. A cell is skipped where a smaller one of the same kind ran out of memory.

    ``records`` holds every row without its figures, so that a long run takes little memory.
    """

    def __init__(
        self,
        folder: Path,
        display: Display,
        records: Mapping[str, CellRecord] | None = None,
        environment: str = "",
        cells: Iterable[Cell] = (),
    ) -> None:
        self.folder, self.display, self.environment = folder, display, environment
        self.records: dict[str, CellRecord] = {name: _without_figures(row) for name, row in (records or {}).items()}
        self._ran_out = [cell for cell in cells if not self.open(cell) and self.records[cell.id].status == "oom"]
        self._began: dict[str, tuple[str, float]] = {}
        self._flags: dict[str, list[str]] = {}
        self._lock = threading.RLock()
        self._notes: set[str] = set()

    def open(self, cell: Cell) -> bool:
        """Whether the cell still needs a row."""
        return cell.id not in self.records

    def begin(self, cell: Cell) -> None:
        """Records when a cell started; only the first call counts."""
        self._began.setdefault(cell.id, (now(), time.monotonic()))

    def flag(self, cell: Cell, text: str) -> None:
        """Adds a flag to the row that the cell will get."""
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
        with self._lock:
            append_cell(self.folder, record)
            self.records[cell.id] = _without_figures(record)
            if status == "oom":
                self._ran_out.append(cell)
            self.display.cell(cell.id, status, record.reason or headline(record))

    def fail(self, cell: Cell, problem: D2OBenchError, samples: Samples | None = None) -> None:
        """Writes the row of a cell that ended with an error; where the run folder can't be written, the run ends."""
        if isinstance(problem, RecordError):
            raise problem
        kept = samples.name if samples is not None and samples.rounds else None
        self.end(cell, "oom" if isinstance(problem, OutOfMemory) else "failed", reason=str(problem), samples=kept)

    def note_once(self, text: str) -> None:
        """Shows a note about the whole run, the first time it is given."""
        with self._lock:
            if text not in self._notes:
                self._notes.add(text)
                self.display.note(text)

    def skip_if_too_large(self, cell: Cell) -> None:
        """Ends a cell as ``skipped`` where a cell of the same kind that needs no more memory ran out of it."""
        with self._lock:
            smaller = next((other for other in self._ran_out if larger(cell, other)), None)
        if smaller is not None and self.open(cell):
            self.end(cell, "skipped", reason=f"{smaller.id} ran out of memory and is no larger")


def _without_figures(record: CellRecord) -> CellRecord:
    return msgspec.structs.replace(record, values={}, details={})


class Samples:
    """The samples file of one cell: ``data`` is its content, ``name`` its path in the run folder.

    A file that is damaged or incomplete counts as empty, so that the cell is measured again.
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
        return any(trace.get("round") == number for trace in self.rounds)

    def has_windows(self, process: int) -> bool:
        """Whether windows of decode steps were measured in the worker process of this number."""
        return any(window["process"] == process for window in self.data.get("windows", ()))

    def add(self, trace: dict[str, Any]) -> None:
        """Adds a round and writes the file."""
        self.rounds.append(trace)
        self.save()

    def save(self, **values: Any) -> None:
        """Sets keys beside the rounds and writes the file."""
        self.data.update(values)
        write_atomic(self._path, dump(self.data))

    def _read(self) -> dict[str, Any] | None:
        try:
            checked = msgspec.json.decode(self._path.read_bytes(), type=_File)
            whole: dict[str, Any] = msgspec.json.decode(self._path.read_bytes())
        except (OSError, msgspec.DecodeError, RecursionError):
            return None
        started = bool(checked.rounds or checked.windows)
        complete = not started or (checked.batch > 0 and checked.model and checked.counts is not None)
        return whole if complete else None


class _Round(RequestTrace, kw_only=True):
    """What a round in a samples file must hold."""

    seconds: float


class _File(msgspec.Struct):
    """What a samples file must hold so that a run can go on with it."""

    cell: str
    rounds: list[_Round] = []
    batch: int = 0
    model: dict[str, Any] = {}
    counts: dict[str, float] | None = None
    windows: list[Window] = []
    plan: dict[str, int] | None = None


def forget_cut_round(folder: Path, cells: Iterable[Cell]) -> None:
    """Removes the last round of a group from its samples where a lost device has left it incomplete.

    Otherwise the other cells would be measured for this round on another device, but the two times of a ratio must come
    from the same one.
    """
    group = [samples for samples in (Samples(folder, cell) for cell in cells) if "stopped" not in samples.data]
    last = max((trace["round"] for samples in group for trace in samples.rounds), default=0)
    if all(samples.has(last) for samples in group):
        return
    for samples in group:
        if samples.has(last):
            samples.rounds[:] = [trace for trace in samples.rounds if trace["round"] != last]
            samples.save()


def finished(cells: Iterable[Cell], records: Iterable[CellRecord]) -> dict[str, CellRecord]:
    """Records that still stand, by cell id: those of cells that came to an end and have the same content hash now."""
    hashes = {cell.id: cell.hash for cell in cells}
    return {row.id: row for row in records if row.status in KEPT and hashes.get(row.id) == row.hash}


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
