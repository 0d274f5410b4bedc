"""``d2obench gate --suite … --base REV --head REV``: two revisions measured in turns, on the same machine.

    base, head ──► worktrees ──► one worker each ──► counts and quality cells once, both sides at the same time
                                                 ├─► speed cells in ABBA rounds (8 → 16 → 32), one side at a time
                                                 └─► a timed REGRESSED is measured once more by fresh processes

The base is measured again instead of being remembered. Timed figures are therefore comparable, and nothing about the
machine has to be stored. A timed regression has to be found twice: if the second sitting does not find it again, the
figure is INCONCLUSIVE. If no timed figure is asked for, two rounds show whether the exact figures really are exact. No
worker and no worktree remains, however the gate ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, SuiteError, WorkerError
from d2obench.gate.arm import Arm, both
from d2obench.gate.baseline import differences, settings_of
from d2obench.gate.compare import Facts, facts_of, judge_facts, judge_status
from d2obench.gate.rounds import JUDGED_RATIOS, Failure, Rounds, measure_group
from d2obench.gate.rules import confirm
from d2obench.gate.verdict import KINDS, Row, Verdict, Verdicts, gather, of_kinds
from d2obench.gate.worktree import Repository, terminable, worktrees
from d2obench.metric import METRICS
from d2obench.record import Value
from d2obench.run.check import check, check_one
from d2obench.run.plan import group
from d2obench.suite.definition import SPEED, Suite, load_suite
from d2obench.tasks.base import Cell

Watch = Callable[[str], None]
WORK_TREE = "work tree"
SPEED_KINDS, QUALITY_KINDS = {"exact", "bounded", "timed", "ratio"}, {"exact", "sampled"}
"""The kinds of figures that speed cells and quality cells have."""


class Side(NamedTuple):
    """What one side runs: a revision, or the work tree as it is if ``revision`` is None, and the interpreter."""

    revision: str | None
    python: str = sys.executable


def gate(
    suite_name: str,
    overrides: Mapping[str, str],
    base: Side,
    head: Side,
    *,
    folder: Path,
    watch: Watch,
    kinds: Collection[str] = KINDS,
) -> Verdicts:
    """Compares two revisions of the repository that contains ``folder``.

    Args:
        suite_name: a suite that both revisions have, or the path of a file that both sides run.
        overrides: keys of the suite that were set on the command line.
        base: without a revision, it is the merge base of HEAD and the trunk.
        head: without a revision, it is the work tree.
        folder: any folder of the repository.
        watch: receives a line on what is going on.
        kinds: of figures to compare; what only figures of other kinds need is not measured.

    Raises:
        UsageError: there is no repository or no such revision, or nothing can be compared.
        WorkerError: the code of a side can't be imported; its log is on stderr.
    """
    # 1. the commits of both sides; a side without a commit is the work tree
    repository = Repository(folder)
    commits = {"base": repository.commit(base.revision) if base.revision else repository.merge_base()}
    if head.revision:
        commits["head"] = repository.commit(head.revision)
    names = {side: commits[side][:12] if side in commits else WORK_TREE for side in ("base", "head")}
    with terminable(), ExitStack() as stack:
        # 2. checkouts, and the suite as each of them has it
        watch("checking out")
        places = {"head": repository.root, **stack.enter_context(worktrees(repository, commits))}
        suites = {side: asked(suite_in(place, suite_name, overrides), kinds) for side, place in places.items()}
        title = f"gate {suites['head'].name}"
        apart = differences(settings_of(suites["base"]), settings_of(suites["head"]))
        if apart:
            row = Row("*", "suite", Verdict.INCOMPARABLE, "exact", reason=f"the suites differ: {', '.join(apart)}")
            return gather(title, names["base"], names["head"], [row])
        # 3. a worker for each side, and the comparison
        pythons = {"base": base.python, "head": head.python}
        arms = {
            side: stack.enter_context(Arm(side, places[side], suites["head"], pythons[side]))
            for side in ("base", "head")
        }
        rows, notes = compare_arms(arms, suites["head"], watch, kinds)
    if commits["base"] == repository.commit(head.revision or "HEAD") and (head.revision or not repository.dirty):
        notes.append("base and head are the same code: what differs is noise")
    return gather(title, names["base"], names["head"], rows, notes)


def suite_in(place: Path, name: str, overrides: Mapping[str, str]) -> Suite:
    """The suite as a checkout has it. An absolute path is the same file for both sides.

    Raises:
        SuiteError: the checkout has no such suite, or this version can't read it.
    """
    if name.endswith(".toml") and Path(name).is_absolute():
        return load_suite(name, overrides)
    file = place / (name if name.endswith(".toml") else f"suites/{name}.toml")
    if not file.is_file():
        raise SuiteError(
            f"{place} has no suite '{name}'", remedy="choose a base that has it, or give the path of a file"
        )
    return load_suite(str(file), overrides)


def asked(suite: Suite, kinds: Collection[str]) -> Suite:
    """The suite with only those timed figures that are of these kinds. If none is left, two rounds are measured."""
    metrics = tuple(name for name in suite.gate.metrics if name not in METRICS or METRICS[name].kind in kinds)
    gate_ = msgspec.structs.replace(suite.gate, metrics=metrics, looks=suite.gate.looks if metrics else (2,))
    return msgspec.structs.replace(suite, gate=gate_)


def compare_arms(
    arms: Mapping[str, Arm], suite: Suite, watch: Watch, kinds: Collection[str] = KINDS
) -> tuple[list[Row], list[str]]:
    """Compares two sides. Returns every row of these kinds, and notes for the reader."""
    # 1. both sides can be imported and run in equal surroundings
    watch("starting both sides")
    both(arms, Arm.check)
    facts = both(arms, lambda arm: arm.surroundings(suite.axes.device))
    known = facts["base"].keys() & facts["head"].keys()
    before, after = ({key: facts[name][key] for key in known} for name in ("base", "head"))
    apart = differences(before, after)
    if apart:
        reason = f"other surroundings: {', '.join(apart)}"
        return [Row("*", "environment", Verdict.INCOMPARABLE, "exact", reason=reason)], []
    # 2. the cells, group by group: counts, then interleaved rounds, then a second sitting for regressions
    check_one(suite, "d2obench gate")
    checked = check(suite, arms["head"].client)
    suite = checked.suite
    at_once = set(suite.axes.device) == {"cpu"}
    rows: list[Row] = []
    repeated = 0
    for together in group(checked.cells):
        timed_cells = together[0].axes.task == SPEED
        if not set(kinds) & (SPEED_KINDS if timed_cells else QUALITY_KINDS):
            continue
        if not timed_cells:
            watch(together[0].id)
            rows += _quality(arms, together[0], suite, at_once)
            continue
        watch(f"counting {len(together)} cells")
        both(arms, partial(Arm.count, cells=together), at_once=at_once)
        rounds, timed = measure_group(arms, together, suite, watch, renew=partial(both, arms, Arm.restart))
        repeated += rounds.repeated
        rows += [row for cell in together for row in _facts_rows(arms, rounds, cell, suite)]
        rows += _confirmed(arms, together, suite, watch, timed)
    notes = (
        [f"{repeated} pairs of rounds were measured again because the GPU's clocks were held back"] if repeated else []
    )
    return of_kinds(rows, kinds), notes


def _quality(arms: Mapping[str, Arm], cell: Cell, suite: Suite, at_once: bool) -> list[Row]:
    def evaluate(arm: Arm) -> Facts | Failure:
        try:
            found = arm.evaluate(cell)
        except D2OBenchError as problem:
            return Failure("oom" if isinstance(problem, OutOfMemory) else "failed", str(problem))
        values = msgspec.convert(found["values"], dict[str, Value])
        return facts_of(cell.id, "ok", values, {"items": found["items"]})

    found = both(arms, evaluate, at_once=at_once)
    failed = {name: one for name, one in found.items() if isinstance(one, Failure)}
    facts = {name: one for name, one in found.items() if isinstance(one, Facts)}
    if failed:
        return [_failed(cell.id, failed)]
    return judge_facts(cell.id, facts["base"], facts["head"], suite.gate.tolerance)


def _facts_rows(arms: Mapping[str, Arm], rounds: Rounds, cell: Cell, suite: Suite) -> list[Row]:
    """The rows of a speed cell's exact and bounded figures. Its ratios are judged with the timed figures, in pairs."""
    from d2obench.measure.samples import RequestTrace
    from d2obench.measure.summarise import Machine, summarise

    if rounds.failed[cell.id]:
        return [_failed(cell.id, rounds.failed[cell.id])]
    facts = {}
    for name, traces in rounds.traces[cell.id].items():
        try:
            typed = msgspec.convert(traces, list[RequestTrace])
            weights = int(traces[0]["model"]["weights_bytes"])
        except (msgspec.ValidationError, KeyError, TypeError) as problem:
            raise WorkerError(f"the {name} answers in another form", why=str(problem)) from None
        counts = {key: Value(count) for key, count in arms[name].counts[cell.id].items()}
        values = summarise(typed, Machine(weights)).values | counts
        facts[name] = facts_of(cell.id, "ok", values, {"rounds": traces})
    return judge_facts(cell.id, facts["base"], facts["head"], suite.gate.tolerance)


def _confirmed(
    arms: Mapping[str, Arm], together: Sequence[Cell], suite: Suite, watch: Watch, rows: Iterable[Row]
) -> list[Row]:
    """The timed rows, after those that regressed have been measured once more by fresh processes."""
    rows = list(rows)
    bad = {(row.cell, row.metric): row for row in rows if row.verdict is Verdict.REGRESSED}
    if not bad:
        return rows
    watch(f"confirming {len(bad)} regressions with fresh processes")
    both(arms, Arm.restart)
    renew = partial(both, arms, Arm.restart)
    again, second = measure_group(arms, _needed(together, bad), suite, watch, bad, renew)
    seen = {(row.cell, row.metric): row for row in second}
    found = []
    for row in rows:
        key = (row.cell, row.metric)
        found.append(confirm(row, seen.get(key), again.failed.get(row.cell)) if key in bad else row)
    return found


def _needed(together: Sequence[Cell], bad: Mapping[tuple[str, str], Row]) -> list[Cell]:
    """The cells to measure again and the partners of their ratios, in the order of the group."""
    group_ = Rounds(together)
    names = {cell for cell, _ in bad}
    for cell in together:
        for metric in JUDGED_RATIOS:
            partner = group_.partner(cell, metric)
            if (cell.id, metric) in bad and partner is not None:
                names.add(partner.id)
    return [cell for cell in together if cell.id in names]


def _failed(cell: str, failed: Mapping[str, Failure]) -> Row:
    ends = {name: failed[name].status if name in failed else "ok" for name in ("base", "head")}
    reason = "; ".join(f"{name}: {failure.reason}" for name, failure in failed.items())
    return judge_status(cell, ends["base"], ends["head"], reason)
