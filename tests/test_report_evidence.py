"""What a report may say: bold, stars and sentences of made-up runs on a busy, a lying and a quiet machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import report_runs as made

from d2obench.record import CellRecord, Value, read_run
from d2obench.report import build, charts
from d2obench.report.derive import without_mass
from d2obench.report.view import Report
from d2obench.study.quick import excluded

SHAPE: dict[str, Any] = {"shape": "256+16", "batch": 2}


def interval(value: float, half: float, n: int = 9) -> Value:
    return Value(value, value - half, value + half, n, kind="interval", method="trimmed t", df=n - 1)


def timed(policy: str, rate: float, speedup: Value | None = None, **details: Any) -> CellRecord:
    values = {
        "decode_tok_s": interval(rate, 0.01 * rate),
        "kv_bytes": Value(100.0),
        "speedup_largest": Value(1.04, 1.0, 1.07, 9, kind="range"),
    }
    if speedup:
        values["speedup"] = speedup
    budget = None if policy == "full" else "0.2"
    return made.record(made.axes("speed", policy, budget, **SHAPE), values=values, details={"processes": 2} | details)


def report(folder: Path, *cells: CellRecord, **info: Any) -> Report:
    return build([made.write_run(folder, "made", list(cells), **info)])


def bold(found: Report, key: str) -> list[str]:
    (table,) = found.headline
    names = [column.key for column in table.columns]
    return [row[names.index("policy")].text for row in table.rows if row[names.index(key)].mark == "best"]


def test_an_impossible_speed_up_is_marked_and_wins_nothing(tmp_path: Path) -> None:
    """The sentence the first command once began with: 3.608 × full [2.867 … 4.541], where bytes allow 1.07."""
    lying = Value(3.608, 2.867, 4.541, 8, kind="interval", method="trimmed t", df=5)
    found = report(
        tmp_path, timed("full", 10.0), timed("streaming", 36.0, lying), timed("h2o", 10.1, interval(1.01, 0.01))
    )
    assert not any("Fastest decode: streaming" in line for line in found.verdict)
    assert bold(found, "decode_tok_s") == []
    (table,) = found.headline
    row = next(row for row in table.rows if row[0].text.startswith("streaming"))
    assert row[-1].mark == "bad"
    assert "impossible" in row[-1].text
    assert not [claim for claim in found.claims if claim.metric in ("decode_tok_s", "speedup")]


def test_a_busy_machine_gets_no_word_on_speed(tmp_path: Path) -> None:
    quiet = report(tmp_path / "a", timed("full", 10.0), timed("h2o", 14.0))
    assert quiet.verdict[0].startswith("Fastest decode: h2o@0.2")
    assert bold(quiet, "decode_tok_s") == ["h2o"]
    assert [(claim.word, claim.metric, claim.processes) for claim in quiet.claims] == [("best", "decode_tok_s", 2)]
    busy = report(tmp_path / "b", timed("full", 10.0, busy=True), timed("h2o", 14.0, busy=True))
    assert not any("Fastest" in line for line in busy.verdict)
    assert any("no verdict on" in line for line in busy.warnings)
    assert bold(busy, "decode_tok_s") == []
    assert busy.claims == ()


def test_a_sentence_on_speed_says_that_it_rests_on_one_process(tmp_path: Path) -> None:
    found = report(tmp_path, timed("full", 10.0, processes=1), timed("h2o", 14.0, processes=1))
    assert found.verdict[0].endswith(", measured in one process.")


def test_equal_bytes_share_the_first_place_only_before_others(tmp_path: Path) -> None:
    cells = [timed("full", 10.0), timed("h2o", 10.0), timed("d2o", 10.0)]
    assert bold(report(tmp_path / "same", *cells), "kv_bytes") == []
    big = made.record(cells[0].axes, values=cells[0].values | {"kv_bytes": Value(500.0)})
    found = report(tmp_path / "big", big, *cells[1:])
    assert bold(found, "kv_bytes") == ["h2o", "d2o"]
    assert {claim.others for claim in found.claims} == {(big.id,)}


def test_a_record_of_schema_1_shows_few_rounds_as_a_range(tmp_path: Path) -> None:
    """Bounds that were called a 95 % interval over two rounds were a bootstrap's, which covers half of the time."""
    values = {"decode_tok_s": Value(12.0, 11.9, 12.1, 2), "tpot_s": Value(0.1, 0.09, 0.11, 62), "kv_bytes": Value(5.0)}
    old = made.record(made.axes("speed", "h2o", "0.2", **SHAPE), values=values, details={"rounds": 2}, schema=1)
    full = made.record(
        made.axes("speed", "full", None, **SHAPE), values={"decode_tok_s": Value(10, 9.9, 10.1, 20)}, schema=1
    )
    found = report(tmp_path, old, full)
    (cell, other) = read_run(tmp_path).cells
    assert (cell.values["decode_tok_s"].kind, cell.values["tpot_s"].kind, cell.values["tpot_s"].n) == (
        "range",
        "range",
        2,
    )
    assert other.values["decode_tok_s"].kind == "interval"
    (table,) = found.headline
    texts = [field.interval for row in table.rows for field in row]
    assert "11.9 … 12.1 (range of 2)" in texts
    assert "9.9 … 10.1" in texts
    assert found.verdict[0] == "Fastest decode: the policies were not told apart."
    assert any("too few samples" in line for line in found.reading)


def quality(policy: str, kl: Value) -> CellRecord:
    return made.record(made.axes("fidelity", policy, None if policy == "full" else "0.2"), values={"kl": kl})


def starred(found: Report) -> set[str]:
    names = [column.key for column in found.headline[0].columns]
    policies = (row[names.index("policy")].text for row in found.headline[0].rows)
    return {policy.removesuffix(" ◆") for policy in policies if policy.endswith(" ◆")}


def test_every_star_is_a_claim_that_the_study_of_quick_can_judge(tmp_path: Path) -> None:
    """h2o holds as many bytes as d2o and loses more; tova holds fewer, and its interval reaches over d2o's."""
    sizes = {"full": 500.0, "h2o": 100.0, "d2o": 100.0, "tova": 50.0}
    losses = {"h2o": interval(0.5, 0.02), "d2o": interval(0.1, 0.02), "tova": interval(0.4, 0.3)}
    speed = [made.record(timed(name, 10.0).axes, values={"kv_bytes": Value(size)}) for name, size in sizes.items()]
    loss = {name: quality(name, one) for name, one in losses.items()}
    found = report(tmp_path, *speed, quality("full", Value(None)), *loss.values())
    claims = {claim.cell: claim for claim in found.claims if claim.word == "undominated"}
    assert starred(found) == {"tova"}
    assert list(claims) == [loss["tova"].id]
    assert claims[loss["tova"].id].others == ()
    clear = [*speed, quality("full", Value(None)), loss["h2o"], loss["d2o"], quality("tova", interval(0.4, 0.02))]
    found = report(tmp_path / "clear", *clear)
    claims = {claim.cell: claim for claim in found.claims if claim.word == "undominated"}
    assert starred(found) == {"full", "d2o", "tova"}
    mine = claims[loss["d2o"].id]
    assert set(mine.others) == {loss["h2o"].id, loss["tova"].id}
    known = losses["d2o"]
    assert (mine.metric, mine.lo, mine.hi, mine.comparisons) == ("kl", known.lo, known.hi, 4)
    lie = {(loss["d2o"].id, "kl"): interval(0.6, 0.01), (loss["h2o"].id, "kl"): interval(0.5, 0.01)}
    assert excluded(msgspec.structs.replace(mine, lo=None, hi=None), lie)


def test_policies_that_are_never_the_best_choice_are_named(tmp_path: Path) -> None:
    """random loses to any other at both budgets. h2o loses at both to d2o: by its own interval at one, and at the other
    by the difference on the same items. tova does at one budget only. What quest holds in truth is more, so it beats
    nobody; and nobody who holds more beats streaming at its smallest budget."""
    losses = {
        ("random", "0.2"): interval(5.0, 0.1), ("random", "0.4"): interval(4.0, 0.1),
        ("streaming", "0.1"): interval(0.9, 0.02), ("streaming", "0.2"): interval(0.8, 0.02),
        ("h2o", "0.2"): interval(0.5, 0.02), ("h2o", "0.4"): interval(0.3, 0.1),
        ("tova", "0.2"): interval(0.5, 0.02), ("tova", "0.4"): interval(0.3, 0.1),
        ("quest", "0.2"): interval(0.1, 0.02), ("quest", "0.4"): interval(0.05, 0.02),
        ("d2o", "0.2"): interval(0.3, 0.02), ("d2o", "0.4"): interval(0.25, 0.1),
    }  # fmt: skip
    cells = []
    for (policy, budget), loss in losses.items():
        more = policy == "quest"
        values = {"kl": loss, "budget_effective": Value(1.0 if more else float(budget))}
        if (policy, budget) == ("d2o", "0.4"):
            values |= {"kl_rival:h2o": interval(-0.05, 0.002), "kl_rival:tova": interval(-0.05, 0.09)}
        flags = ("keeps more than asked",) if more else ()
        cells.append(made.record(made.axes("fidelity", policy, budget), values=values, flags=flags))
    found = report(tmp_path, *cells)
    (line,) = [line for line in found.verdict if "at every budget" in line]
    assert line == (
        "On fidelity, at every budget, another policy with the same or a smaller one is shown to be better than random "
        "and h2o."
    )
    known = {cell.id: cell.values["kl"] for cell in cells}
    best = [claim for claim in found.claims if claim.word == "best" and len(claim.others) == 1]
    assert {claim.others[0] for claim in best} >= {cells[0].id, cells[1].id, cells[4].id}
    assert all(known[claim.cell].value < known[claim.others[0]].value for claim in best)
    (pair,) = [claim for claim in found.claims if claim.metric == "kl_rival:h2o" and claim.comparisons == 14]
    assert (pair.word, pair.cell) == ("better", cells[-1].id)


def test_quality_is_drawn_against_the_budget_where_no_bytes_were_measured(tmp_path: Path) -> None:
    cells = [
        made.record(
            made.axes("fidelity", policy, budget),
            values={"kl": interval(loss / float(budget), 0.01), "budget_effective": Value(float(budget))},
        )
        for policy, loss in (("h2o", 0.1), ("d2o", 0.2))
        for budget in ("0.2", "0.5")
    ]
    found = report(tmp_path, quality("full", Value(None)), *cells)
    (figure,) = [figure for figure in found.figures if figure.kind == "budgets"]
    shown = [(row[1], row[3], round(float(row[4]), 6)) for row in figure.rows]
    assert shown == [("h2o", 20.0, 0.5), ("h2o", 50.0, 0.2), ("d2o", 20.0, 1.0), ("d2o", 50.0, 0.4)]
    drawn = charts.svg(figure)
    assert "budget, % of the prompt" in drawn and "d2o" in drawn
    speed = made.record(timed("h2o", 10.0).axes, values={"kv_bytes": Value(100.0)})
    assert not [one for one in report(tmp_path / "timed", speed, *cells[:2]).figures if one.kind == "budgets"]
    assert not [one for one in report(tmp_path / "one", *cells[:2]).figures if one.kind == "budgets"]


def test_what_merging_by_mass_is_worth_is_said_of_each_policy(tmp_path: Path) -> None:
    pairs = {"h2o": "h2o(merge=mass,equal=bytes)", "adakv(score=h2o)": "adakv(score=h2o(merge=mass))"}
    pairs |= {"snapkv(decode=slide)": "snapkv(decode=slide,merge=mass)"}
    assert all(without_mass(merged) == plain == without_mass(plain) for plain, merged in pairs.items())
    cells = []
    for budget in ("0.2", "0.4"):
        for number, (plain, merged) in enumerate(pairs.items()):
            change = {f"kl_rival:{plain}": interval(-0.1 + 0.095 * number, 0.01)}
            cells.append(made.record(made.axes("fidelity", plain, budget), values={"kl": interval(0.5, 0.1)}))
            cells.append(made.record(made.axes("fidelity", merged, budget), values={"kl": interval(0.4, 0.1)} | change))
    found = report(tmp_path, *cells)
    (line,) = [line for line in found.verdict if "merging by mass" in line]
    assert line == (
        "On fidelity, merging by mass what is evicted changes KL to full of h2o@0.2 by -0.1000 nats/token (95 % "
        "interval -0.1100 … -0.0900); adakv(score=h2o)@0.2 by -0.0050 nats/token (95 % interval -0.0150 … 0.0050); and "
        "snapkv(decode=slide)@0.2 by +0.0900 nats/token (95 % interval 0.0800 … 0.1000)."
    )
    told = {claim.metric: claim.word for claim in found.claims if claim.metric.startswith("kl_rival")}
    assert told == {"kl_rival:h2o": "better", "kl_rival:snapkv(decode=slide)": "worse"}


def test_where_the_other_side_of_a_ratio_was_busy_nothing_is_said_of_it(tmp_path: Path) -> None:
    goals = [{"metric": "speedup", "policy": "d2o", "at_least": 1.1}, {"metric": "kv_bytes", "at_most": 200}]
    cells = [timed("full", 10.0, busy=True), timed("d2o", 15.0, interval(1.5, 0.01))]
    wide = {"speedup_largest": Value(9.0)}
    cells[1] = made.record(cells[1].axes, values=cells[1].values | wide, details={"processes": 2})
    found = report(tmp_path, *cells, suite={"targets": goals})
    assert [row[-1].text for row in found.targets[0].rows] == ["no verdict", "met", "met"]
    assert not any("times as fast" in line for line in found.verdict)
    assert "There is no verdict on speed, because the machine was busy." in " ".join(found.verdict)
    assert {claim.word for claim in found.claims if claim.metric == "speedup"} == set()
    assert found.headline[0].rows[1][-1].text == "no verdict"


def test_every_sentence_on_time_says_that_it_rests_on_one_process(tmp_path: Path) -> None:
    mine = timed("d2o", 12.0)
    ratios = {"prefill_cost": interval(1.3, 0.01), "decode_rival:h2o": interval(1.2, 0.01)}
    mine = made.record(mine.axes, values=mine.values | ratios, details={"processes": 1})
    found = report(tmp_path, timed("full", 10.0), timed("h2o", 10.0), mine)
    first, second = found.verdict[:2]
    assert (
        "takes 1.300 times as long to the first token (95 % interval 1.290 … 1.310, measured in one process)" in first
    )
    assert "decodes faster than h2o (1.200 ×, 95 % interval 1.190 … 1.210, measured in one process)" in second


def test_the_full_cache_counts_neither_as_beaten_in_quality_nor_as_told_apart(tmp_path: Path) -> None:
    """A score of the full cache stands in the table, but quality is measured against it."""
    scores = {"full": interval(0.9, 0.01), "h2o": interval(0.5, 0.2), "tova": interval(0.55, 0.2)}
    cells = [
        made.record(made.axes("recall", name, None if name == "full" else "0.2"), values={"score": one})
        for name, one in scores.items()
    ]
    found = report(tmp_path / "near", *cells)
    assert found.verdict == ("Least loss of quality on recall: the policies were not told apart.",)
    apart = made.record(cells[1].axes, values={"score": interval(0.1, 0.01)})
    found = report(tmp_path / "apart", cells[0], apart, cells[2])
    assert found.verdict[0].startswith("Least loss of quality on recall: tova@0.2 with 55.0 %")
    assert [(claim.word, claim.others) for claim in found.claims] == [("best", (apart.id,))]


def test_a_sentence_that_names_a_leader_beside_others_is_a_claim_about_the_rest(tmp_path: Path) -> None:
    found = report(tmp_path, timed("full", 10.0), timed("h2o", 14.0), timed("tova", 14.1))
    assert "tova@0.2 with 14.1 tok/s" in found.verdict[0]
    assert found.verdict[0].endswith("not told apart from it: h2o@0.2.")
    (claim,) = [claim for claim in found.claims if claim.metric == "decode_tok_s"]
    assert (claim.word, claim.others) == ("best", ("speed/embedded/float32/cpu/full/256+16/b2/s0",))
    assert bold(found, "decode_tok_s") == []


def test_sentences_about_leaders_are_widened_for_all_of_them(tmp_path: Path) -> None:
    """Rates that are told apart if nothing else is said, but not beside sentences on waiting and on quality."""
    rates = {"full": 10.0, "tova": 10.0, "h2o": 10.65}
    alone = [timed(name, rate) for name, rate in rates.items()]
    assert report(tmp_path / "alone", *alone).verdict[0].startswith("Fastest decode: h2o@0.2")
    waiting = {"ttft_s": interval(1.0, 0.1)}
    more = [made.record(one.axes, values=one.values | waiting, details=one.details) for one in alone]
    found = report(tmp_path / "more", *more, *(quality(name, interval(0.2, 0.1)) for name in ("h2o", "tova")))
    assert found.verdict[0] == "Fastest decode: the policies were not told apart."


def test_a_figure_of_one_sample_says_so(tmp_path: Path) -> None:
    found = report(tmp_path, timed("full", 10.0), timed("d2o", 10.0), quality("d2o", Value(0.25)))
    assert (
        "moves the next-token distribution by a KL of 0.2500 nats/token (one sample, so no interval)"
        in found.verdict[0]
    )


def test_every_bold_figure_is_a_claim(tmp_path: Path) -> None:
    found = build([made.usual(tmp_path)])
    claims = {(claim.metric, claim.cell) for claim in found.claims if claim.word == "best"}
    bold_ones = 0
    for table in (*found.headline, *found.tables):
        names = [column.key for column in table.columns]
        for row in table.rows:
            policy = row[names.index("policy")].text.removesuffix(" ◆")
            budget = f"@{row[names.index('budget')].text}" if policy != "full" else ""
            for name, field in zip(names, row, strict=True):
                if field.mark == "best":
                    bold_ones += 1
                    metric = name.rpartition(":")[2]
                    assert any(one == metric and f"/{policy}{budget}" in cell for one, cell in claims), (policy, metric)
    assert bold_ones > 4


def test_a_form_of_d2o_that_does_better_is_named_at_the_level_of_all_comparisons(tmp_path: Path) -> None:
    def cells(form: Value) -> list[CellRecord]:
        found = {
            "d2o": interval(0.2, 0.05),
            "d2o(preset=mass)": form,
            "d2o(preset=mass,heads=true)": interval(-0.1, 0.2),
        }
        own = [
            made.record(
                quality(name, interval(0.5, 0.1)).axes, values={"kl": interval(0.5, 0.1), "kl_rival:h2o": value}
            )
            for name, value in found.items()
        ]
        return [*own, quality("h2o", interval(0.3, 0.1)), quality("full", Value(0.0))]

    better = cells(interval(-0.1, 0.02))
    found = report(tmp_path / "better", *better)
    assert (
        "Of the other forms of D2O, d2o(preset=mass) with budget 0.2 loses less quality than h2o "
        "(fidelity: KL -0.1000 nats/token, 95 % interval -0.1200 … -0.0800)." in found.verdict
    )
    assert ("better", better[1].id, 3) in [(claim.word, claim.cell, claim.comparisons) for claim in found.claims]
    # clear of zero at 95 %, but not where three comparisons have to be right together
    found = report(tmp_path / "near", *cells(interval(-0.1, 0.095)))
    assert not any("other forms" in line for line in found.verdict)
    assert [claim.cell for claim in found.claims if claim.metric == "kl_rival:h2o"] == [better[0].id]
