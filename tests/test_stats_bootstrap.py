"""Intervals against what they promise: coverage, closed forms, and a slow loop that resamples one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2obench.stats.bootstrap import interval, mean_interval, paired_ratio, percentile, seed_of, unanimous_interval

values = st.lists(st.floats(0.01, 1e6), min_size=2, max_size=30)


def covered(found, truth: float) -> bool:
    return found.lo <= truth <= found.hi


def test_a_median_interval_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = sum(covered(interval(rng.lognormal(0, 0.3, 21).tolist(), seed=i), 1.0) for i in range(100))
    assert 88 <= hits <= 100  # 95 % of 200, ± 3 sigma


def test_steps_of_a_round_are_not_counted_as_independent():
    """Rounds differ in level: an interval over steps would be far too narrow, one over rounds is not."""
    rng = np.random.default_rng(2)
    by_round = by_step = 0
    for i in range(50):
        rounds = [(level + rng.normal(0, 0.01, 10)).tolist() for level in rng.normal(10, 1, 12)]
        by_round += covered(interval(rounds, "mean", seed=i), 10)
        by_step += covered(interval([step for part in rounds for step in part], "mean", seed=i), 10)
    assert by_round >= 40
    assert by_step < 25


def test_mean_interval_of_clusters_equals_a_loop_that_resamples_clusters():
    rng = np.random.default_rng(3)
    clusters = [f"doc{i // 4}" for i in range(40)]
    data = (np.repeat(rng.normal(size=10), 4) + rng.normal(0, 0.1, 40)).tolist()
    found = mean_interval(data, clusters, seed=4)
    groups = [data[i : i + 4] for i in range(0, 40, 4)]
    means = [np.mean([v for j in rng.integers(0, 10, 10) for v in groups[j]]) for _ in range(6000)]
    assert found.value == pytest.approx(np.mean(data))
    assert found.lo == pytest.approx(np.quantile(means, 0.025), abs=0.05)
    assert found.hi == pytest.approx(np.quantile(means, 0.975), abs=0.05)
    alone = mean_interval(data, seed=4)
    assert found.hi - found.lo > 1.5 * (alone.hi - alone.lo)


@settings(max_examples=30, deadline=None)
@given(values, st.floats(0.1, 10))
def test_a_constant_factor_is_found_exactly_and_both_ways(base, factor):
    head = [value * factor for value in base]
    found, back = paired_ratio(base, head), paired_ratio(head, base)
    assert found.value == pytest.approx(factor)
    assert found.lo == pytest.approx(factor)
    assert found.hi == pytest.approx(factor)
    assert back.value == pytest.approx(1 / factor)


@settings(max_examples=30, deadline=None)
@given(values)
def test_the_figure_lies_in_its_interval_and_a_seed_repeats_it(samples):
    found = interval(samples, seed="tpot_s")
    assert found.lo <= found.value <= found.hi
    assert found == interval(samples, seed=seed_of("tpot_s"))


@pytest.mark.parametrize(("q", "least"), [(0.5, 6), (0.95, 72), (0.99, 368)])
def test_a_percentile_is_refused_until_its_order_statistics_can_bound_it(q, least):
    assert percentile(list(range(least - 1)), q) is None
    assert percentile(list(range(least)), q) is not None


def test_order_statistics_are_those_of_the_tables():
    """Median of n = 20: the 6th and 15th values bound it with 95.9 % (Conover, table A3)."""
    found = percentile([float(i) for i in range(1, 21)], 0.5)
    assert (found.lo, found.hi) == (6, 15)


def test_a_percentile_interval_covers():
    rng = np.random.default_rng(5)
    truth = math.log(20)  # p95 of an exponential
    hits = sum(covered(percentile(rng.exponential(size=150).tolist(), 0.95), truth) for _ in range(300))
    assert hits >= 280


def test_one_sample_or_one_round_has_no_interval():
    assert interval([3.0]) == (3.0, None, None)
    assert interval([[1.0, 2.0, 3.0]]) == (2.0, None, None)
    assert mean_interval([1, 2, 3], ["a", "a", "a"]) == (2.0, None, None)
    assert paired_ratio([1.0], [2.0]) == (2.0, None, None)


@pytest.mark.parametrize("bad", [[], [math.nan, 1.0], [math.inf], [[]]])
def test_samples_that_are_none_or_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match="finite"):
        interval(bad)


def test_pairs_must_be_pairs_and_above_zero():
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="above 0"):
        paired_ratio([0.0], [1.0])
    with pytest.raises(ValueError, match="clusters"):
        mean_interval([1.0, 2.0], ["a"])


def test_rounds_may_differ_in_length():
    found = interval([[1.0, 1.0], [2.0], [3.0, 3.0, 3.0]])
    assert found.value == 2.5
    assert (found.lo, found.hi) == (1.0, 3.0)


@pytest.mark.parametrize("trials", [2, 20, 817])
def test_an_outcome_that_never_varied_is_doubted_as_the_binomial_law_has_it(trials: int) -> None:
    failed, held = unanimous_interval(0.0, trials), unanimous_interval(1.0, trials)
    assert failed.lo == failed.value == 0
    assert (1 - failed.hi) ** trials == pytest.approx(0.025)  # so rare would nothing but failures be
    assert (held.lo, held.value, held.hi) == (pytest.approx(1 - failed.hi), 1, 1)
