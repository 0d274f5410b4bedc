"""``--engine slurm``: writes an array script whose tasks each run a shard of the suite into a folder of their own.

A task that Slurm queues again goes on where it was stopped. ``d2obench merge`` makes one run of the shards.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from d2obench.errors import UsageError, WorkerError
from d2obench.record import write_atomic
from d2obench.run.check import check_suite
from d2obench.run.plan import cells, group
from d2obench.run.run_folder import new_folder
from d2obench.suite.definition import Suite

SCRIPT = "sweep.sbatch"
SUBMIT_S = 120.0
MOST_TASKS = 8
"""Largest number of tasks where ``--shards`` is not given."""


def script(suite: Suite, folder: Path, shards: int, words: Sequence[str], options: Sequence[str] = ()) -> str:
    """The text of an array script.

    Args:
        suite: decides what a task asks for: GPUs, or a node of its own.
        folder: absolute; shards are written to ``folder/shards/N``, logs to ``folder/logs``.
        shards: number of tasks.
        words: the suite and its settings, as they stand after ``d2obench run``.
        options: of sbatch, such as ``--partition=gpu``; they come last, so that they override ours.

    Raises:
        UsageError: an option or the folder can't stand in a script.
    """
    place = str(folder)
    if re.search(r"[\s%'\"\\]", place):
        raise UsageError(f"sbatch can't write its log to {place!r}", remedy="choose an --out without such characters")
    for option in options:
        if not re.fullmatch(r"-[\w-]+([= ]?[^\x00-\x1f\x7f]*)?", option):
            raise UsageError(f"can't pass {option!r} to sbatch", remedy="write it as --sbatch=--partition=gpu")
    gpus = suite.models.tensor_parallel
    directives = [
        f"--job-name=d2obench-{re.sub(r'[^A-Za-z0-9_.-]+', '-', suite.name)}",
        f"--array=1-{shards}",
        "--nodes=1",
        "--ntasks=1",
        "--requeue",
        f"--output={place}/logs/%a.log",
        *([f"--gpus={gpus}"] if suite.axes.device[0].startswith("cuda") else ["--exclusive", "--mem=0"]),
        *options,
    ]
    run = shlex.join([sys.executable, "-m", "d2obench", "run"])
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {directive}" for directive in directives),
            "set -eu",
            f"run={shlex.quote(place)}/shards/$SLURM_ARRAY_TASK_ID",
            'if [ -e "$run/run.json" ]; then',
            f'    exec {run} --no-progress --resume "$run"',
            "fi",
            f'exec {run} --no-progress {shlex.join(words)} --shard "$SLURM_ARRAY_TASK_ID/{shards}" --out "$run"',
            "",
        ]
    )


class Array(NamedTuple):
    """An array script that was written: its tasks run shards of a suite with ``groups`` groups of cells."""

    script: Path
    tasks: int
    groups: int


def write_array(
    suite: Suite, words: Sequence[str], out: Path | None, shards: int | None, options: Sequence[str]
) -> Array:
    """Checks a suite and writes the array script that runs its shards.

    Args:
        suite: with the settings of the command line.
        words: see :func:`words_of`.
        out: the folder of the sweep; None for a new one.
        shards: number of tasks; None for one for each group of cells, but at most :data:`MOST_TASKS`.
        options: of sbatch.

    Raises:
        D2OBenchError: the suite can't run, there are fewer groups than shards, or the folder can't be written.
    """
    check_suite(suite)
    groups = len(group(cells(suite)))
    if shards is not None and shards > groups:
        raise UsageError(f"{shards} shards are too many", why=f"the suite has {groups} groups of cells")
    tasks = shards or min(groups, MOST_TASKS)
    script(suite, Path("/"), tasks, words, options)  # finds what is wrong before a folder is made
    folder = new_folder(suite.name, out).resolve()
    return Array(write(folder, script(suite, folder, tasks, words, options)), tasks, groups)


def words_of(suite: str, given: Mapping[str, str], *, allow_busy: bool = False) -> list[str]:
    """What to type after ``d2obench run`` for the same suite from any folder."""
    name = str(Path(suite).resolve()) if suite.endswith(".toml") else suite
    more = [f"--set={key}={value}" for key, value in given.items()]
    return [name, *more, *(["--allow-busy"] if allow_busy else [])]


def write(folder: Path, text: str) -> Path:
    """Writes the script; the folder of the logs must be there before a task starts."""
    path = folder / SCRIPT
    write_atomic(path, text.encode())
    write_atomic(folder / "logs" / ".keep", b"")
    return path


def submit(path: Path) -> str:
    """Hands the script to sbatch and returns what it says.

    Raises:
        WorkerError: there is no sbatch here, or it refuses.
    """
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, timeout=SUBMIT_S, check=False)
    except FileNotFoundError:
        raise WorkerError("there is no sbatch here", remedy=f"submit it where there is one: sbatch {path}") from None
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise WorkerError("sbatch did not answer", why=str(problem)) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = lines[-1][:300] if lines else f"it ended with {done.returncode}"
        raise WorkerError(f"sbatch refused {path}", why=why)
    return done.stdout.strip()
