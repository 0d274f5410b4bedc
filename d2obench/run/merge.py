"""Shards of one suite → one run folder, as a single run would have left it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from d2obench.errors import RecordError
from d2obench.measure.environment import differences
from d2obench.record import CellRecord, Run, dump, write_atomic
from d2obench.run.folder import new_folder, suite_of, write_info
from d2obench.run.lock import locked
from d2obench.run.resume import KEPT
from d2obench.suite.definition import cells


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
