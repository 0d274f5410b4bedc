"""The gate's rules: each kind at its limits, and the timed rule's false alarms and power on a simulated machine."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from machine import rounds

from d2obench.errors import UsageError
from d2obench.gate.compare import Facts, facts_of, judge_facts, judge_status
from d2obench.gate.rules import (
    judge_bounded,
    judge_exact,
    judge_ratio,
    judge_ratios,
    judge_repeats,
    judge_sampled,
    judge_timed,
    side_by_side,
    tolerance,
)
from d2obench.gate.verdict import Row, Verdict, gather
from d2obench.record import Value

OK, IMPROVED, REGRESSED = Verdict.OK, Verdict.IMPROVED, Verdict.REGRESSED
INCONCLUSIVE, INCOMPARABLE = Verdict.INCONCLUSIVE, Verdict.INCOMPARABLE


@pytest.mark.parametrize(
    ("metric", "base", "head", "verdict"),
    [
        ("kv_bytes", 1000, 1000, OK),
        ("kv_bytes", 1000, 1001, REGRESSED),
        ("kv_bytes", 1000, 999, IMPROVED),
        ("ops_step", 0, 1, REGRESSED),
        ("budget_effective", 0.2, 0.2 + 1e-15, OK),
        ("budget_effective", 0.2, 0.19, REGRESSED),  # no side is better: it must not change
        ("tokens_digest", "ab", "ab", OK),
        ("tokens_digest", "ab", "ac", REGRESSED),
        ("kept_layers", (10.0, 12.0), (10.0, 12.0), OK),
        ("kept_layers", (10.0, 12.0), (10.0, 13.0), REGRESSED),
        ("kept_layers", (10.0, 12.0), (10.0,), REGRESSED),
        ("kv_bytes", None, 1.0, INCOMPARABLE),
    ],
)
def test_exact(metric, base, head, verdict):
    assert judge_exact("c", metric, base, head).verdict is verdict


def test_an_exact_figure_that_differs_between_repeats_is_an_error():
    assert judge_repeats("c", "kv_bytes", [5, 5, 5]) is None
    row = judge_repeats("c", "kv_bytes", [5, 5, 6])
    assert row.verdict is INCOMPARABLE
    assert "not exact" in row.reason


@pytest.mark.parametrize(
    ("metric", "head", "verdict"),
    [("rss_peak_bytes", 104, OK), ("rss_peak_bytes", 106, REGRESSED), ("rss_peak_bytes", 90, IMPROVED)],
)
def test_bounded(metric, head, verdict):
    assert judge_bounded("c", metric, 100, head, tolerance(metric)).verdict is verdict


def test_a_suite_overrides_the_tolerance_of_the_table():
    assert tolerance("tpot_s") == 0.05
    assert tolerance("tpot_s", {"tpot_s": 0.2}) == 0.2
    assert tolerance("kept_layers") == 0.0


@pytest.mark.parametrize(
    ("metric", "factor", "verdict"),
    [
        ("tpot_s", 1.2, REGRESSED),
        ("tpot_s", 0.8, IMPROVED),
        ("tpot_s", 1.01, OK),
        ("decode_tok_s", 1.2, IMPROVED),
        ("decode_tok_s", 0.8, REGRESSED),
        ("speedup", 0.8, REGRESSED),
        ("prefill_cost", 1.2, REGRESSED),
    ],
)
def test_timed_knows_which_way_is_worse(metric, factor, verdict):
    base = np.linspace(1.0, 1.02, 8)
    row = judge_timed("c", metric, base.tolist(), (base * factor).tolist(), 0.05)
    assert row.verdict is verdict
    assert row.effect == pytest.approx(factor - 1)
    assert row.lo <= row.effect <= row.hi


def gate_of(rng: np.random.Generator, change: float, **machine: float) -> Verdict:
    """The adaptive rule on a simulated machine: 8, 16, 32 rounds, then once more from the start if it regressed."""

    def sitting() -> Verdict:
        base, head = rounds(rng, 32, change, **machine)
        for look in (8, 16, 32):
            row = judge_timed("c", "tpot_s", base[:look], head[:look], 0.05, 0.98)
            if row.verdict is not INCONCLUSIVE:
                break
        return row.verdict

    first = sitting()
    return first if first is not REGRESSED or sitting() is REGRESSED else INCONCLUSIVE


def test_timed_does_not_cry_wolf_on_a_shared_machine():
    rng = np.random.default_rng(0)
    found = Counter(gate_of(rng, 0.0) for _ in range(150))
    assert found[REGRESSED] == 0
    assert found[OK] + found[IMPROVED] > 120


def test_timed_finds_real_slowdowns_on_a_quiet_and_on_a_shared_machine():
    rng = np.random.default_rng(1)
    quiet = {"jitter": 0.01, "drift": 0.01, "spikes": 0.02}
    assert sum(gate_of(rng, 0.10, **quiet) is REGRESSED for _ in range(60)) >= 54
    assert sum(gate_of(rng, 0.20) is REGRESSED for _ in range(60)) >= 58
    assert all(gate_of(rng, 0.10) is not OK for _ in range(60))


def test_timed_on_an_awful_machine_is_silent_rather_than_wrong():
    rng = np.random.default_rng(2)
    awful = {"jitter": 0.06, "drift": 0.08, "spikes": 0.2}
    found = Counter(gate_of(rng, 0.0, **awful) for _ in range(100))
    assert found[REGRESSED] <= 1
    assert found[INCONCLUSIVE] > 10


def test_timed_says_it_does_not_know():
    row = judge_timed("c", "tpot_s", [1.0] * 8, [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4], 0.05)
    assert row.verdict is INCONCLUSIVE
    assert "8 rounds" in row.reason
    assert judge_timed("c", "tpot_s", [1.0], [2.0], 0.05).verdict is INCONCLUSIVE
    assert judge_timed("c", "tpot_s", [], [], 0.05).verdict is INCOMPARABLE


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        (Value(1.5, 1.45, 1.55, 9), OK),
        (Value(1.2, 1.1, 1.3, 9), REGRESSED),
        (Value(1.4, 1.2, 1.6, 9), INCONCLUSIVE),
        (Value(2.0, 1.9, 2.1, 9), IMPROVED),
        (Value(1.5), INCONCLUSIVE),
        (None, INCOMPARABLE),
    ],
)
def test_ratio_against_a_stored_one(head, verdict):
    assert judge_ratio("c", "speedup", 1.5, head, 0.1).verdict is verdict


def test_times_of_runs_at_different_times_are_shown_and_never_judged():
    row = side_by_side("c", "tpot_s", Value(1.0, 0.9, 1.1, 5), Value(2.0, 1.9, 2.1, 5), "measured at another time")
    assert row.verdict is Verdict.NOT_JUDGED
    assert (row.base, row.head, row.effect, row.lo, row.hi) == (1.0, 2.0, 1.0, None, None)
    assert gather("compare", "x", "y", [row]).exit_code(strict=True) == 0


def interval(middle: float, half: float, kind: str = "interval") -> Value:
    return Value(middle, middle - half, middle + half, 9, kind=kind, df=8)


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        (interval(1.5, 0.02), interval(1.5, 0.02), OK),
        (interval(1.5, 0.02), interval(1.2, 0.02), REGRESSED),
        (interval(1.5, 0.02), interval(2.0, 0.02), IMPROVED),
        (interval(1.5, 0.02), interval(1.35, 0.02), INCONCLUSIVE),
        (interval(1.5, 0.3), interval(1.2, 0.02), INCONCLUSIVE),  # a stored constant would say REGRESSED
        (interval(1.5, 0.02, "range"), interval(1.2, 0.02), INCONCLUSIVE),
        (None, interval(1.2, 0.02), INCOMPARABLE),
    ],
)
def test_ratios_of_two_runs_carry_the_noise_of_both(base, head, verdict):
    assert judge_ratios("c", "speedup", base, head, 0.1).verdict is verdict


def scores(wrong: int, n: int = 100) -> dict[str, float]:
    return {str(i): float(i >= wrong) for i in range(n)}


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [(0, OK), (1, OK), (12, REGRESSED), (5, INCONCLUSIVE)],
    ids=["same", "noise", "drop", "unclear"],
)
def test_right_or_wrong_answers(wrong, verdict):
    row = judge_sampled("c", "score", scores(0), scores(wrong), 0.05)
    assert row.verdict is verdict
    assert row.n == 100
    if verdict is INCONCLUSIVE:
        assert "items show a change of" in row.reason


def test_accuracy_cries_wolf_rarely():
    """No real change, 4 % of the answers flip at random: a plain 'drop > 1 point' gate alarms in 18 % (n = 200)."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(100):
        flips = rng.random(200) < 0.04
        base = rng.random(200) < 0.5
        head = np.where(flips, ~base, base)
        before, after = ({str(i): float(v) for i, v in enumerate(side)} for side in (base, head))
        alarms += judge_sampled("c", "score", before, after, 0.01).verdict is REGRESSED
    assert alarms <= 5


def test_a_worse_kl_on_every_document_is_found_and_a_single_outlier_is_not():
    rng = np.random.default_rng(0)
    base = {str(i): float(v) for i, v in enumerate(rng.gamma(2, 0.05, 24))}
    worse = {key: value + 0.05 for key, value in base.items()}
    assert judge_sampled("c", "kl", base, worse, 0.02).verdict is REGRESSED
    assert judge_sampled("c", "kl", worse, base, 0.02).verdict is IMPROVED
    assert judge_sampled("c", "kl", base, {**base, "3": base["3"] + 1.0}, 0.02).verdict is INCONCLUSIVE
    assert judge_sampled("c", "kl", base, {**base, "3": base["3"] + 0.01}, 0.02).verdict is OK


def test_other_items_can_not_be_compared():
    row = judge_sampled("c", "score", scores(0, 10), scores(0, 11), 0.05)
    assert row.verdict is INCOMPARABLE
    assert "1 of 11 ids" in row.reason


def test_documents_are_the_clusters():
    """Ten items of one document that fall together are one piece of evidence, not ten."""
    base = {str(i): 0.0 for i in range(40)}
    head = {key: (0.3 if int(key) < 10 else 0.0) for key in base}
    documents = {key: str(int(key) // 10) for key in base}
    assert judge_sampled("c", "kl", base, head, 0.02).verdict is REGRESSED
    assert judge_sampled("c", "kl", base, head, 0.02, documents).verdict is INCONCLUSIVE


@pytest.mark.parametrize(
    ("base", "head", "verdict"),
    [
        ("ok", "oom", REGRESSED),
        ("ok", "failed", REGRESSED),
        ("oom", "ok", IMPROVED),
        ("oom", "oom", OK),
        ("failed", "failed", INCOMPARABLE),
    ],
)
def test_a_cell_that_no_longer_ends_well_is_a_regression(base, head, verdict):
    assert judge_status("c", base, head).verdict is verdict


def test_facts_are_sorted_by_kind_and_timed_figures_are_not_among_them():
    values = {
        "kv_bytes": Value(100), "tpot_s": Value(0.1), "rss_peak_bytes": Value(5e8), "speedup": Value(1.5, 1.4, 1.6, 5),
        "length_drift": Value(1.0), "mbu": Value(None),
    }  # fmt: skip
    rounds = [{"kv_bytes": 100, "kept": [[10.0, 11.0], [12.0, 13.0]], "tokens_digest": "ab"}] * 2
    items = [
        {"id": "0", "document": "d", "kl": [0.1, 0.3], "top1": [1, 0], "gold_logprob": -math.log(2), "gold_bytes": 4}
    ]
    found = facts_of("c", "ok", values, {"rounds": rounds, "items": items})
    assert found.exact == {"kv_bytes": 100, "kept_layers": (21.0, 25.0), "tokens_digest": "ab"}
    assert found.bounded == {"rss_peak_bytes": 5e8}
    assert found.ratio == {"speedup": Value(1.5, 1.4, 1.6, 5)}
    assert found.sampled == {
        "kl": {"0": pytest.approx(0.2)},
        "top1": {"0": 0.5},
        "gold_bpb": {"0": pytest.approx(0.25)},
    }
    assert found.clusters == {"0": "d"}


def test_rounds_that_disagree_on_an_exact_figure_make_it_incomparable_once():
    rounds = [{"tokens_digest": "ab"}, {"tokens_digest": "cd"}]
    found = facts_of("c", "ok", {}, {"rounds": rounds})
    rows = judge_facts("c", found, Facts(exact={"tokens_digest": "ab"}))
    assert [row.verdict for row in rows] == [INCOMPARABLE]


def test_verdicts_stand_worst_first_and_count():
    rows = [
        Row("b", "kv_bytes", OK, "exact"),
        Row("a", "tpot_s", REGRESSED, "timed", effect=0.1, limit=0.05),
        Row("c", "tpot_s", REGRESSED, "timed", effect=0.3, limit=0.05),
        Row("d", "score", INCONCLUSIVE, "sampled"),
    ]
    found = gather("gate", "x", "y", rows)
    assert [row.cell for row in found.rows] == ["c", "a", "d", "b"]
    assert found.summary == "REGRESSED: 2 REGRESSED, 1 INCONCLUSIVE, 1 OK"


@pytest.mark.parametrize(
    ("verdicts", "plain", "strict"),
    [
        ([OK, IMPROVED], 0, 0),
        ([OK, INCONCLUSIVE], 0, 3),
        ([OK, INCOMPARABLE, INCONCLUSIVE], 2, 2),
        ([REGRESSED, INCOMPARABLE], 1, 1),
    ],
)
def test_exit_codes(verdicts, plain, strict):
    found = gather("gate", "x", "y", [Row(str(i), "kv_bytes", v, "exact") for i, v in enumerate(verdicts)])
    assert found.exit_code() == plain
    assert found.exit_code(strict=True) == strict
    assert found.exit_code(strict=True, exit_zero=True) == 0


def test_comparing_nothing_is_an_error():
    with pytest.raises(UsageError, match="nothing was compared"):
        gather("gate", "x", "y", [])
