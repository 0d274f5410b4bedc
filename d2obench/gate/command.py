"""A gate on what a command of the user's writes: any program in any language, in the checkouts of two revisions.

The command runs once a round on each side, in turns. It writes a folder, whose path is in the environment variable
``D2OBENCH_RECORD`` and replaces the word ``{record}`` of the command. ``d2obench run … --out {record}`` writes such a
folder; any other program writes a file ``cells.jsonl`` with one line for each thing that it measured::

    {"id": "serve/d2o", "values": {"tpot_s": 0.0121, "kv_bytes": 4096}, "items": [{"id": "q1", "kl": 0.31}]}

``values`` has metrics of ``d2obench list metrics`` in base units (seconds, bytes). Times are judged by pairs of rounds,
counts must be the same in every round, and ``items`` are compared one by one. Other keys are not judged.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec

from d2obench import __version__
from d2obench.errors import UsageError, WorkerError
from d2obench.gate.baseline import device_class
from d2obench.gate.compare import items_of
from d2obench.gate.environments import Place, mode_of, places
from d2obench.gate.exclusive import exclusive
from d2obench.gate.gate import Side, revisions
from d2obench.gate.rules import (
    confirm,
    judge_bounded,
    judge_budget,
    judge_exact,
    judge_repeats,
    judge_sampled,
    judge_timed,
    missing,
    tolerance,
)
from d2obench.gate.sides import Watch
from d2obench.gate.verdict import KINDS, Row, Verdict, Verdicts, gather, of_kinds
from d2obench.gate.worktree import SPACE, Repository, scratch, terminable, work_tree, worktrees
from d2obench.measure.environment import fingerprint
from d2obench.metric import METRICS
from d2obench.models.embedded import cache_folder
from d2obench.record import Value, cannot_write, samples_at
from d2obench.run.run_folder import now
from d2obench.stats.intervals import mean
from d2obench.stats.intervals import median as median_of
from d2obench.suite.definition import GateTable, gate_table

RECORD = "D2OBENCH_RECORD"
TIMEOUT_S = 3600.0
"""Seconds that one run of the command may take."""
FEW = 2
"""Rounds if the command gives no times: enough to see whether its counts are the same each time."""


class Line(msgspec.Struct):
    """One line of ``cells.jsonl``: a cell's record, or as little of it as a gate needs."""

    id: str
    status: str = "ok"
    reason: str = ""
    values: dict[str, Value | float | None] = {}
    items: list[dict[str, Any]] = []
    samples: str | None = None

    @property
    def figures(self) -> dict[str, float]:
        """The values that are numbers."""
        plain = {key: one.value if isinstance(one, Value) else one for key, one in self.values.items()}
        return {key: value for key, value in plain.items() if value is not None}


Lines = dict[str, Line]
Rounds = dict[str, list[Lines]]
"""The lines of each round, by side."""


class CommandArm(NamedTuple):
    """One side: what is run, where, and the folder that receives its records."""

    name: str
    words: Sequence[str]
    root: Path
    place: Place
    scratch: Path

    def measure(self) -> Lines:
        """Runs the command once.

        Returns:
            What it wrote, by id.

        Raises:
            WorkerError: it can't be started, failed, took too long, or wrote nothing that can be read.
        """
        record, log = self.scratch / self.name, self.scratch / f"{self.name}.log"
        shutil.rmtree(record, ignore_errors=True)
        record.mkdir()
        known = os.environ.get("PYTHONPATH", "")
        env = {
            **os.environ,
            RECORD: str(record),
            "PATH": os.pathsep.join([str(Path(self.place.python).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(filter(None, (*map(str, self.place.paths), known))),
        }
        words = [word.replace("{record}", str(record)) for word in self.words]
        with open(log, "wb") as file:
            try:
                process = subprocess.Popen(
                    words, cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as problem:
                raise WorkerError(f"the {self.name}'s command can't be started", why=f"{words[0]}: {problem}") from None
            try:
                code = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise WorkerError(f"the {self.name}'s command took longer than {TIMEOUT_S:g} s") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            last = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()][-1:]
            raise WorkerError(f"the {self.name}'s command ended with code {code}", why="".join(last)[:500])
        return read_lines(record, self.name)


def read_lines(record: Path, name: str) -> Lines:
    """The lines of a ``cells.jsonl`` by id; of several lines with the same id, the last one.

    Raises:
        WorkerError: there is no such file, a line can't be read, or there is no line.
    """
    found: Lines = {}
    written = next(iter(sorted(record.rglob("cells.jsonl"))), None)
    if written is None:
        raise WorkerError(
            f"the {name}'s command wrote no cells.jsonl", remedy=f"let it write into the folder that {RECORD} names"
        )
    for number, text in enumerate(written.read_bytes().splitlines(), 1):
        if text.strip():
            try:
                line = msgspec.json.decode(text, type=Line)
            except (msgspec.DecodeError, RecursionError) as problem:
                raise WorkerError(
                    f"line {number} of the {name}'s cells.jsonl can't be read", why=str(problem)
                ) from None
            if line.samples and not line.items:
                line.items = samples_at(written.parent, line.samples, line.id).get("items") or []
            found[line.id] = line
    if not found:
        raise WorkerError(f"the {name}'s cells.jsonl is empty")
    return found


def gate_command(
    command: str,
    overrides: Mapping[str, str],
    base: Side,
    head: Side,
    *,
    folder: Path,
    watch: Watch,
    kinds: Collection[str] = KINDS,
) -> Verdicts:
    """Compares what a command writes in two revisions of the repository that contains ``folder``.

    Args:
        command: the words, quoted as in a shell; no shell runs it.
        overrides: keys of the table ``[gate]``.
        base, head, folder, watch, kinds: as for :func:`d2obench.gate.gate.gate`.

    Raises:
        UsageError: there is no repository or no such revision, or nothing can be compared.
        WorkerError: the base's command failed.
    """
    try:
        words = shlex.split(command)
    except ValueError as problem:
        raise UsageError("can't read --command", why=str(problem)) from None
    if not words:
        raise UsageError("--command is empty", remedy="give the words of a program: --command 'python bench.py'")
    table, repository = gate_table(overrides), Repository(folder)
    commits, names = revisions(repository, base, head)
    mode = "none" if table.environment == "auto" else mode_of(table.environment, repository.root)
    with terminable(), ExitStack() as stack:
        watch("checking out")
        roots = {"head": repository.root, **stack.enter_context(worktrees(repository, commits))}
        if mode != "none" and "head" not in commits:
            roots["head"] = stack.enter_context(work_tree(repository))
        where = stack.enter_context(places(roots, {"base": base.python, "head": head.python}, mode, watch))
        records = stack.enter_context(scratch("records"))
        arms = {name: CommandArm(name, words, roots[name], where[name], records) for name in ("base", "head")}
        stack.enter_context(exclusive(cache_folder() / "gate.lock", "another gate measures on this machine", watch))
        rows, notes = compare_commands(arms, table, watch)
    found = fingerprint()
    facts = {key: str(found[key]) for key in ("cpu", "python") if found.get(key) is not None}
    facts["machine"] = device_class(found)
    changed = "" if head.revision or not repository.dirty else "+dirty"
    commit = repository.commit(head.revision or "HEAD") + changed
    about = {"when": now(), "suite": command, "commit": commit, "d2obench": __version__, **facts}
    return gather("gate command", names["base"], names["head"], of_kinds(rows, kinds), notes, about=about)


def compare_commands(arms: Mapping[str, CommandArm], table: GateTable, watch: Watch) -> tuple[list[Row], list[str]]:
    """Runs the command of both sides in turns, until every time is decided or the last look is reached; a time that
    regressed has to do so in a second sitting, too.

    Returns: every row, and notes for the reader.
    """
    rounds, timed, failure = _sitting(arms, table, watch)
    bad = {key for key, row in timed.items() if row.verdict is Verdict.REGRESSED}
    if bad and failure is None:
        watch(f"confirming {len(bad)} regressions with a second sitting")
        _, again, failure = _sitting(arms, table, watch, bad)
        timed |= {key: confirm(timed[key], again.get(key)) for key in bad}
    if failure is not None:
        return [failure], []
    unknown = sorted({key for line in rounds["head"][0].values() for key in line.figures} - METRICS.keys())
    notes = [f"figures that no rule judges: {', '.join(unknown)}"] if unknown else []
    return [*_steady(rounds, table), *timed.values()], notes


def _sitting(
    arms: Mapping[str, CommandArm], table: GateTable, watch: Watch, wanted: Collection[tuple[str, str]] | None = None
) -> tuple[Rounds, dict[tuple[str, str], Row], Row | None]:
    """One sitting: its rounds, the times of ``wanted`` (cell and metric; all by default) as judged, and the row of a
    head whose command failed. The first decision on a time stands."""
    rounds: Rounds = {"base": [], "head": []}
    timed: dict[tuple[str, str], Row] = {}
    for look in sorted(table.looks):
        failure = _measure(arms, rounds, look, watch)
        if failure is not None:
            return rounds, timed, failure
        for cell, metric, base, head in _times(rounds):
            key, limit = (cell, metric), tolerance(metric, table.tolerance)
            open_ = key not in timed or timed[key].verdict is Verdict.INCONCLUSIVE
            if open_ and (wanted is None or key in wanted):
                timed[key] = judge_timed(cell, metric, base, head, limit, table.level)
        if all(row.verdict is not Verdict.INCONCLUSIVE for row in timed.values()):
            break
    return rounds, timed, None


def _measure(arms: Mapping[str, CommandArm], rounds: Rounds, look: int, watch: Watch) -> Row | None:
    """Goes on to so many rounds, in ABBA order. Returns the row of a head whose command fails."""
    watch(f"rounds {len(rounds['base']) + 1} to {look} of the command")
    while len(rounds["base"]) < look:
        number = len(rounds["base"])
        for name in ("base", "head") if number % 2 == 0 else ("head", "base"):
            try:
                found = arms[name].measure()
            except WorkerError as problem:
                if name == "base":
                    raise
                return Row("*", "status", Verdict.REGRESSED, "exact", "ok", "failed", reason=str(problem))
            except OSError as problem:
                raise cannot_write(arms[name].scratch, problem, SPACE) from None
            rounds[name].append(found)
        if number + 1 >= FEW and not _times(rounds):
            break
    return None


def _times(rounds: Rounds) -> list[tuple[str, str, list[float], list[float]]]:
    """Cell, metric, and the figures of both sides round by round, of every time and ratio that all rounds have."""
    found = []
    for cell, line in rounds["head"][0].items():
        for metric in line.figures:
            if metric not in METRICS or METRICS[metric].kind not in ("timed", "ratio"):
                continue
            base, head = (
                [lines[cell].figures.get(metric, 0.0) if cell in lines else 0.0 for lines in rounds[name]]
                for name in ("base", "head")
            )
            if all(value > 0 for value in (*base, *head)) and len(base) == len(head):
                found.append((cell, metric, base, head))
    return found


def _steady(rounds: Rounds, table: GateTable) -> list[Row]:
    """The rows of everything but times: how cells ended, counts, bounded figures, items, and budgets."""
    first = {name: lines[0] for name, lines in rounds.items()}
    rows: list[Row] = []
    for cell in dict.fromkeys([*first["base"], *first["head"]]):
        lines = {name: [one[cell] for one in rounds[name] if cell in one] for name in ("base", "head")}
        ends = {name: next((one.status for one in lines[name] if one.status != "ok"), "ok") for name in lines}
        if not lines["base"] or not lines["head"]:
            side = "head" if lines["head"] else "base"
            reason = f"only the {side} has it"
            rows.append(Row(cell, "status", Verdict.INCOMPARABLE, "exact", reason=reason))
            continue
        if set(ends.values()) != {"ok"}:
            reason = next((one.reason for name in lines for one in lines[name] if one.reason), "")
            worse = ends["base"] == "ok"
            verdict = Verdict.REGRESSED if worse else Verdict.IMPROVED if ends["head"] == "ok" else Verdict.INCOMPARABLE
            rows.append(Row(cell, "status", verdict, "exact", ends["base"], ends["head"], reason=reason))
            continue
        rows += _counts(cell, lines, table)
    return rows


def _counts(cell: str, lines: Mapping[str, list[Line]], table: GateTable) -> list[Row]:
    rows: list[Row] = []
    series: dict[str, dict[str, list[float]]] = {}
    for name in ("base", "head"):
        for one in lines[name]:
            for key, value in one.figures.items():
                series.setdefault(key, {"base": [], "head": []})[name].append(value)
    for key, sides in series.items():
        kind = METRICS[key].kind if key in METRICS else ""
        if kind in ("timed", "ratio") and not (sides["base"] and sides["head"]):
            rows.append(missing(cell, key, kind, *(sides[name][0] if sides[name] else None for name in sides)))
        if kind == "exact":
            unstable = [row for name in sides if (row := judge_repeats(cell, key, sides[name])) is not None]
            firsts = (sides[name][0] if sides[name] else None for name in ("base", "head"))
            rows += unstable or [judge_exact(cell, key, *firsts)]
        elif kind == "bounded":
            before, after = (median(sides[name]) if sides[name] else None for name in ("base", "head"))
            rows.append(judge_bounded(cell, key, before, after, tolerance(key, table.tolerance)))
        if key in table.bounds and sides["head"] and not lines["head"][0].items:
            middle = median_of(sides["head"])
            rows.append(judge_budget(cell, key, middle, table.bounds[key], table.budget[key]))
    items = {name: items_of(lines[name][0].items) for name in ("base", "head")}
    for key in dict.fromkeys([*items["base"][0], *items["head"][0]]):
        mine, theirs = (items[name][0].get(key, {}) for name in ("base", "head"))
        clusters = items["base"][1] or items["head"][1]
        rows.append(judge_sampled(cell, key, mine, theirs, tolerance(key, table.tolerance), clusters))
        if key in table.bounds and theirs:
            average = mean([*theirs.values()], [clusters.get(one, one) for one in theirs])
            rows.append(judge_budget(cell, key, average, table.bounds[key], table.budget[key]))
    return rows
