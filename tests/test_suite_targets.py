"""Targets: what a suite may promise, how a figure is judged, where it is shown; ratios between the caches of a run."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import report_runs as made
from hypothesis import given
from hypothesis import strategies as st
from test_suite import GOOD, write

from d2obench.errors import SuiteError
from d2obench.record import Value, dump, read_run, write_atomic
from d2obench.report import build, write_report
from d2obench.run.plan import cells
from d2obench.stats.claims import outcome
from d2obench.stats.intervals import paired_ratio
from d2obench.suite.definition import Target, load_suite

SHAPE: dict[str, Any] = {"shape": "256+16", "batch": 2}


def goal(**more: Any) -> Target:
    return Target(**({"metric": "speedup"} | more))


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 1), st.floats(0, 1))
def test_a_margin_has_the_sign_of_the_side(value: float, bound: float, below: float, above: float) -> None:
    figure = Value(value, value - below, value + above, 9, kind="interval", df=8)
    for target in (goal(at_least=bound), goal(at_most=bound)):
        margin = target.margin(value)
        said = outcome("kl", figure, target.at_least, target.at_most)
        if said == "met":
            assert margin >= 0
        if said == "missed":
            assert margin < 0


def test_a_bound_is_said_as_its_metric_is_shown() -> None:
    assert goal(at_least=1.5).bound == "≥ 1.500 × full"
    assert goal(metric="mbu", at_least=0.7).bound == "≥ 70.0 %"
    assert goal(metric="sampled_error", at_least=0.97, at_most=1.03).bound == "0.970 … 1.030 ×"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('metric = "spedup", at_least = 1', "no metric is called 'spedup'"),
        ('metric = "speedup"', "has no bound"),
        ('metric = "speedup", at_least = 2, at_most = 1', "at_least above at_most"),
        ('metric = "speedup", at_least = "2"', "targets"),
        ('metric = "speedup", above = 2', "targets"),
        ('metric = "speedup", policy = "d20", at_least = 2', "no cell of the suite is targets"),
        ('metric = "speedup", shape = "64+9", at_least = 2', "no cell of the suite is targets"),
        ('metric = "speedup", budget = 2.5, at_least = 2', "budget 2.5 is out of range"),
        ('metric = "speedup", shape = "64", at_least = 2', "can't read the shape"),
    ],
)
def test_a_wrong_target_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, f"targets = [{{ {text} }}]\n{GOOD}")
    with pytest.raises(SuiteError, match=said) as caught:
        load_suite(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_excluded_cells_are_not_run_and_other_axes_may_lose_a_target(tmp_path: Path) -> None:
    text = 'exclude = [{ policy = "full" }]\ntargets = [{ metric = "kv_bytes", policy = "d2o", at_most = 9 }]\n'
    path = write(tmp_path, text + GOOD)
    assert {cell.axes.policy for cell in cells(load_suite(path))} == {"d2o"}
    assert {cell.axes.policy for cell in cells(load_suite(path, {"axes.policy": "h2o"}))} == {"h2o"}
    with pytest.raises(SuiteError, match="excludes every cell"):
        cells(load_suite(path, {"axes.policy": "full"}))
    with pytest.raises(SuiteError, match="no cell of the suite is exclude"):
        load_suite(write(tmp_path, text.replace('"full"', '"streaming"') + GOOD))


def timed_run(folder: Path, goals: list[dict[str, Any]]) -> Path:
    """Full, a yardstick, streaming and h2o, each with its peaks; d2o ran out of memory."""
    draw = random.Random(5)
    full, rounds = made.speed_cell(folder, made.axes("speed", "full", **SHAPE), None, draw)
    found = [full]
    for policy, budget in (("hf-static", None), ("sdpa-static", None), ("streaming", "0.2"), ("h2o", "0.2")):
        found.append(made.speed_cell(folder, made.axes("speed", policy, budget, **SHAPE), rounds, draw)[0])
    for number, cell in enumerate(found):
        path = folder / str(cell.samples)
        data = json.loads(path.read_bytes())
        for one in data["rounds"]:
            peak = {"rss_bytes": 1000 + 10 * number}
            one["peaks"] = {"prefill": peak, "compress": {"rss_bytes": 5}, "decode": {"rss_bytes": 9999}}
        write_atomic(path, dump(data))
    found.append(made.record(made.axes("speed", "d2o", "0.2", **SHAPE), "oom", reason="out of memory in prefill"))
    return made.write_run(folder, "promised", found, suite={"about": "x", "targets": goals})


GOALS = [
    {"metric": "to_streaming", "policy": "h2o", "at_least": 0.97},
    {"metric": "speedup", "policy": "streaming", "at_least": 1.2},
    {"metric": "speedup", "policy": "d2o", "at_least": 1.2},
    {"metric": "unheard of", "policy": "d2o", "at_least": 1.2},
]


@pytest.fixture(scope="module")
def promised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = timed_run(tmp_path_factory.mktemp("promised"), GOALS[:3])
    write_report(build([folder]), folder, ("csv", "md", "html", "json", "github"))
    return folder


def test_ratios_are_paired_within_their_round(promised: Path) -> None:
    rounds = {
        cell.axes.policy: json.loads((promised / str(cell.samples)).read_bytes())["rounds"]
        for cell in read_run(promised).cells
        if cell.samples
    }
    decode = {policy: [one["decode_s"] for one in several] for policy, several in rounds.items()}
    found = {(row.policy, row.metric): row for row in build([promised]).results}
    streaming = found["h2o", "to_streaming"]
    assert streaming.value == pytest.approx(paired_ratio(decode["h2o"], decode["streaming"]).value)
    assert streaming.lo is not None and streaming.lo <= streaming.value <= (streaming.hi or 0)
    library = [paired_ratio(decode["full"], decode[name]) for name in ("hf-static", "sdpa-static")]
    best, alone = found["full", "to_library"], min(library, key=lambda one: one.value or 0.0)
    assert best.value == pytest.approx(alone.value)
    assert best.lo is not None and alone.lo is not None and best.lo < alone.lo  # both were compared, so it is wider
    assert found["full", "to_library"].note.endswith(("is hf-static.", "is sdpa-static."))
    assert found["h2o", "prefill_peak_cost"].value == pytest.approx(1.04)
    assert ("full", "to_streaming") not in found
    assert ("streaming", "to_streaming") not in found


def test_targets_stand_in_every_view(promised: Path) -> None:
    report = build([promised])
    (table,) = report.targets
    assert [row[-1].text for row in table.rows] == ["missed", "met", "not measured"]
    assert table.rows[2][2].text == "OOM"
    assert "1 met, 1 missed (decode, ÷ streaming of h2o@0.2" in report.verdict[0]
    rows = list(csv.DictReader((promised / "targets.csv").open(encoding="utf-8")))
    assert [row["outcome"] for row in rows] == ["missed", "met", "not measured"]
    assert rows[0]["measured_lo"] <= rows[0]["measured"] <= rows[0]["measured_hi"]
    for name in ("report.md", "report.html", "summary.md", "report.json"):
        text = (promised / name).read_text("utf-8")
        assert "≥ 0.970 × streaming" in text
        assert "not measured" in text
        assert "Targets of the suite" in text


def test_a_suite_without_targets_shows_none(tmp_path: Path) -> None:
    folder = timed_run(tmp_path, [])
    written = write_report(build([folder]), folder, ("csv",))
    assert build([folder]).targets == ()
    assert "targets.csv" not in {path.name for path in written}


def test_targets_of_a_record_that_can_not_be_read_are_passed_over(tmp_path: Path) -> None:
    assert build([timed_run(tmp_path / "a", [{"metric": 7}])]).targets == ()
    assert len(build([timed_run(tmp_path / "b", GOALS)]).targets[0].rows) == 3


def test_a_resolved_suite_is_toml_again(promised: Path) -> None:
    import tomllib

    (_, text) = build([promised]).suites[0]
    assert tomllib.loads(text)["targets"] == GOALS[:3]


def test_a_suite_is_recorded_with_its_targets(tmp_path: Path) -> None:
    path = write(tmp_path, 'targets = [{ metric = "kv_bytes", policy = "d2o", at_most = 9 }]\n' + GOOD)
    told = msgspec.to_builtins(load_suite(path))
    assert list(told["targets"]) == [{"metric": "kv_bytes", "policy": "d2o", "at_most": 9.0}]
