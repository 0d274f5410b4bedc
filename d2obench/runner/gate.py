"""``d2obench gate --suite … --base REV --head REV``: two checkouts measured against each other in one sitting.

    base, head ──► worktrees ──► one worker each ──► quality cells once, speed cells in ABBA rounds (8 → 16 → 32)
                                                 └─► a timed REGRESSED is measured once more by fresh processes

The base is measured again rather than remembered, so timed figures are comparable, and nothing about the machine has
to be stored. A regression must be found twice: if the second sitting does not say REGRESSED, it is INCONCLUSIVE.
Whatever happens, no worker and no worktree is left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, SuiteError, WorkerError
from d2obench.record import Value
from d2obench.runner.check import check
from d2obench.runner.gate_arm import Arm
from d2obench.runner.gate_baseline import differences, settings_of
from d2obench.runner.gate_rounds import RATIOS, Failure, Rounds, measure_group
from d2obench.runner.gate_worktree import Repository, terminable, worktrees
from d2obench.runner.plan import group
from d2obench.stats.facts import Facts, facts_of, judge_facts, judge_status
from d2obench.stats.verdict import Row, Verdict, Verdicts, gather
from d2obench.suite import SPEED, Cell, Suite, load_suite

Watch = Callable[[str], None]
WORK_TREE = "work tree"


class Side(NamedTuple):
    """What one side runs: ``revision`` (None: the work tree as it is) and the interpreter of its environment."""

    revision: str | None
    python: str = sys.executable


def gate(
    suite_name: str, overrides: Mapping[str, str], base: Side, head: Side, *, folder: Path, watch: Watch
) -> Verdicts:
    """Compares two revisions of the repository around ``folder``.

    Args:
        suite_name: a suite of both checkouts, or a path to a file that both sides run.
        overrides: as for ``d2obench run``.
        base: its revision; None means the merge base of the trunk and HEAD.
        head: its revision; None means the work tree.
        watch: is told what goes on.

    Raises:
        UsageError: no repository or revision, or nothing to compare.
        WorkerError: a side that does not build; its log is on stderr.
    """
    repository = Repository(folder)
    commits = {"base": repository.commit(base.revision) if base.revision else repository.merge_base()}
    if head.revision:
        commits["head"] = repository.commit(head.revision)
    names = {side: commits[side][:12] if side in commits else WORK_TREE for side in ("base", "head")}
    with terminable(), ExitStack() as stack:
        watch("checking out")
        places = {"head": repository.root, **stack.enter_context(worktrees(repository, commits))}
        suites = {side: suite_in(place, suite_name, overrides) for side, place in places.items()}
        title = f"gate {suites['head'].name}"
        apart = differences(settings_of(suites["base"]), settings_of(suites["head"]))
        if apart:
            row = Row("*", "suite", Verdict.INCOMPARABLE, "exact", reason=f"the suites differ: {', '.join(apart)}")
            return gather(title, names["base"], names["head"], [row])
        pythons = {"base": base.python, "head": head.python}
        arms = {
            side: stack.enter_context(Arm(side, places[side], suites["head"], pythons[side]))
            for side in ("base", "head")
        }
        rows, notes = compare_arms(arms, suites["head"], watch)
    if commits["base"] == repository.commit(head.revision or "HEAD") and (head.revision or not repository.dirty):
        notes.append("base and head are the same code: what differs is noise")
    return gather(title, names["base"], names["head"], rows, notes)


def suite_in(place: Path, name: str, overrides: Mapping[str, str]) -> Suite:
    """The suite as a checkout has it; a path outside the checkout is the same for both sides.

    Raises:
        SuiteError: that checkout has no such suite, or one this version can't read.
    """
    if name.endswith(".toml") and Path(name).is_absolute():
        return load_suite(name, overrides)
    file = place / (name if name.endswith(".toml") else f"suites/{name}.toml")
    if not file.is_file():
        raise SuiteError(
            f"{place} has no suite '{name}'", remedy="choose a base that has it, or give the path of a file"
        )
    return load_suite(str(file), overrides)


def compare_arms(arms: Mapping[str, Arm], suite: Suite, watch: Watch) -> tuple[list[Row], list[str]]:
    """Every row of two sides that are set up, and notes for the reader."""
    for arm in arms.values():
        watch(f"starting the {arm.name}")
        arm.check()
    facts = {name: arm.surroundings(suite.axes.device) for name, arm in arms.items()}
    apart = differences(facts["base"], facts["head"])
    if apart:
        reason = f"other surroundings: {', '.join(apart)}"
        return [Row("*", "environment", Verdict.INCOMPARABLE, "exact", reason=reason)], []
    checked = check(suite, arms["head"].client)
    suite = checked.suite
    rows: list[Row] = []
    repeated = 0
    for together in group(checked.cells):
        if together[0].axes.task != SPEED:
            watch(together[0].id)
            rows += _quality(arms, together[0], suite)
            continue
        rounds, timed = measure_group(arms, together, suite, watch)
        repeated += rounds.repeated
        rows += [row for cell in together for row in _facts_rows(arms, rounds, cell, suite)]
        rows += _confirmed(arms, together, suite, watch, timed)
    notes = (
        [f"{repeated} pairs of rounds were measured again because the GPU's clocks were held back"] if repeated else []
    )
    return rows, notes


def _quality(arms: Mapping[str, Arm], cell: Cell, suite: Suite) -> list[Row]:
    facts: dict[str, Facts] = {}
    failed: dict[str, Failure] = {}
    for name, arm in arms.items():
        try:
            found = arm.evaluate(cell)
        except D2OBenchError as problem:
            failed[name] = Failure("oom" if isinstance(problem, OutOfMemory) else "failed", str(problem))
            continue
        values = msgspec.convert(found["values"], dict[str, Value])
        facts[name] = facts_of(cell.id, "ok", values, {"items": found["items"]})
    if failed:
        return [_failed(cell.id, failed)]
    return judge_facts(cell.id, facts["base"], facts["head"], suite.gate.tolerance)


def _facts_rows(arms: Mapping[str, Arm], rounds: Rounds, cell: Cell, suite: Suite) -> list[Row]:
    """Exact and bounded figures of a speed cell. Ratios are judged with the timed ones, paired across the arms."""
    from d2obench.measure.summarise import Machine, summarise
    from d2obench.measure.trace import RequestTrace

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
        values = summarise(cell.id, typed, Machine(weights)).values | counts
        facts[name] = facts_of(cell.id, "ok", values, {"rounds": traces})
    return judge_facts(cell.id, facts["base"], facts["head"], suite.gate.tolerance)


def _confirmed(
    arms: Mapping[str, Arm], together: Sequence[Cell], suite: Suite, watch: Watch, rows: Iterable[Row]
) -> list[Row]:
    """The timed rows; those that regressed are measured once more by fresh processes."""
    rows = list(rows)
    bad = {(row.cell, row.metric): row for row in rows if row.verdict is Verdict.REGRESSED}
    if not bad:
        return rows
    watch(f"confirming {len(bad)} regressions with fresh processes")
    for arm in arms.values():
        arm.restart()
    again, second = measure_group(arms, _needed(together, bad), suite, watch, bad)
    seen = {(row.cell, row.metric): row for row in second}
    found = []
    for row in rows:
        key = (row.cell, row.metric)
        found.append(confirm(row, seen.get(key), again.failed.get(row.cell)) if key in bad else row)
    return found


def confirm(first: Row, second: Row | None, failed: Mapping[str, Any] | None = None) -> Row:
    """A regression that was found twice stays one; else it is INCONCLUSIVE and says what both sittings saw."""
    if second is not None and second.verdict is Verdict.REGRESSED:
        return msgspec.structs.replace(first, reason=f"confirmed by fresh processes: {second.change}")
    seen = (
        "the second sitting failed" if failed else f"then {second.change or 'nothing'}" if second else "not seen again"
    )
    return msgspec.structs.replace(
        first, verdict=Verdict.INCONCLUSIVE, reason=f"not confirmed by fresh processes: first {first.change}, {seen}"
    )


def _needed(together: Sequence[Cell], bad: Mapping[tuple[str, str], Row]) -> list[Cell]:
    """The cells to measure again, with the partners of their ratios, in the order of the group."""
    group_ = Rounds(together)
    names = {cell for cell, _ in bad}
    for cell in together:
        for metric in RATIOS:
            partner = group_.partner(cell, metric)
            if (cell.id, metric) in bad and partner is not None:
                names.add(partner.id)
    return [cell for cell in together if cell.id in names]


def _failed(cell: str, failed: Mapping[str, Failure]) -> Row:
    ends = {name: failed[name].status if name in failed else "ok" for name in ("base", "head")}
    reason = "; ".join(f"{name}: {failure.reason}" for name, failure in failed.items())
    return judge_status(cell, ends["base"], ends["head"], reason)
