"""What a report may say: bold, stars and sentences of made-up runs on a busy, a lying and a quiet machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import report_runs as made

from d2obench.record import CellRecord, Value, read_run
from d2obench.report import build
from d2obench.report.view import Report

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
