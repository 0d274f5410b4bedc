"""The order of rounds and the looks, on scripted arms: no process, exact times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from d2obench.errors import OutOfMemory
from d2obench.gate.rounds import REPEATS, measure_group
from d2obench.gate.verdict import Verdict
from d2obench.run.plan import cells
from d2obench.suite.definition import Suite, load_suite
from d2obench.tasks.base import Cell

Log = list[tuple[str, str]]


class Scripted:
    """An arm whose step takes what ``time(policy, how often it was asked)`` says."""

    def __init__(self, name: str, log: Log, time: Callable[[str, int], float]) -> None:
        self.name, self.log, self.time = name, log, time
        self.asked: dict[str, int] = {}

    def measure(self, cell: Cell) -> dict[str, Any]:
        policy = cell.axes.policy
        number = self.asked[policy] = self.asked.get(policy, -1) + 1
        self.log.append((self.name, policy))
        step = self.time(policy, number)
        return {"step_s": [step], "decode_s": step, "ttft_s": 1.0, "e2e_s": 2.0, "flags": []}


def suite_of(policies: str, metrics: str, looks: str = "[4, 8]") -> Suite:
    given = {"axes.policy": policies, "axes.task": "speed", "axes.model": "shape:tiny", "gate.looks": looks}
    return load_suite("ci", {**given, "gate.metrics": metrics})


def go(suite: Suite, base: Callable[[str, int], float], head: Callable[[str, int], float]) -> tuple[Any, Any, Log]:
    log: Log = []
    arms = {"base": Scripted("base", log, base), "head": Scripted("head", log, head)}
    rounds, rows = measure_group(arms, cells(suite), suite, lambda words: None)
    return rounds, {(row.cell.split("/")[4], row.metric): row for row in rows}, log


def level(policy: str, number: int) -> float:
    return 1.0 + number / 1000


def wild(policy: str, number: int) -> float:
    return 1.0 if policy == "full" or number % 2 else 2.0


def test_arms_go_abba_and_cells_forwards_and_backwards():
    _, _, log = go(suite_of("full,h2o", '["tpot_s"]'), level, level)
    first = log[0][0]
    second = {"base": "head", "head": "base"}[first]
    assert log[:8] == [
        (first, "full"), (second, "full"), (first, "h2o"), (second, "h2o"),
        (second, "h2o"), (first, "h2o"), (second, "full"), (first, "full"),
    ]  # fmt: skip


def test_decided_figures_stop_at_the_first_look():
    rounds, rows, log = go(suite_of("full,h2o", '["tpot_s"]'), level, level)
    assert len(log) == 2 * 2 * 4
    assert {row.verdict for row in rows.values()} == {Verdict.OK}
    assert all(len(arm) == 4 for traces in rounds.traces.values() for arm in traces.values())


def test_only_undecided_cells_go_on():
    _, rows, log = go(suite_of("full,h2o", '["tpot_s"]'), level, wild)
    assert rows["h2o@0.2", "tpot_s"].verdict is Verdict.INCONCLUSIVE
    assert rows["h2o@0.2", "tpot_s"].n == 8
    assert rows["full", "tpot_s"].n == 4
    assert [policy for _, policy in log].count("full") == 2 * 4
    assert [policy for _, policy in log].count("h2o") == 2 * 8


def test_an_undecided_ratio_takes_its_partner_along():
    _, rows, log = go(suite_of("full,h2o", '["speedup"]'), level, wild)
    assert rows["h2o@0.2", "speedup"].n == 8
    assert [policy for _, policy in log].count("full") == 2 * 8


def test_every_further_look_is_measured_by_fresh_processes():
    suite, log, renewed = suite_of("h2o", '["tpot_s"]', "[4, 8, 16]"), [], []
    arms = {"base": Scripted("base", log, level), "head": Scripted("head", log, wild)}
    measure_group(arms, cells(suite), suite, lambda words: None, renew=lambda: renewed.append(len(log)))
    assert renewed == [2 * 4, 2 * 8]


def test_the_first_decision_of_a_figure_stands():
    """h2o's time becomes twice as long after the first look; only its first token is still open then."""
    suite = suite_of("h2o", '["tpot_s", "ttft_s"]')

    class Unsteady(Scripted):
        def measure(self, cell: Cell) -> dict[str, Any]:
            found = super().measure(cell)
            return {**found, "ttft_s": 1.0 + self.asked[cell.axes.policy] % 2}

    log: Log = []
    arms = {
        "base": Scripted("base", log, level),
        "head": Unsteady("head", log, lambda policy, number: level(policy, number) * (2 if number >= 4 else 1)),
    }
    _, rows = measure_group(arms, cells(suite), suite, lambda words: None)
    assert [(row.metric, row.verdict, row.n) for row in rows] == [
        ("tpot_s", Verdict.OK, 4),
        ("ttft_s", Verdict.INCONCLUSIVE, 8),
    ]


@pytest.mark.parametrize(("slowed", "pairs"), [(2, 6), (100, 4 * REPEATS)])
def test_pairs_with_held_back_clocks_are_repeated_a_fixed_number_of_times(slowed, pairs):
    suite = suite_of("h2o", '["tpot_s"]')
    log: Log = []

    class Hot(Scripted):
        def measure(self, cell: Cell) -> dict[str, Any]:
            found = super().measure(cell)
            return {
                **found,
                "flags": ["GPU hot 80 % of the time"] if self.asked["h2o"] < slowed else ["other load 90 %"],
            }

    arms = {"base": Scripted("base", log, level), "head": Hot("head", log, level)}
    rounds, rows = measure_group(arms, cells(suite), suite, lambda words: None)
    assert len(log) == 2 * pairs
    assert rounds.repeated == pairs - 4
    assert rows[0].n == 4


def test_a_cell_that_fails_stops_and_the_others_go_on():
    suite = suite_of("full,h2o", '["tpot_s"]')

    def full_falls(policy: str, number: int) -> float:
        if policy == "full" and number == 2:
            raise OutOfMemory("out of memory")
        return level(policy, number)

    rounds, rows, _ = go(suite, level, full_falls)
    failed = {cell.split("/")[4]: ends for cell, ends in rounds.failed.items()}
    assert failed["full"]["head"].status == "oom"
    assert failed["h2o@0.2"] == {}
    assert list(rows) == [("h2o@0.2", "tpot_s")]
