"""The comparison of two sides whose workers are ready: every figure of every cell of a suite.

Counts and quality cells are measured once, by both sides at the same time if they share no device; speed cells in
rounds in which the sides take turns. While a gate measures, other gates on the machine wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from d2obench.errors import D2OBenchError, OutOfMemory, WorkerError
from d2obench.gate.arm import Arm, both
from d2obench.gate.baseline import device_class, differences
from d2obench.gate.compare import Facts, facts_of, judge_facts, judge_status
from d2obench.gate.exclusive import exclusive
from d2obench.gate.rounds import JUDGED_RATIOS, Failure, Rounds, measure_group
from d2obench.gate.rules import confirm, judge_budget, tolerance
from d2obench.gate.verdict import BUDGET, KINDS, Row, Verdict, of_kinds
from d2obench.measure.instructions import why_not
from d2obench.metric import METRICS
from d2obench.models.embedded import cache_folder
from d2obench.record import Value
from d2obench.run.check import check, check_one
from d2obench.run.plan import group
from d2obench.suite.definition import SPEED, Suite
from d2obench.tasks.base import Cell

Watch = Callable[[str], None]
SPEED_KINDS, QUALITY_KINDS = {"exact", "bounded", "timed", "ratio"}, {"exact", "sampled"}
"""The kinds of figures that speed cells and quality cells have."""
NOISE_S, NOISY = 3.0, 0.10
"""Seconds for which the noise is measured before anything is timed, and the slowdown beyond which the machine is called
noisy if it can't tell a smaller one."""
COUNTED = "instructions_step"
"""The figure that a gate leaves out, and says so, where the machine does not have it."""
ABOUT = ("cpu", "gpu", "threads", "python", "torch", "transformers")
"""Facts that are kept with the verdicts."""


def compare_arms(
    arms: Mapping[str, Arm],
    suite: Suite,
    watch: Watch,
    kinds: Collection[str] = KINDS,
    *,
    libraries_may_differ: bool = False,
) -> tuple[list[Row], list[str], dict[str, str]]:
    """Compares two sides.

    Args:
        arms: ``base`` and ``head``.
        suite: what is measured.
        watch: receives a line on what is going on.
        kinds: of figures to compare.
        libraries_may_differ: whether the sides bring libraries of their own, which are then part of what is compared;
            otherwise another library makes them incomparable.

    Returns:
        Every row of these kinds, notes for the reader, and facts about the machine and the head's software.
    """
    notes = []
    # 1. both sides can be imported and run in equal surroundings
    watch("starting both sides")
    both(arms, Arm.check)
    facts = both(arms, lambda arm: arm.surroundings(suite.axes.device))
    known = facts["base"].keys() & facts["head"].keys()
    before, after = ({key: facts[name][key] for key in known} for name in ("base", "head"))
    apart = differences(before, after)
    about = _about(facts["head"])
    if apart and libraries_may_differ:
        notes.append(f"the sides have other libraries: {', '.join(apart)}")
    elif apart:
        reason = f"other surroundings: {', '.join(apart)}"
        return [Row("*", "environment", Verdict.INCOMPARABLE, "exact", reason=reason)], notes, about
    # 2. the cells, group by group: counts, then interleaved rounds, then a second sitting for regressions
    check_one(suite, "d2obench gate")
    checked = check(suite, arms["head"].client)
    suite = checked.suite
    at_once = set(suite.axes.device) == {"cpu"}
    rows: list[Row] = []
    repeated = 0
    with exclusive(cache_folder() / "gate.lock", "another gate measures on this machine", watch):
        if suite.gate.metrics and any(cell.timed for cell in checked.cells):
            notes += _noise(arms["head"], suite, watch)
        for together in group(checked.cells):
            timed_cells = together[0].axes.task == SPEED
            if not set(kinds) & (SPEED_KINDS if timed_cells else QUALITY_KINDS):
                continue
            if not timed_cells:
                watch(together[0].id)
                rows += _quality(arms, together[0], suite, at_once, kinds)
                continue
            watch(f"counting {len(together)} cells")
            both(arms, partial(Arm.count, cells=together), at_once=at_once)
            rounds, timed = measure_group(arms, together, suite, watch, renew=partial(both, arms, Arm.restart))
            repeated += rounds.repeated
            rows += [row for cell in together for row in _facts_rows(arms, rounds, cell, suite, kinds)]
            rows += _confirmed(arms, together, suite, watch, timed)
    if repeated:
        notes.append(f"{repeated} pairs of rounds were measured again because the GPU's clocks were held back")
    if COUNTED in suite.gate.metrics and COUNTED not in {row.metric for row in rows}:
        why = why_not() or ("it needs worker.threads = 1" if suite.worker.threads != 1 else "a side has no such figure")
        notes.append(f"{COUNTED} was not compared: {why}")
    seen = {row.metric for row in rows if row.kind == BUDGET}
    whole = not any(row.metric == "status" for row in rows)
    for metric in suite.gate.bounds:
        if whole and metric not in seen and METRICS[metric].kind in kinds:
            reason = f"gate.budget.{metric}: no cell of the suite has this figure"
            rows.append(Row("*", metric, Verdict.INCOMPARABLE, BUDGET, suite.gate.budget[metric], reason=reason))
    return of_kinds(rows, kinds), notes, about


def _noise(arm: Arm, suite: Suite, watch: Watch) -> list[str]:
    """Says how small a change this machine can tell from noise at this moment, before anything is timed. Returns a note
    if that is more than NOISY."""
    looks = sorted(suite.gate.looks)
    found = arm.noise(suite.axes.device[0], NOISE_S)
    rounds = max((n for n in found if n <= looks[-1]), default=None)
    if rounds is None:
        return []
    limits = [tolerance(metric, suite.gate.tolerance) for metric in suite.gate.metrics]
    least = (1 + min(limits)) * (1 + found[rounds]) - 1
    words = f"a slowdown of {least:.0%} is told from noise on this machine with {rounds} rounds, 4 times of 5"
    watch(words)
    if least <= NOISY:
        return []
    watch("that is a noisy machine: stop here and use a quieter one, or compare only --kind exact and --kind sampled")
    return [f"a noisy machine: {words}; smaller ones stay INCONCLUSIVE"]


def _budgets(cell: str, values: Mapping[str, Value], suite: Suite, kinds: Collection[str]) -> list[Row]:
    """A row for each of the head's figures that the suite sets a bound for."""
    return [
        judge_budget(cell, metric, values[metric], bound, suite.gate.budget[metric])
        for metric, bound in suite.gate.bounds.items()
        if metric in values and values[metric].value is not None and METRICS[metric].kind in (*kinds, "info")
    ]


def _about(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts about the machine and the software of a side, without the device's name in front."""
    plain = {key.rpartition(" ")[2]: value for key, value in facts.items()}
    kept = {key: str(plain[key]) for key in ABOUT if plain.get(key) is not None}
    return {"machine": device_class(plain), **kept}


def _quality(arms: Mapping[str, Arm], cell: Cell, suite: Suite, at_once: bool, kinds: Collection[str]) -> list[Row]:
    figures: dict[str, dict[str, Value]] = {}

    def evaluate(arm: Arm) -> Facts | Failure:
        try:
            found = arm.evaluate(cell)
        except D2OBenchError as problem:
            return Failure("oom" if isinstance(problem, OutOfMemory) else "failed", str(problem))
        values = figures[arm.name] = msgspec.convert(found["values"], dict[str, Value])
        return facts_of(cell.id, "ok", values, {"items": found["items"]})

    found = both(arms, evaluate, at_once=at_once)
    failed = {name: one for name, one in found.items() if isinstance(one, Failure)}
    facts = {name: one for name, one in found.items() if isinstance(one, Facts)}
    if failed:
        return [_failed(cell.id, failed)]
    rows = judge_facts(cell.id, facts["base"], facts["head"], suite.gate.tolerance)
    return rows + _budgets(cell.id, figures["head"], suite, kinds)


def _facts_rows(arms: Mapping[str, Arm], rounds: Rounds, cell: Cell, suite: Suite, kinds: Collection[str]) -> list[Row]:
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
    rows = judge_facts(cell.id, facts["base"], facts["head"], suite.gate.tolerance)
    return rows + _budgets(cell.id, values, suite, kinds)  # the head's, which is the last of the two


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
