"""The records of a run as plain data, and how they are read and written. Nothing here imports torch or renders.

A run folder holds ``run.json``, which is one :class:`RunInfo`; ``cells.jsonl``, which has one :class:`CellRecord` in
each line, appended and flushed when a cell ends; ``samples/<hash>.json`` with every raw value of a cell; and the views
made from these.

Schema 1 was the first version. Since schema 2, a value says whether its bounds are an interval or a range. Bounds of
schema 1 are those of a percentile bootstrap, which count as a range if it had seven samples or fewer.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from d2obench.errors import RecordError

SCHEMA = 2
MAX_LINE = 8 * 2**20
SCORES = ("score", "em", "top1", "mc")
"""Beginnings of the keys of metrics that are a share of items."""
STATUSES = ("ok", "oom", "skipped", "failed", "incomparable")
Bounded = Literal["", "interval", "range", "exact"]
"""What the bounds of a value are; empty if it has none."""


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """One figure of a cell.

    Args:
        value: the figure in the base unit of its metric: seconds, bytes, tokens per second, nats, or a plain ratio or
            fraction (:mod:`d2obench.metric`). None if it could not be measured.
        lo, hi: its bounds, in the same unit.
        n: number of independent samples: rounds, windows of decode steps, or documents.
        note: why the value is missing, or how it was obtained.
        kind: what the bounds are: a 95 % ``interval``; the ``range`` of samples that are too few for an interval; or
            ``exact`` if all samples were equal.
        method: of the interval (:mod:`d2obench.stats.intervals`).
        df: degrees of freedom of that method.
    """

    value: float | None
    lo: float | None = None
    hi: float | None = None
    n: int = 1
    note: str = ""
    kind: Bounded = ""
    method: str = ""
    df: int = 0


class Axes(msgspec.Struct, frozen=True):
    """One point of a suite, as text. An axis that the task or the policy does not use is None.

    Args:
        task: ``speed``, or a quality task with its parameters.
        model: as named in the suite, for example ``embedded`` or ``shape:llama-3-8b``.
        dtype: of weights, activations and cache, for example ``float32``.
        device: for example ``cpu`` or ``cuda:0``.
        policy: with its parameters, for example ``d2o(merge=values)``.
        budget: what the policy may keep: a share of the prompt (``0.2``) or tokens per layer (``512``).
        shape: ``prompt+gen``, in tokens of each sequence.
        batch: number of sequences decoded together, or ``max``.
        seed: of every random choice.
    """

    task: str
    model: str
    dtype: str
    device: str
    policy: str
    budget: str | None
    shape: str | None
    batch: int | str | None
    seed: int


class CellRecord(msgspec.Struct, frozen=True):
    """One finished cell: a line of ``cells.jsonl``.

    Args:
        id: the axes, joined by slashes; readable and the same in every run.
        hash: of everything that the result depends on.
        axes: the point that was measured.
        status: one of STATUSES.
        reason: why the status is not ``ok``.
        values: figures by key of the metric table.
        details: facts that only some views use: kept tokens of each layer, the decode path, the number of fresh
            processes, whether the machine was busy.
        flags: remarks that every view has to show, such as ``keeps more than asked`` or ``sampled decode``.
        samples: the file with every raw value, relative to the run folder.
        started: date and time, ISO 8601.
        seconds: how long the cell took, without loading the model.
        environment: hash of the environment in which it was measured.
        schema: of this record.
    """

    id: str
    hash: str
    axes: Axes
    status: str
    reason: str = ""
    values: dict[str, Value] = {}
    details: dict[str, Any] = {}
    flags: tuple[str, ...] = ()
    samples: str | None = None
    started: str = ""
    seconds: float = 0.0
    environment: str = ""
    schema: int = SCHEMA


class RunInfo(msgspec.Struct, frozen=True):
    """The content of ``run.json``: what was asked for, where it ran, and with which code.

    Args:
        name: of the suite.
        suite: the resolved suite: every table with its defaults and what was set on the command line.
        suite_digest: SHA-256 of the resolved suite.
        cells: ids of the planned cells, in order.
        environment: facts of the machine and the software, such as processor, threads, versions and commit.
        environment_hash: of those facts that figures depend on.
        command: the command line, without folders of the machine.
        version: of d2obench.
        started: date and time, ISO 8601.
        schema: of this record.
    """

    name: str
    suite: dict[str, Any]
    suite_digest: str
    cells: tuple[str, ...]
    environment: dict[str, Any]
    environment_hash: str
    command: tuple[str, ...]
    version: str
    started: str
    schema: int = SCHEMA


class Run(msgspec.Struct, frozen=True):
    """A run folder as it was read.

    Args:
        path: the folder.
        info: the content of ``run.json``.
        cells: every cell that has ended, in the order of the plan.
        warnings: remarks about the files, such as an incomplete last line that was left out.
    """

    path: Path
    info: RunInfo
    cells: tuple[CellRecord, ...]
    warnings: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of planned cells that have no record yet."""
        done = {cell.id for cell in self.cells}
        return tuple(cell for cell in self.info.cells if cell not in done)


def finite(value: Any) -> Any:
    """``value`` with NaN and infinity replaced by None, in nested lists and dictionaries, because JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def dump(value: Any) -> bytes:
    """A record as JSON with sorted keys, which is how all records are written."""
    plain = finite(msgspec.to_builtins(value))
    return json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file in one step, so that no reader ever finds half of it.

    Raises:
        RecordError: the disk is full or the folder can't be written; the old file is kept.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as problem:
        with contextlib.suppress(OSError):  # the incomplete file would fill up a full disk
            partial.unlink()
        raise cannot_write(path, problem) from problem


def append_cell(folder: Path, cell: CellRecord) -> None:
    """Appends one line to ``cells.jsonl`` and flushes it to the disk. If the file ends in an incomplete line, a line
    break is added first."""
    path = folder / "cells.jsonl"
    try:
        with open(path, "ab+") as file:
            torn = False
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write((b"\n" if torn else b"") + dump(cell) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        raise cannot_write(path, problem) from problem


def read_run(folder: Path) -> Run:
    """Reads a run folder. Damaged lines of ``cells.jsonl`` are left out with a warning.

    A cell can have several records, for example if a run was continued after it had been killed. The last one counts.

    Raises:
        RecordError: ``run.json`` is missing or damaged, or has a later schema.
    """
    info = _read_info(folder)
    cells: dict[str, CellRecord] = {}
    warnings: list[str] = []
    path = folder / "cells.jsonl"
    if path.exists():
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file), 1):
                try:
                    cell = _cell(line)
                except (msgspec.DecodeError, ValueError, RecursionError) as problem:
                    warnings.append(f"{path.name} line {number} was left out: {str(problem)[:200]}")
                    continue
                cells[cell.id] = cell
    order = {cell: i for i, cell in enumerate(info.cells)}
    ordered = sorted(cells.values(), key=lambda cell: order.get(cell.id, len(order)))
    return Run(folder, info, tuple(ordered), tuple(warnings))


def read_samples(folder: Path, cell: CellRecord) -> dict[str, Any]:
    """The raw values of a cell; empty if there are none or the file is damaged.

    Raises:
        RecordError: the record names a file outside the run folder.
    """
    return samples_at(folder, cell.samples, cell.id) if cell.samples else {}


def samples_at(folder: Path, name: str, cell: str) -> dict[str, Any]:
    """The content of the file ``name`` in a run folder; empty if it is damaged.

    Raises:
        RecordError: it lies outside the run folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RecordError(f"the samples of {cell} point outside the run folder")
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def cannot_write(path: Path, problem: OSError, remedy: str = "free some space or choose another folder") -> RecordError:
    """The error for a file that can't be written."""
    return RecordError(f"can't write {path}", why=problem.strerror or str(problem), remedy=remedy)


def _read_info(folder: Path) -> RunInfo:
    path = folder / "run.json"
    remedy = "give the folder a run wrote, for example d2obench-runs/<time>-<suite>"
    try:
        info = msgspec.json.decode(path.read_bytes(), type=RunInfo)
    except FileNotFoundError:
        raise RecordError(f"{folder} is not a run folder", why="it has no run.json", remedy=remedy) from None
    except OSError as problem:
        raise RecordError(f"can't read {path}", why=problem.strerror or str(problem), remedy=remedy) from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise RecordError(f"can't read {path}", why=str(problem), remedy=remedy) from None
    if info.schema > SCHEMA:
        raise RecordError(
            f"{path} has schema {info.schema}", why=f"this version reads up to {SCHEMA}", remedy="update d2obench"
        )
    return info


def _lines(file: Any) -> Any:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1)
            yield b'"a line of more than 8 MiB"'
        elif line.strip():
            yield line


def _cell(line: bytes) -> CellRecord:
    cell = msgspec.json.decode(line, type=CellRecord)
    if cell.status not in STATUSES:
        raise ValueError(f"unknown status '{cell.status[:40]}'")
    return cell if cell.schema > 1 else with_kinds(cell)


def with_kinds(cell: CellRecord) -> CellRecord:
    """The cell with the kind of each value's bounds, which schema 1 did not record.

    In schema 1 the bounds of times came from rounds, whose number is in ``details``, and those of quality from
    documents, whose number may be a parameter of the task; ``n`` counted steps or positions. The bounds of memory peaks
    were a range.
    """
    rounds, documents = cell.details.get("rounds"), re.search(r"documents=(\d+)", cell.axes.task)
    most = rounds if isinstance(rounds, int) else int(documents[1]) if documents else None

    def with_kind(key: str, value: Value) -> Value:
        if value.lo is None or value.hi is None or value.kind:
            return value
        n = value.n if most is None else min(most, value.n)
        kind: Bounded = "range" if n <= 7 or key.endswith("_bytes") else "interval"
        alike = value.lo == value.hi and not key.startswith(SCORES)  # equal scores are still a sample, not exact
        return msgspec.structs.replace(value, n=n, kind="exact" if alike else "range" if value.lo == value.hi else kind)

    return msgspec.structs.replace(cell, values={key: with_kind(key, value) for key, value in cell.values.items()})
