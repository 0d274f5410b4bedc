"""What the rows of a report show: bold figures, stars and words, by the rules of ``d2obench.stats.claims``.

Rows are compared within one group: the same model, shape and batch. Rows of another engine or environment are shown,
but win nothing, and neither does a row whose speed-up is more than its bytes allow. On a machine that stayed busy
no word is given on speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from d2obench.metric import METRICS
from d2obench.record import Value
from d2obench.report.rows import Key, Row, grouped, kv_bytes, loss, primary
from d2obench.stats import claims
from d2obench.stats.claims import Claim, Leader, Verdict
from d2obench.suite.definition import SPEED

Where = tuple[str, str]
"""Task and metric: where a figure of a row is found."""


def processes(row: Row) -> int:
    """Fresh processes that a row's times were measured in."""
    found = row.speed.record.details.get("processes") if row.speed else None
    return found if isinstance(found, int) else 1


def busy(row: Row) -> bool:
    """Whether the machine was too busy for a word on the row's speed."""
    return bool(row.speed and row.speed.record.details.get("busy"))


def bound(row: Row) -> float | None:
    """The largest speed-up over full that the row's bytes and the measured bandwidth allow, where it is known.

    Records from before ``speedup_largest`` have only the ratio of the bytes.
    """
    largest, ratio = row.value(SPEED, "speedup_largest"), row.value(SPEED, "speedup_bound")
    if largest is not None and largest.value is not None:
        return largest.value if largest.hi is None else largest.hi
    return ratio.value if ratio else None


def impossible(row: Row) -> bool:
    """Whether the row claims a speed-up that its bytes don't allow."""
    value = row.value(SPEED, "speedup")
    return value is not None and claims.impossible(value, bound(row))


def shown(row: Row, task: str, metric: str, comparisons: int = 1) -> Verdict:
    """Whether a ratio or a difference of the row shows it to be better or worse than its partner."""
    if claims.timed(metric) and busy(row):
        return "not told apart"
    over_full = metric in ("speedup", "speedup_e2e")
    limit = bound(row) if over_full else None
    if claims.timed(metric) and not over_full and impossible(row):
        return "impossible"
    return claims.told(metric, row.value(task, metric), comparisons, processes=processes(row), bound=limit)


def leader(rows: Sequence[Row], task: str, metric: str) -> Leader | None:
    """The best of comparable rows, and the keys of those that can't be told from it.

    The full cache is what quality is measured against, and is not ranked there.
    """
    timed = claims.timed(metric)
    ranked = [row for row in rows if not row.foreign]
    if METRICS[metric].group == "quality":
        ranked = [row for row in ranked if row.key.policy != "full"]
    if timed:
        if any(map(busy, ranked)):
            return None
        ranked = [row for row in ranked if not impossible(row)]
    values = {row.key: value for row in ranked if (value := row.value(task, metric))}
    least = min((processes(row) for row in ranked), default=1)
    return claims.leader(metric, values, processes=least)


def winners(rows: Sequence[Row], wheres: Iterable[Where]) -> tuple[set[tuple[Key, str, str]], list[Claim]]:
    """The figures that are told to be the best of their column and group, as (key, task, metric) and as claims.

    Figures that are the same on every repeat share the first place where they are equal, if others are behind them.
    """
    best: set[tuple[Key, str, str]] = set()
    told: list[Claim] = []
    for group in grouped(rows):
        by_key = {row.key: row for row in group}
        for task, metric in wheres:
            found = leader(group, task, metric)
            if found is None:
                continue
            first = [found.best, *found.near]
            others = [row for row in group if row.key not in first and row.value(task, metric)]
            if found.near and (METRICS[metric].kind != "exact" or not others):
                continue
            best |= {(key, task, metric) for key in first if isinstance(key, Key)}
            told += [_best(by_key[key], others, task, metric) for key in first if isinstance(key, Key)]
    return best, told


def front(rows: Sequence[Row], task: str) -> set[Key]:
    """Rows that are shown to be Pareto-optimal in quality (in ``task``) and KV bytes.

    Every other row of the group that holds as few bytes or fewer is told to be worse.
    """
    stars: set[Key] = set()
    for group in grouped(row for row in rows if not row.foreign):
        metric = primary(group, task)
        values = {row.key: _quality(row, task, metric) for row in group}
        count = len(values)

        def better(a: Key, b: Key, metric: str = metric, values: dict[Key, Value] = values, count: int = count) -> bool:
            return claims.apart(metric, values[a], values[b], count) == "better"

        sizes = {row.key: kv_bytes(row) if values[row.key].value is not None else None for row in group}
        stars |= claims.front(sizes, better)
    return stars


def claim(row: Row, task: str, metric: str, word: str, comparisons: int = 1) -> Claim | None:
    """A sentence's ``better`` or ``worse`` as data; None for any other verdict."""
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


def _best(row: Row, others: Sequence[Row], task: str, metric: str) -> Claim:
    cells = {id(row): result.record.id for row in (row, *others) if (result := row.of(task))}
    value, timed = row.value(task, metric), claims.timed(metric)
    lo, hi = (value.lo, value.hi) if value and value.kind == "interval" else (None, None)
    return Claim(
        "best", cells[id(row)], metric, others=tuple(cells[id(other)] for other in others), lo=lo, hi=hi,
        comparisons=len(others) + 1, processes=processes(row) if timed else 0,
    )  # fmt: skip


def _quality(row: Row, task: str, metric: str) -> Value:
    value = row.value(task, metric)
    if value is not None and value.value is not None:
        return value
    return Value(loss(row, task, metric), kind="exact")
