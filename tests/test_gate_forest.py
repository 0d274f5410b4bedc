"""The forest plot: which rows are drawn, where their bands stand, and what the page and the folder hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2obench.cli.gate import show
from d2obench.errors import UsageError
from d2obench.gate.rules import judge_bounded, judge_exact, judge_sampled, judge_timed
from d2obench.gate.verdict import Row, Verdict, Verdicts, gather
from d2obench.report.charts import spec, svg
from d2obench.report.render import draw
from d2obench.report.render.html import html
from d2obench.report.verdicts import MAX_POINTS, forest, view

BASE = [0.0100 + 0.0001 * (i % 3) for i in range(24)]


def found() -> Verdicts:
    """A slower cell, an equal one, a larger peak, exact figures with and without a change, and quality."""
    items = {f"i{i}": 0.1 + 0.001 * i for i in range(20)}
    worse = {key: value + 0.05 for key, value in items.items()}
    rows = [
        judge_timed("speed/d2o@0.2/b2", "tpot_s", BASE, [1.2 * x for x in BASE], 0.05),
        judge_timed("speed/full/b2", "tpot_s", BASE, BASE, 0.05),
        judge_bounded("speed/full/b2", "rss_peak_bytes", 100.0, 90.0, 0.02),
        judge_exact("speed/full/b2", "kv_bytes", 100, 100),
        judge_exact("speed/d2o@0.2/b2", "kv_bytes", 100, 110),
        judge_exact("speed/d2o@0.2/b2", "tokens_digest", "a", "b"),
        judge_sampled("fidelity/d2o@0.2", "kl", items, worse, 0.02),
    ]
    return gather("gate ci", "abc", "work tree", rows)


def page_of(verdicts: Verdicts) -> str:
    page = view(verdicts)
    return html(page, draw(page))


def test_points_and_bands() -> None:
    ratio, quality = forest(found())
    records = {(row["cell"], row["metric"]): row for row in ratio.records()}
    slower = records["speed/d2o@0.2/b2", "tpot_s"]
    assert slower["value"] == pytest.approx(1.2)
    assert slower["lo"] <= slower["value"] <= slower["hi"]
    assert (slower["least"], slower["most"]) == (round(1 / 1.05, 6), 1.05)
    assert records["speed/full/b2", "tpot_s"]["value"] == pytest.approx(1.0)
    assert records["speed/d2o@0.2/b2", "kv_bytes"]["value"] == pytest.approx(1.1)
    assert records["speed/full/b2", "rss_peak_bytes"]["lo"] is None
    assert ("speed/full/b2", "kv_bytes") not in records  # exact and equal: nothing to draw
    assert ("speed/d2o@0.2/b2", "tokens_digest") not in records
    (kl,) = quality.records()
    assert (kl["value"], kl["least"], kl["most"]) == (pytest.approx(2.5), -1.0, 1.0)


def test_worst_first() -> None:
    ratio, _ = forest(found())
    verdicts = [Verdict(row["verdict"]).severity for row in ratio.records()]
    assert verdicts == sorted(verdicts)
    drawn = spec(ratio)
    order = next(layer["encoding"]["y"]["sort"] for layer in drawn["layer"] if "y" in layer["encoding"])
    assert order == [row["label"] for row in ratio.records()]


def test_the_spec_draws_band_interval_point_and_no_change() -> None:
    ratio, quality = forest(found())
    drawn = spec(ratio)
    marks = {layer["mark"]["type"]: layer["encoding"] for layer in drawn["layer"][:3]}
    assert (marks["bar"]["x"]["field"], marks["bar"]["x2"]["field"]) == ("least", "most")
    assert (marks["rule"]["x"]["field"], marks["rule"]["x2"]["field"]) == ("lo", "hi")
    assert marks["point"]["x"]["field"] == "value"
    assert marks["point"]["x"]["scale"]["type"] == "log"
    assert drawn["layer"][3]["encoding"]["x"]["datum"] == 1.0
    assert spec(quality)["layer"][3]["encoding"]["x"]["datum"] == 0.0
    assert "speed/d2o@0.2/b2 · TPOT" in svg(ratio).replace("&amp;", "&")


def test_nothing_to_draw_is_no_figure() -> None:
    same = gather("gate", "a", "b", [Row("c", "status", Verdict.OK, "exact", "ok", "ok")])
    assert forest(same) == []
    assert "<figure" not in page_of(same)


@pytest.mark.parametrize("effect", [float("inf"), float("nan"), -1.0])
def test_numbers_no_axis_can_show_are_left_to_the_table(effect: float) -> None:
    assert forest(gather("gate", "a", "b", [Row("c", "tpot_s", Verdict.REGRESSED, "exact", 1.0, 2.0, effect)])) == []


def test_many_rows_and_long_names_stay_apart() -> None:
    rows = [judge_bounded(f"{'x' * 300}{i}", "rss_peak_bytes", 100.0, 100.0 + i, 0.02) for i in range(MAX_POINTS + 9)]
    (ratio,) = forest(gather("gate", "a", "b", rows))
    labels = [row["label"] for row in ratio.records()]
    assert len(set(labels)) == MAX_POINTS
    assert "9 more rows" in ratio.about
    assert len({row["label"] for row in spec(ratio)["data"]["values"]}) == MAX_POINTS


def test_hostile_names_do_no_harm() -> None:
    name = "<script>alert(1)</script>|\n\u202e" + "\"'`"
    (ratio,) = forest(gather("gate", "a", "b", [judge_bounded(name, "rss_peak_bytes", 100.0, 150.0, 0.02)]))
    assert "<script" not in svg(ratio)
    page = page_of(gather(name, name, name, [judge_bounded(name, "rss_peak_bytes", 100.0, 150.0, 0.02)]))
    assert "<script>alert" not in page
    assert "\u202e" not in page


def test_files_of_a_folder(tmp_path: Path, capsys: Any) -> None:
    show(found(), ["json", "markdown", "html"], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"verdicts.json", "verdicts.md", "verdicts.html", "comment.md", "figures"}
    pictures = {path.name for path in (tmp_path / "figures").iterdir() if path.suffix == ".svg"}
    assert pictures == {"forest-ratio.svg", "forest-quality.svg"}
    assert "](figures/forest-ratio.svg)" in (tmp_path / "verdicts.md").read_text()
    assert "forest-ratio.svg" not in (tmp_path / "comment.md").read_text()  # a comment has no files beside it
    page = (tmp_path / "verdicts.html").read_text()
    assert page.count("<figure ") == 2
    assert "+20.0 %" in page
    assert len(page) < 3_000_000
    assert json.loads((tmp_path / "verdicts.json").read_text())["verdict"] == "REGRESSED"


def test_an_unknown_format_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'pdf'"):
        show(found(), ["json", "pdf"], tmp_path)
    assert list(tmp_path.iterdir()) == []
