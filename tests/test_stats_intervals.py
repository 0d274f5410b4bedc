"""Intervals against what they promise: simulated coverage, closed forms, and what they refuse to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from d2obench.record import Value
from d2obench.stats.intervals import (
    highest,
    mean,
    median,
    paired_difference,
    paired_ratio,
    percentile,
    proportion,
    trimmed_t,
)
from d2obench.study import coverage

times = st.lists(st.floats(0.01, 1e6), min_size=3, max_size=40)


@pytest.fixture(scope="module")
def studied() -> list[coverage.Covered]:
    return coverage.study(trials=2500)


def test_every_interval_that_is_printed_covers_at_least_93_percent(studied):
    """Each field is one of 2,500 trials: its standard error is half a percent, so single fields may fall below."""
    low = [row for row in studied if row.coverage < coverage.LEAST - 0.012]
    assert not low
    assert sum(row.coverage < coverage.LEAST for row in studied) <= len(studied) // 200


def test_the_study_holds_every_kind_of_figure_from_its_first_count_on(studied):
    first = {row.figure: min(one.n for one in studied if one.figure == row.figure) for row in studied}
    assert first == {
        "time of rounds": 3, "ratio of rounds": 3, "time of windows": 12, "ratio of windows": 12, "mean of items": 6,
        "mean score": 4, "difference of scores": 4, "share of right items": 2, "p95 of steps": 189,
        "p99 of steps": 1533,
    }  # fmt: skip


def test_the_study_sees_an_interval_that_does_not_cover():
    """The percentile bootstrap of a median that was printed before: 50 % with two rounds, 75 % with three."""
    found = {(row.method, row.n): row.coverage for row in coverage.bootstrap(400, (2, 3, 5))}
    assert found["percentile bootstrap, 95%", 2] == pytest.approx(0.5, abs=0.09)
    assert found["percentile bootstrap, 95%", 3] == pytest.approx(0.75, abs=0.08)


def test_the_published_form_names_the_least_of_each_kind(studied):
    text = coverage.markdown(studied, [])
    worst = min((row for row in studied if row.figure == "mean of items"), key=lambda row: row.coverage)
    assert f"| mean of items | Hall's t | 6 | {worst.coverage:.1%} | {worst.model}, n = {worst.n} |" in text


def test_trimmed_t_is_student_s_where_nothing_is_trimmed_and_yuen_s_where_something_is():
    x = np.random.default_rng(0).normal(size=(1, 4))
    lo, hi = trimmed_t(x, 0.945)
    assert (lo[0], hi[0]) == pytest.approx(stats.t.interval(0.95, 3, x.mean(), stats.sem(x[0])))
    x = np.random.default_rng(1).normal(5, 1, (1, 20))
    lo, hi = trimmed_t(x, 0.945)
    known = stats.ttest_ind(x[0], np.zeros(20) + [0, 1e-9] * 10, equal_var=False, trim=0.2)
    assert (lo[0] + hi[0]) / 2 == pytest.approx(stats.trim_mean(x[0], 0.2))
    assert (lo[0] + hi[0]) / (hi[0] - lo[0]) * stats.t.ppf(0.975, 11) == pytest.approx(known.statistic, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(times, st.floats(0.1, 10))
def test_a_constant_factor_is_exact_and_found_both_ways(base, factor):
    head = [value * factor for value in base]
    found, back = paired_ratio(base, head), paired_ratio(head, base)
    assert found.value == pytest.approx(factor)
    assert found.kind == "exact"
    assert back.value == pytest.approx(1 / factor)


@settings(max_examples=60, deadline=None)
@given(times, times)
def test_a_ratio_turned_round_has_the_interval_turned_round(base, head):
    n = min(len(base), len(head))
    found, back = paired_ratio(base[:n], head[:n]), paired_ratio(head[:n], base[:n])
    assert found.lo <= found.value <= found.hi
    assert back.value == pytest.approx(1 / found.value)
    assert back.lo == pytest.approx(1 / found.hi)


def test_two_rounds_are_a_range_and_one_is_neither():
    assert paired_ratio([1.0], [2.0]) == Value(2.0, n=1)
    found = paired_ratio([1.0, 1.0], [2.0, 3.0])
    assert (found.kind, found.n) == ("range", 2)
    assert (found.lo, found.hi) == pytest.approx((2.0, 3.0))
    assert median([1.0, 1.1]).kind == "range"
    assert median([1.0, 1.1, 1.2]).kind == "interval"


def test_windows_need_twelve_and_allow_for_neighbours_that_are_alike():
    rng = np.random.default_rng(2)
    base = np.exp(rng.normal(0, 0.02, 48))
    head = base * np.exp(np.repeat(rng.normal(0, 0.05, 8), 6))
    assert paired_ratio(base[:11].tolist(), head[:11].tolist(), successive=True).kind == "range"
    blocks, single = (paired_ratio(base.tolist(), head.tolist(), successive=flag) for flag in (True, False))
    assert blocks.kind == single.kind == "interval"
    assert blocks.hi - blocks.lo > 1.5 * (single.hi - single.lo)


def test_steps_of_a_round_are_one_piece_of_evidence():
    rng = np.random.default_rng(3)
    rounds = [(level + rng.normal(0, 0.01, 50)).tolist() for level in (10.0, 11.0, 12.0)]
    found = median(rounds)
    assert found.n == 3
    assert found.value == pytest.approx(np.median(rounds[1]))
    assert found.hi - found.lo > 2


def test_figures_that_are_not_all_positive_keep_their_own_scale():
    found = median([-0.01, 0.0, 0.02, 0.01])
    assert found.lo < 0 < found.hi
    assert median([0.0, 0.0, 0.0]) == Value(0.0, 0.0, 0.0, 3, kind="exact")


def test_peaks_are_a_range_never_an_interval():
    assert highest([5, 9, 7]) == Value(9.0, 5.0, 9.0, 3, kind="range")
    assert highest([5, 5]).kind == "exact"
    assert highest([5]) == Value(5.0)


def test_means_count_documents_not_positions():
    values, documents = [1.0, 1.1, 1.2, 1.4] * 4, [f"d{i // 4}" for i in range(16)]
    assert (mean(values, documents).n, mean(values, documents).kind) == (4, "range")
    rng = np.random.default_rng(4)
    many = np.repeat(rng.gamma(2, 0.1, 8), 32)
    documents = [f"d{i // 32}" for i in range(256)]
    assert mean(many.tolist(), documents).n == 8
    alone = mean(many[::32].tolist())
    assert mean(many.tolist(), documents).hi == pytest.approx(alone.hi)
    assert mean(many.tolist(), documents, ends=(0.0, math.inf)).lo >= 0


def test_documents_of_unequal_length_weigh_by_their_items():
    found = mean([0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 0.5, 0.5, 1.5], ["a", "b", "b", "b", "c", "c", "d", "e", "f"])
    assert found.value == pytest.approx(9.5 / 9)
    assert found.lo < found.value < found.hi


def test_few_items_that_agree_are_no_certainty():
    assert mean([1.0] * 8, ends=(0.0, 1.0)) == proportion(8, 8)
    assert mean([1.0] * 8, ends=(0.0, 1.0)).lo == pytest.approx(0.025 ** (1 / 8))
    same = paired_difference([0.5] * 8, [0.5] * 8, bounded=True)
    assert same.lo < -0.1 < 0.1 < same.hi
    assert paired_difference([0.5] * 8, [0.5] * 8).kind == "exact"


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 10), (10, 10), (41, 200)])
def test_a_share_is_clopper_and_pearson_s(hits, n):
    known = stats.binomtest(hits, n).proportion_ci(method="exact")
    found = proportion(hits, n)
    assert (found.lo, found.hi) == pytest.approx((known.low, known.high))


def test_a_percentile_is_refused_where_the_steps_can_not_carry_it():
    rng = np.random.default_rng(5)
    steps = rng.exponential(size=400).tolist()
    assert percentile(steps[:31], 0.95) is None
    assert percentile(steps, 0.99) is None
    found = percentile(steps, 0.95)
    assert found.lo < found.value < found.hi
    assert percentile([steps[:200], steps[200:]], 0.95) == found


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [1.0, math.inf]])
def test_samples_that_are_none_are_an_error(bad):
    with pytest.raises(ValueError, match="finite"):
        median(bad)


def test_pairs_must_be_pairs_above_zero():
    with pytest.raises(ValueError, match="not pairs"):
        paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="above 0"):
        paired_ratio([0.0, 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="clusters"):
        mean([1.0, 2.0], ["a"])


def test_samples_turned_round_zero_have_the_interval_turned_round():
    x = np.random.default_rng(6).gamma(1, 1, 12)
    found, back = mean(x.tolist()), mean((-x).tolist())
    assert (back.lo, back.hi) == pytest.approx((-found.hi, -found.lo))
    half = stats.t.ppf(0.9875, 11) * stats.sem(x)
    assert found.hi - found.value > 1.2 * half  # the long tail's side
    assert found.value - found.lo == pytest.approx(half)


@pytest.mark.parametrize(
    ("n", "successive", "df"),
    [(3, False, 2), (5, False, 4), (6, False, 3), (20, False, 11), (32, True, 5), (96, True, 11)],
)
def test_degrees_of_freedom_are_those_of_what_is_left(n, successive, df):
    x = np.exp(np.random.default_rng(7).normal(0, 0.1, n)).tolist()
    assert median(x, successive=successive).df == df
