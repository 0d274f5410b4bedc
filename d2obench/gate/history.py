"""The figures of many runs and gates over time: one file of JSON lines that only ever grows at its end.

A line is one :class:`Entry`. Lines may stand in any order and more than once: they are sorted by time when they are
read, and equal ones count once. Two branches that both added lines are therefore merged by keeping all lines, which git
does by itself with the attribute ``merge=union`` that :func:`add` sets. Lines that can't be read, such as an incomplete
last one or the marks of an unsolved merge, are left out with a warning; :func:`repair` removes them.

Figures are only ever compared within a :class:`Series`: one figure of one cell of one suite with the same settings, on
the same class of machine, with the same versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec

from d2obench.errors import RecordError
from d2obench.metric import METRICS
from d2obench.record import Value, cannot_write, dump, write_atomic

SCHEMA = 1
FILE = Path("d2obench-history.jsonl")
VERSIONS = ("d2obench", "torch", "transformers")
"""Versions by which figures are kept apart."""
CONFLICT = (b"<<<<<<<", b"=======", b">>>>>>>", b"|||||||")
"""Beginnings of the lines that an unsolved merge leaves."""
LEAST = 3
"""The fewest entries of a level between two change points."""
PENALTY = 6.0
"""What a further change point costs, in units of ln(number of entries), beside squared distances in units of noise."""
FLOOR = 0.001
"""The smallest noise that is assumed, relative to the figure: rounding alone is no change."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: the figures of one run, or of the head of one gate.

    Args:
        id: digest of everything else.
        when: date and time of the measurement, ISO 8601.
        commit: of the code that was measured, with ``+dirty`` if files differed from it.
        suite: its name, or the command that was measured.
        settings: digest of the settings that decide what is measured.
        machine: class of the machine, its processor and its threads, in words.
        versions: by name, see VERSIONS.
        figures: cell → metric → figure in base units.
        verdict: of the gate; empty for a run.
        schema: of the line.
    """

    when: str
    commit: str
    suite: str
    settings: str
    machine: str
    versions: dict[str, str]
    figures: dict[str, dict[str, Value]]
    verdict: str = ""
    id: str = ""
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """What ``id`` has to be; a whole number counts as the same number with a point, as which it is read again."""
        plain = msgspec.to_builtins(msgspec.structs.replace(self, id=""))
        return hashlib.sha256(dump(msgspec.convert(plain, Entry))).hexdigest()[:20]


class History(NamedTuple):
    """A file as it was read: its entries by time, and a warning for every line that was left out."""

    entries: list[Entry]
    warnings: list[str]


class Point(NamedTuple):
    """One figure of a series."""

    entry: Entry
    value: Value


class Series(NamedTuple):
    """Figures that can be compared with each other, by time; ``changes`` are the indices at which a level begins."""

    suite: str
    settings: str
    cell: str
    metric: str
    machine: str
    versions: str
    points: list[Point]
    changes: list[int]


def read(path: Path) -> History:
    """Reads a history; a file that does not exist is an empty one.

    Raises:
        RecordError: it can't be read at all.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return History([], [])
    except OSError as problem:
        raise RecordError(f"can't read {path}", why=problem.strerror or str(problem)) from None
    found: dict[str, Entry] = {}
    warnings = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = _read_line(line)
        except (msgspec.DecodeError, ValueError, RecursionError) as problem:
            warnings.append(f"{path.name} line {number} was left out: {str(problem)[:200]}")
            continue
        found[entry.id] = entry
    return History(sorted(found.values(), key=lambda entry: (entry.when, entry.id)), warnings)


def _read_line(line: bytes) -> Entry:
    if line.startswith(CONFLICT):
        raise ValueError("it is the mark of an unsolved merge")
    entry = msgspec.json.decode(line, type=Entry)
    if entry.schema > SCHEMA:
        raise ValueError(f"it has schema {entry.schema}, and this version reads up to {SCHEMA}: update d2obench")
    if entry.id != entry.digest:
        raise ValueError("it was changed after it had been written")
    return entry


def add(path: Path, entry: Entry) -> bool:
    """Appends an entry, and sets git's attribute for the file. Returns False if the file has the entry already.

    Raises:
        RecordError: the file can't be written.
    """
    if any(known.id == entry.id for known in read(path).entries):
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            line = (b"\n" if torn else b"") + dump(entry) + b"\n"
            if os.write(handle, line) < len(line):
                raise OSError("the disk is full")
            os.fsync(handle)
        except OSError:
            with contextlib.suppress(OSError):  # half a line would be left out later, but it need not stay
                os.ftruncate(handle, size)
            raise
        finally:
            os.close(handle)
    except OSError as problem:
        raise cannot_write(path, problem) from None
    _merge_by_union(path)
    return True


def _merge_by_union(path: Path) -> None:
    """Lets git merge the file by keeping the lines of both sides, if it lies in a repository."""
    command = ["git", "-C", str(path.parent.resolve()), "check-attr", "merge", "--", path.name]
    try:
        said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError:
        return
    if said.returncode or said.stdout.strip().endswith(": union"):
        return
    attributes = path.parent / ".gitattributes"
    text = attributes.read_text("utf-8") if attributes.exists() else ""
    text += "\n" if text and not text.endswith("\n") else ""
    write_atomic(attributes, f"{text}{path.name} merge=union\n".encode())


def repair(path: Path) -> list[str]:
    """Rewrites the file without the lines that can't be read and without repetitions. Returns the warnings of
    :func:`read`; without any, the file is left alone.

    Raises:
        RecordError: the file can't be written, or holds lines of a later version, which would be lost.
    """
    found = read(path)
    if any("update d2obench" in warning for warning in found.warnings):
        raise RecordError(f"{path} holds entries of a later version", remedy="update d2obench, then repair it")
    if found.warnings:
        _write(path, found.entries)
    return found.warnings


def prune(path: Path, keep: int) -> int:
    """Keeps the newest ``keep`` entries of each suite on each class of machine. Returns how many were removed.

    Raises:
        RecordError: the file can't be written, or has damaged lines.
    """
    found = read(path)
    if found.warnings:
        raise RecordError(
            f"{path} has damaged lines", why=found.warnings[0], remedy="run d2obench history repair first"
        )
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in found.entries:
        groups.setdefault((entry.suite, entry.settings, entry.machine), []).append(entry)
    kept = {entry.id for group in groups.values() for entry in group[-keep:]}
    if len(kept) < len(found.entries):
        _write(path, [entry for entry in found.entries if entry.id in kept])
    return len(found.entries) - len(kept)


def _write(path: Path, entries: Iterable[Entry]) -> None:
    write_atomic(path, b"".join(dump(entry) + b"\n" for entry in entries))


def series(entries: Sequence[Entry]) -> list[Series]:
    """Every series of a history, those that changed first, then by name."""
    groups: dict[tuple[str, str, str, str, str, str], list[Point]] = {}
    for entry in entries:
        versions = ", ".join(f"{name} {entry.versions[name]}" for name in VERSIONS if name in entry.versions)
        for cell, figures in entry.figures.items():
            for metric, value in figures.items():
                if value.value is not None and metric in METRICS:
                    key = (entry.suite, entry.settings, cell, metric, entry.machine, versions)
                    groups.setdefault(key, []).append(Point(entry, value))
    found = [Series(*key, points=points, changes=change_points(key[3], points)) for key, points in groups.items()]
    return sorted(found, key=lambda one: (not one.changes, one[:6]))


def change_points(metric: str, points: Sequence[Point]) -> list[int]:
    """The indices at which a new level begins.

    A figure that is the same in every repeat begins a new one whenever it changes. Of others, the levels are those that
    minimise the squared distances to their means, in units of the noise between neighbours, plus a penalty for each
    change (the method PELT, Killick et al., JASA 2012; by the package ``ruptures``, without which there are none).
    """
    values = [float(point.value.value or 0.0) for point in points]
    if METRICS[metric].kind == "exact":
        pairs = enumerate(pairwise(values), 1)
        return [i for i, (before, after) in pairs if not math.isclose(before, after, rel_tol=1e-9)]
    if len(values) < 2 * LEAST or not can_find_changes():
        return []
    import numpy as np
    import ruptures

    x = np.log(values) if min(values) > 0 else np.asarray(values)
    steps = np.abs(np.diff(x))
    noise = max(float(np.median(steps)) * 1.4826 / math.sqrt(2), FLOOR * (1.0 if min(values) > 0 else abs(x).max()))
    if noise == 0:
        return []
    method = ruptures.Pelt(model="l2", min_size=LEAST, jump=1).fit((x / noise).reshape(-1, 1))
    return [int(i) for i in method.predict(pen=PENALTY * math.log(len(values)))[:-1]]


def can_find_changes() -> bool:
    """Whether the package that finds change points is installed."""
    return importlib.util.find_spec("ruptures") is not None
