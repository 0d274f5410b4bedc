"""Words need evidence: what intervals, ranges, several comparisons, processes and bounds allow to be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from d2obench.record import Value
from d2obench.stats.claims import (
    BIAS,
    across_runs,
    apart,
    front,
    impossible,
    leader,
    least,
    outcome,
    ratio_of_ratios,
    resting_on,
    told,
    widened,
)
from d2obench.stats.intervals import mean, paired_difference, paired_ratio, proportion


def value(middle: float, half: float, kind: str = "interval", df: int = 20) -> Value:
    return Value(middle, middle - half, middle + half, df + 1, kind=kind, method="t", df=df)


@pytest.mark.parametrize(
    ("metric", "found", "verdict"),
    [
        ("speedup", value(1.2, 0.05), "better"),
        ("speedup", value(0.8, 0.05), "worse"),
        ("speedup", value(1.02, 0.05), "not told apart"),
        ("speedup", value(1.2, 0.05, "range"), "not told apart"),
        ("speedup", Value(1.2), "not told apart"),
        ("speedup", None, "not told apart"),
        ("prefill_cost", value(1.2, 0.05), "worse"),
        ("kl_rival:h2o", value(-0.1, 0.02), "better"),
        ("score_diff", value(-0.1, 0.02), "worse"),
        ("score_diff", value(0.1, 0.2), "not told apart"),
    ],
)
def test_a_word_comes_from_an_interval_that_leaves_the_other_answer_out(metric, found, verdict):
    assert told(metric, found) == verdict


def test_a_ratio_above_its_bound_is_impossible_whatever_its_interval():
    assert told("speedup", value(3.6, 0.7), bound=1.07) == "impossible"
    assert told("speedup", value(3.6, 0.7, "range"), bound=1.07) == "impossible"
    assert told("speedup", value(1.15, 0.03), bound=1.07) == "impossible"
    assert told("speedup", value(1.12, 0.05), bound=1.07) == "better"  # above it, but within its own noise
    assert not impossible(Value(3.6), 1.07)
    assert told("speedup", Value(3.6), bound=1.07) == "not told apart"


def test_many_comparisons_widen_an_interval_to_bonferroni_s_level():
    x = np.random.default_rng(0).normal(0.1, 0.1, 12)
    one = paired_difference([0.0] * 12, x.tolist())
    many = widened(one, 10)
    factor = stats.t.ppf(1 - 0.05 / 20, 11) / stats.t.ppf(0.975, 11)
    assert many.hi - many.value == pytest.approx(factor * (one.hi - one.value))
    assert told("score_diff", value(0.1, 0.09), 1) == "better"
    assert told("score_diff", value(0.1, 0.09), 10) == "not told apart"


def test_a_range_over_documents_proves_nothing():
    assert apart("kl_p99", value(0.1, 0.01, "range"), value(0.3, 0.01, "range")) == "not told apart"
    assert apart("kv_bytes", value(10.0, 1.0, "range"), value(30.0, 1.0, "range")) == "better"


def test_a_share_is_widened_exactly():
    assert widened(proportion(9, 10), 5) == proportion(9, 10, 0.99)


def test_ten_true_nulls_give_a_false_word_in_at_most_one_report_of_twenty():
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(300):
        ratios = [paired_ratio([1.0] * 8, np.exp(rng.normal(0, 0.03, 8)).tolist()) for _ in range(10)]
        wide = [widened(one, 10) for one in ratios]
        false += any(one.lo > 1 or one.hi < 1 for one in wide)
    assert false <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_times_allow_for_the_process_they_were_measured_in():
    tight = value(1.02, 0.001)
    assert told("speedup", tight, processes=1) == "not told apart"
    assert told("speedup", tight, processes=4) == "better"
    assert told("kl_rival:h2o", value(-0.02, 0.001)) == "better"  # quality does not depend on the process
    wide = widened(tight, timed=True, processes=2)
    known = stats.norm.ppf(0.975) * BIAS / math.sqrt(2)
    assert math.log(wide.hi / wide.value) == pytest.approx(known, rel=0.01)
    assert resting_on(1) == "measured in one process"
    assert resting_on(2) == ""


def test_processes_that_differ_by_chance_give_few_false_words():
    """A true ratio of 1, measured to a hair, in processes that differ: the allowance must hold the false words down."""
    rng = np.random.default_rng(2)
    for processes in (1, 2):
        false = 0
        for _ in range(400):
            bias = rng.normal(0, BIAS, processes).mean()
            false += told("speedup", value(math.exp(bias), 0.002), processes=processes) != "not told apart"
        assert false <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_two_figures_are_told_apart_where_their_intervals_do_not_touch():
    assert apart("kl", value(0.1, 0.02), value(0.2, 0.02)) == "better"
    assert apart("kl", value(0.2, 0.02), value(0.1, 0.02)) == "worse"
    assert apart("kl", value(0.1, 0.06), value(0.2, 0.06)) == "not told apart"
    assert apart("kv_bytes", Value(100), Value(200)) == "better"
    assert apart("kv_bytes", Value(100), Value(100)) == "not told apart"
    assert apart("rss_peak_bytes", value(100, 3, "range"), value(200, 3, "range")) == "not told apart"
    assert apart("alloc_peak_bytes", value(100, 0, "range"), value(200, 0, "range")) == "better"  # in every repeat
    assert apart("rss_peak_bytes", Value(100), Value(200)) == "not told apart"
    assert apart("kv_bytes", Value(100, 90, 250, 3, kind="range"), Value(200)) == "not told apart"  # it varies
    assert apart("tpot_s", Value(0.1), Value(0.2)) == "not told apart"


def test_the_best_is_told_only_where_nothing_is_near_it():
    figures = {"a": value(1.5, 0.02), "b": value(1.2, 0.02), "c": value(1.0, 0.02)}
    assert leader("speedup", figures) == ("a", ())
    near = figures | {"b": value(1.48, 0.05)}
    assert leader("speedup", near) == ("a", ("b",))
    assert leader("speedup", {key: value(1.0, 0.02, "range") for key in "ab"}).near == ("b",)
    assert leader("speedup", {"a": figures["a"]}) is None
    assert leader("length_drift", figures) is None
    assert leader("kv_bytes", {"a": Value(5), "b": Value(5), "c": Value(9)}) == ("a", ("b",))


def test_a_paired_comparison_may_see_more_than_two_intervals():
    figures = {"a": value(0.1, 0.1), "b": value(0.15, 0.1)}
    assert leader("kl", figures).near == ("b",)
    assert leader("kl", figures, pair=lambda one, other: "better").near == ()


def test_the_smallest_of_several_figures_has_an_interval_that_holds_the_smallest_truth():
    """Three equal ratios: the smallest is too low by selection, and its own interval misses the truth too often."""
    rng = np.random.default_rng(4)
    own = held = 0
    for _ in range(1500):
        ratios = [paired_ratio([1.0] * 12, np.exp(rng.normal(0, 0.05, 12)).tolist()) for _ in range(3)]
        smallest, found = min(ratios, key=lambda one: one.value), least(ratios)
        own += smallest.lo <= 1 <= smallest.hi
        held += found.lo <= 1 <= found.hi
        assert found.value == smallest.value and found.lo <= found.value <= found.hi
    assert own < 0.945 * 1500
    assert held >= 0.95 * 1500
    assert least(ratios[:1]) == ratios[0]
    assert least([ratios[0], Value(1.1, 1.0, 1.2, 2, kind="range")]).kind == "range"
    assert least([ratios[0], Value(1.1)]).lo is None
    with pytest.raises(ValueError, match="no value"):
        least([Value(None)])


def test_the_smallest_figure_is_judged_with_all_others_it_was_chosen_from():
    clear, near = value(1.05, 0.04), value(1.06, 0.08)
    assert outcome("to_library", clear, 1.0, None, processes=9) == "met"
    assert outcome("to_library", least([clear, near]), 1.0, None, processes=9) == "no verdict"


def test_the_front_holds_rows_that_are_shown_to_be_undominated():
    sizes = {"small": 10.0, "good": 20.0, "poor": 20.0, "full": 100.0, "unknown": None}
    order = ["full", "good", "small", "poor"]
    assert front(sizes, lambda a, b: order.index(a) < order.index(b)) == {"small", "good", "full"}
    assert front(sizes, lambda a, b: False) == {"small"}


@pytest.mark.parametrize(
    ("metric", "found", "said"),
    [
        ("to_streaming", value(1.0, 0.005), "met"),
        ("to_streaming", value(0.9, 0.005), "missed"),
        ("to_streaming", value(0.97, 0.01), "no verdict"),
        ("to_streaming", value(1.0, 0.005, "range"), "no verdict"),
        ("to_streaming", Value(1.0), "no verdict"),
        ("to_streaming", Value(None), "no verdict"),
        ("kv_bytes", Value(1), "met"),
        ("rss_peak_bytes", Value(1, 0.9, 1, 2, kind="range"), "no verdict"),
        ("rss_peak_bytes", Value(1, 1, 1, 2, kind="range"), "met"),
    ],
)
def test_a_target_is_met_where_the_whole_interval_lies_inside(metric, found, said):
    assert outcome(metric, found, 0.95 if metric == "to_streaming" else None, 2.0, processes=2) == said


def test_targets_count_as_comparisons():
    found = value(1.0, 0.03)
    assert outcome("kl", found, 0.96, None) == "met"
    assert outcome("kl", found, 0.96, None, 20) == "no verdict"


def test_runs_at_different_times_are_judged_by_what_the_machine_can_not_change():
    assert [across_runs(key) for key in ("tpot_s", "ttft_s", "decode_tok_s", "mbu")] == [False] * 4
    assert [across_runs(key) for key in ("kv_bytes", "kl", "score", "speedup", "kept_layers")] == [True] * 5


def test_a_ratio_of_two_runs_ratios_carries_the_noise_of_both():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        runs = [paired_ratio([1.0] * 10, np.exp(rng.normal(0.2, 0.05, 10)).tolist()) for _ in range(2)]
        found = ratio_of_ratios(*runs)
        held += found.lo <= 1 <= found.hi
    assert held >= 0.93 * 400
    assert ratio_of_ratios(value(1.0, 0.1), Value(1.1, 1.0, 1.2, 2, kind="range")).kind == "range"
    assert ratio_of_ratios(value(1.0, 0.1), Value(1.1)).lo is None


def test_a_mean_of_documents_may_be_told_from_nothing_only_with_enough_of_them():
    few = mean([0.2, 0.3, 0.25, 0.3])
    assert few.kind == "range"
    assert told("kl_rival:h2o", few) == "not told apart"
