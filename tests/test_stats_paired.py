"""Paired tests against published figures and brute force; the Pareto front against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2obench.stats.claims import front
from d2obench.stats.intervals import paired_difference
from d2obench.stats.paired import detectable, mcnemar


def answers(both: int, lost: int, won: int, neither: int = 0) -> tuple[list[int], list[int]]:
    return [1] * both + [1] * lost + [0] * won + [0] * neither, [1] * both + [0] * lost + [1] * won + [0] * neither


@pytest.mark.parametrize(
    ("lost", "won", "p_worse", "p"),
    [(5, 0, 1 / 32, 1 / 16), (8, 2, 56 / 1024, 112 / 1024), (1, 1, 3 / 4, 1.0), (0, 0, 1.0, 1.0), (0, 6, 1.0, 2 / 64)],
)
def test_mcnemar_is_the_coin_toss_it_says(lost, won, p_worse, p):
    found = mcnemar(*answers(20, lost, won, 3))
    assert (found.lost, found.won) == (lost, won)
    assert found.p_worse == pytest.approx(p_worse)
    assert found.p == pytest.approx(p)


def test_mcnemar_is_exact_for_thousands_of_flips():
    found = mcnemar(*answers(0, 2600, 2400))
    z = (2600 - 2500 - 0.5) / math.sqrt(1250)
    assert found.p_worse == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=0.02)


def test_mcnemar_refuses_scores_between():
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5, 1], [1, 1])


def test_pairing_finds_what_two_separate_intervals_hide():
    rng = np.random.default_rng(0)
    base = rng.normal(5, 2, 200)
    found = paired_difference(base.tolist(), (base + 0.1 + rng.normal(0, 0.1, 200)).tolist())
    assert 0.05 < found.lo < 0.1 < found.hi < 0.15


def test_the_detectable_change_has_the_power_it_claims():
    """Simulated at n = 200, 8 % of the answers flipping, as in the design's table: about 5 points at 80 %."""
    base, head = answers(180, 8, 8, 4)
    least = detectable(base, head)
    assert least == pytest.approx(0.05, abs=0.01)
    rng, shown = np.random.default_rng(1), 0
    for _ in range(400):
        lost, won, _ = rng.multinomial(200, [0.04 + least / 2, 0.04 - least / 2, 0.92])
        shown += mcnemar(*answers(0, lost, won)).p_worse < 0.05
    assert 260 <= shown <= 360  # McNemar's exact test is conservative: somewhat below 80 %


def test_agreement_on_few_items_is_not_certainty():
    assert detectable([1] * 10, [1] * 10) > 0.3
    assert detectable([1] * 1000, [1] * 1000) < 0.01
    assert detectable([1], [1]) == math.inf


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(points)
def test_the_front_is_what_no_other_point_beats(found):
    sizes = {number: float(size) for number, (size, _) in enumerate(found)}
    on = front(sizes, lambda a, b: found[a][1] > found[b][1])
    for number, (size, quality) in enumerate(found):
        rivals = [other for place, other in enumerate(found) if place != number]
        assert (number in on) is not any(a <= size and b >= quality for a, b in rivals)


def test_points_without_a_size_are_never_on_the_front():
    assert front({"a": 1.0, "b": None, "c": math.nan, "d": 2.0}, lambda a, b: True) == {"a", "d"}
