"""What the rows of a report may claim: bold figures, the mark ◆, words such as faster, and targets that are met.

The rules are those of :mod:`d2obench.stats.claims`; here they are applied to rows. Rows are compared within one group:
the same run, model, dtype, device, seed, shape and batch. A row of another engine or environment is shown but wins
nothing, and neither does a row whose speed-up is larger than its bytes allow. Nothing is claimed about the speed of a
row if the machine was busy while the row, or the row that it is compared with, was measured.

Each function returns what it decides together with the same statements as :class:`~d2obench.stats.claims.Claim`, so
that the rate of false ones can be studied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from d2obench.metric import METRICS
from d2obench.policies import LIBRARY_CACHES
from d2obench.record import Run, Value
from d2obench.report.rows import Key, Result, Row, grouped, kv_bytes, loss, primary, tasks_of
from d2obench.stats import claims
from d2obench.stats.claims import Claim, Verdict
from d2obench.stats.ratios import FULL, RATIOS
from d2obench.suite.definition import SPEED, Target

Where = tuple[str, str]
"""Task and metric: where a figure of a row is found."""
NOT_MEASURED: Final = "not measured"
MAX_FRONTS = 3
"""Number of tasks for which a Pareto front is determined; the front of the first one is marked ◆ in the tables."""


class Ranking(NamedTuple):
    """The best of comparable rows by one metric, the rows not told apart from it, and the rows shown to be worse."""

    best: Row
    near: list[Row]
    behind: list[Row]

    @property
    def compared(self) -> int:
        """Number of rows that were compared."""
        return 1 + len(self.near) + len(self.behind)


class Judged(NamedTuple):
    """One target and the cell whose figure was judged, or the cells that gave no figure.

    Args:
        name: the run whose suite states the target.
        goal: the target.
        cells: one cell with a figure, or all cells of the target if none of them gave one.
        value: the figure.
        outcome: ``met``, ``missed``, ``no verdict`` or ``not measured``.
        comparisons: number of verdicts of the run; the interval was widened so that all of them are right together.
    """

    name: str
    goal: Target
    cells: tuple[Result, ...]
    value: Value | None
    outcome: str
    comparisons: int


def processes(row: Row) -> int:
    """Number of fresh processes in which a row's times were measured."""
    found = row.speed.record.details.get("processes") if row.speed else None
    return found if isinstance(found, int) else 1


def busy(row: Row) -> bool:
    """Whether the machine was busy with other work during most of a row's timings."""
    return bool(row.speed and row.speed.record.details.get("busy"))


def doubtful(row: Row, metric: str, rows: Iterable[Row]) -> bool:
    """Whether the machine was busy while a time, or either side of a ratio of times, was measured.

    Args:
        row: the row that has the figure.
        metric: the figure.
        rows: where the other side of the ratio is looked for.
    """
    return claims.timed(metric) and any(map(busy, (row, *partners(row, metric, rows))))


def partners(row: Row, metric: str, rows: Iterable[Row]) -> list[Row]:
    """The rows on the other side of a ratio: the full cache, StreamingLLM or a rival at the same budget, or the caches
    of the library."""
    key, _, rival = metric.partition(":")
    if key not in RATIOS:
        return []
    names = LIBRARY_CACHES if key == "to_library" else (rival or RATIOS[key].partner,)
    alike = (other for other in rows if other.key.group == row.key.group)
    return [other for other in alike if other.key.policy in names and other.key.budget in (None, row.key.budget)]


def bound(row: Row) -> float | None:
    """The largest speed-up over the full cache that a row's bytes and the measured bandwidth allow, if it is known.

    Records made before ``speedup_largest`` existed hold only the ratio of the bytes.
    """
    largest, ratio = row.value(SPEED, "speedup_largest"), row.value(SPEED, "speedup_bound")
    if largest is not None and largest.value is not None:
        return largest.value if largest.hi is None else largest.hi
    return ratio.value if ratio else None


def impossible(row: Row) -> bool:
    """Whether the speed-up measured for a row is larger than its bytes allow."""
    value = row.value(SPEED, "speedup")
    return value is not None and claims.impossible(value, bound(row))


def shown(row: Row, task: str, metric: str, comparisons: int = 1, rows: Iterable[Row] = ()) -> Verdict:
    """Whether a ratio or a difference shows a row to be better or worse than the row it is compared with.

    Args:
        row, task, metric: the figure.
        comparisons: number of such questions in the report.
        rows: where the other side is looked for, to know whether the machine was busy while it was measured.
    """
    if doubtful(row, metric, rows):
        return "not told apart"
    over_full = metric in ("speedup", "speedup_e2e")
    limit = bound(row) if over_full else None
    if claims.timed(metric) and not over_full and impossible(row):
        return "impossible"
    return claims.told(metric, row.value(task, metric), comparisons, processes=processes(row), bound=limit)


def claim(row: Row, task: str, metric: str, word: str, comparisons: int = 1) -> Claim | None:
    """The ``better`` or ``worse`` of a sentence as data; None for any other verdict."""
    value, result = row.value(task, metric), row.of(task)
    if value is None or result is None or word not in ("better", "worse"):
        return None
    same, up = claims.same(metric), METRICS[metric.partition(":")[0]].direction == "higher"
    above = up == (word == "better")
    timed = claims.timed(metric)
    wide = claims.widened(value, comparisons, timed=timed, processes=processes(row))
    return Claim(
        "better" if word == "better" else "worse", result.record.id, metric, same if above else None,
        None if above else same, lo=wide.lo, hi=wide.hi, comparisons=comparisons,
        processes=processes(row) if timed else 0,
    )  # fmt: skip


def ranking(rows: Sequence[Row], task: str, metric: str, comparisons: int | None = None) -> Ranking | None:
    """The best of comparable rows; None if fewer than two can be compared, or if the machine was busy.

    The full cache is not ranked by quality, because quality is measured against it.

    Args:
        rows: of one group.
        task, metric: the figure to rank by.
        comparisons: number of statements that have to be right together; as many as rows are compared if left out.
    """
    timed = claims.timed(metric)
    ranked = [row for row in rows if not row.foreign]
    if METRICS[metric].group == "quality":
        ranked = [row for row in ranked if row.key.policy != FULL]
    if timed:
        if any(map(busy, ranked)):
            return None
        ranked = [row for row in ranked if not impossible(row)]
    values = {row.key: value for row in ranked if (value := row.value(task, metric)) and value.value is not None}
    least = min((processes(row) for row in ranked), default=1)
    found = claims.leader(metric, values, comparisons, processes=least)
    if found is None:
        return None
    by_key = {row.key: row for row in ranked if row.key in values}
    near = [row for key, row in by_key.items() if key in found.near]
    behind = [row for key, row in by_key.items() if key not in (found.best, *found.near)]
    return Ranking(next(row for key, row in by_key.items() if key == found.best), near, behind)


def winners(rows: Sequence[Row], wheres: Iterable[Where]) -> tuple[set[tuple[Key, str, str]], list[Claim]]:
    """The figures shown to be the best of their column and group, as (key, task, metric) and as claims.

    Rows whose exact figures are equal share the first place if another row is behind them.
    """
    best: set[tuple[Key, str, str]] = set()
    told: list[Claim] = []
    for group in grouped(rows):
        for task, metric in wheres:
            found = ranking(group, task, metric)
            if found is None or not found.behind:
                continue
            if any(not _equal(found.best, row, task, metric) for row in found.near):
                continue
            for row in (found.best, *found.near):
                best.add((row.key, task, metric))
                told.append(first_place("best", row, found.behind, task, metric, found.compared))
    return best, told


def front(rows: Sequence[Row], task: str) -> tuple[set[Key], list[Claim]]:
    """The rows shown to be Pareto-optimal in the quality of ``task`` and in KV bytes, as keys and as claims.

    A row is on the front if every other row of its group that holds as few bytes or fewer is shown to be worse. Bytes
    are exact, so the claim is one of quality: better than each of those rows.
    """
    stars: set[Key] = set()
    told: list[Claim] = []
    for group in grouped(row for row in rows if not row.foreign):
        metric = primary(group, task)
        values = {row.key: _quality(row, task, metric) for row in group}
        sizes = {row.key: kv_bytes(row) if values[row.key].value is not None else None for row in group}
        count = sum(size is not None for size in sizes.values())

        def better(a: Key, b: Key, metric: str = metric, values: dict[Key, Value] = values, count: int = count) -> bool:
            return claims.apart(metric, values[a], values[b], count) == "better"

        found = claims.front(sizes, better)
        stars |= found
        for row in (row for row in group if row.key in found):
            size = sizes[row.key] or 0.0
            known = [(other, theirs) for other in group if (theirs := sizes[other.key]) is not None]
            rivals = [other for other, theirs in known if other is not row and theirs <= size]
            told.append(first_place("undominated", row, rivals, task, metric, count))
    return stars, told


def front_claims(rows: Sequence[Row]) -> list[Claim]:
    """Every ◆ of the tables, and every point on a dashed line of the figures, as claims."""
    return [one for task in tasks_of(rows)[:MAX_FRONTS] for one in front(rows, task)[1]]


def first_place(word: str, row: Row, behind: Sequence[Row], task: str, metric: str, comparisons: int) -> Claim:
    """The claim that a row's figure is better than that of every row of ``behind``."""
    cells = {id(one): result.record.id for one in (row, *behind) if (result := one.of(task))}
    value, timed = row.value(task, metric), claims.timed(metric)
    lo, hi = (value.lo, value.hi) if value and value.kind == "interval" else (None, None)
    return Claim(
        "best" if word == "best" else "undominated", cells[id(row)], metric,
        others=tuple(cells[id(other)] for other in behind), lo=lo, hi=hi, comparisons=comparisons,
        processes=processes(row) if timed else 0,
    )  # fmt: skip


def of_suite(suite: Mapping[str, Any]) -> list[Target]:
    """The targets of a suite as a record keeps it; those that this version can't read are left out."""
    try:
        goals = msgspec.convert(suite.get("targets", []), list[Target])
    except msgspec.ValidationError:
        return []
    return [goal for goal in goals if not goal.fault()]


def judge(runs: Sequence[tuple[str, Run]], found: Sequence[Result]) -> list[Judged]:
    """The targets of every run, each with the cells that it is asked of.

    A target that several cells have to meet is judged for each of them.
    """
    return [one for name, run in runs for one in _judge(name, of_suite(run.info.suite), found)]


def _judge(name: str, goals: Sequence[Target], found: Sequence[Result]) -> list[Judged]:
    """The targets of one run. All of its verdicts are right together with a probability of 95 %."""
    # 1. the cells of each target, and the number of verdicts to be given
    mine = [result for result in found if result.name == name]
    rows = [Row(result.key, [result]) for result in mine]
    asked = [(goal, [row for row in rows if goal.covers(row.cells[0].record.axes)]) for goal in goals]
    count = sum(_there(_value(row, goal)) for goal, covered in asked for row in covered)
    # 2. a verdict for each cell that has the figure
    judged = []
    for goal, covered in asked:
        timed = claims.timed(goal.metric)
        measured = [(row, value) for row in covered if _there(value := _value(row, goal)) and value]
        for row, value in measured:
            outcome: str = claims.outcome(
                goal.metric, value, goal.at_least, goal.at_most, count, processes=processes(row)
            )
            if timed and (doubtful(row, goal.metric, rows) or impossible(row)):
                outcome = "no verdict"
            judged.append(Judged(name, goal, tuple(row.cells), value, outcome, count))
        if not measured:
            cells = tuple(result for row in covered for result in row.cells)
            judged.append(Judged(name, goal, cells, None, NOT_MEASURED, count))
    return judged


def target_claims(judged: Iterable[Judged]) -> list[Claim]:
    """Targets that were met or missed, as claims."""
    found = []
    for one in judged:
        if one.value is not None and one.outcome in ("met", "missed"):
            goal, (cell,), timed = one.goal, one.cells, claims.timed(one.goal.metric)
            count = processes(Row(cell.key, [cell]))
            wide = claims.widened(one.value, one.comparisons, timed=timed, processes=count)
            found.append(
                Claim(
                    "met" if one.outcome == "met" else "missed", cell.record.id, goal.metric, goal.at_least,
                    goal.at_most, lo=wide.lo, hi=wide.hi, comparisons=one.comparisons, processes=count if timed else 0,
                )
            )  # fmt: skip
    return found


def _value(row: Row, goal: Target) -> Value | None:
    return row.cells[0].values.get(goal.metric)


def _equal(one: Row, other: Row, task: str, metric: str) -> bool:
    """Whether two rows have the same exact figure."""
    a, b = one.value(task, metric), other.value(task, metric)
    return METRICS[metric].kind == "exact" and a is not None and b is not None and a.value == b.value


def _quality(row: Row, task: str, metric: str) -> Value:
    value = row.value(task, metric)
    if value is not None and value.value is not None:
        return value
    return Value(loss(row, task, metric), kind="exact")


def _there(value: Value | None) -> bool:
    return value is not None and value.value is not None
