"""The report's promises: what it says is in the CSV, the same bytes twice, no input makes it fall over or misbehave."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_runs as made
from rich.console import Console

from d2obench.cli import main
from d2obench.errors import RecordError, UsageError
from d2obench.metric import METRICS
from d2obench.record import Bounded, CellRecord, Value, append_cell, dump, read_run, write_atomic
from d2obench.report import FORMATS, build, charts, write_report
from d2obench.report.derive import rescore
from d2obench.report.publish import publish
from d2obench.report.render import render
from d2obench.report.render.console import WIDTH, show_report, show_table
from d2obench.report.view import Report
from d2obench.stats.ratios import RATIOS

NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
EVIL = (
    "<script>alert(1)</script>",
    "a|b`c*d_e[f](g)#h&amp;@everyone",
    "two\nlines\rand\ttabs",
    "x" * 300,
    "\u202eright to left\u202c",
    "=HYPERLINK(1)",
    "</script><img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "\x1b[31mred\x00nul\u2028",
    "{{ 7*7 }}{% raw %}${x}",
)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all its views."""
    folder = made.usual(
        tmp_path_factory.mktemp("runs") / "quick", shapes=("512+24",), batches=(1, 4), tasks=("fidelity", "needle")
    )
    write_report(build([folder]), folder, FORMATS)
    return folder


def views(folder: Path) -> dict[str, bytes]:
    """Every file but the records."""
    files = [path for path in folder.rglob("*") if path.is_file() and "samples" not in path.parts]
    kept = [path for path in files if path.name not in ("run.json", "cells.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


class Page(HTMLParser):
    """What a browser would make of the page: tags with attributes, table fields, list items."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.fields: list[str] = []
        self.items: list[str] = []
        self._open: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "li"):
            self._open = [self.fields if tag == "td" else self.items]
            self._open[0].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "li"):
            self._open = []

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[0][-1] += f" {data}"


def numbers(texts: Iterator[str] | list[str]) -> set[str]:
    return {number.lstrip("+-") for text in texts for number in NUMBER.findall(text)}


def in_files(folder: Path) -> set[str]:
    """Every number of every CSV, and of run.json."""
    files = [*folder.glob("*.csv"), *folder.glob("figures/*.csv")]
    rows = [row for path in files for row in csv.reader(path.open(newline="", encoding="utf-8"))]
    return numbers([field for row in rows for field in row]) | numbers([(folder / "run.json").read_text("utf-8")])


def rounded(folder: Path) -> set[str]:
    """The numbers of the first table, which have three digits, and of definitions."""
    report = build([folder])
    fields = [field for table in (*report.headline, *report.glossary) for row in table.rows for field in row]
    return numbers([word for field in fields for word in (field.text, field.lo, field.hi, field.half)])


def test_every_number_of_the_page_is_in_a_csv(usual: Path) -> None:
    page = Page((usual / "report.html").read_text("utf-8"))
    known = in_files(usual) | {"24.0"} | rounded(usual)  # memory_bytes of run.json in GiB
    said = [text for text in page.items if not text.strip().startswith(("±", "↓", "◆", "–"))]
    assert len(page.fields) > 500
    assert sorted(numbers(page.fields) - known) == []
    assert sorted(number for number in numbers(said) - known if "." in number) == []


def test_every_number_of_the_markdown_is_in_a_csv(usual: Path) -> None:
    text = (usual / "report.md").read_text("utf-8").replace("\\", "")
    fields = [field for line in text.splitlines() if line.startswith("| ") for field in line.split("|")[1:-1]]
    headers = {column.title for table in build([usual]).headline for column in table.columns}
    assert len(fields) > 500
    shown = [field for field in fields if field.strip() not in headers and "top-1" not in field and "p95" not in field]
    assert sorted(numbers(shown) - in_files(usual) - {"24.0"} - rounded(usual)) == []


def test_first_table_says_what_the_records_say_in_three_digits(usual: Path) -> None:
    report, run = build([usual]), read_run(usual)
    (table,) = report.headline
    assert len(table.columns) <= 9
    places = {column.key: place for place, column in enumerate(table.columns)}
    assert {"policy", "budget", "kl", "kv_bytes", "ttft_s", "decode_tok_s", "speedup"} <= set(places)
    assert len(table.rows) == 14
    for row in table.rows:
        axes = {key: row[places[key]].text for key in ("setting", "budget")}
        policy = row[places["policy"]].text.removesuffix(" ◆")
        (found,) = [
            cell
            for cell in run.cells
            if cell.axes.task == "speed" and cell.axes.policy == policy and (cell.axes.budget or "–") == axes["budget"]
            if f"batch {cell.axes.batch}" == axes["setting"]
        ]
        for key in ("kv_bytes", "decode_tok_s", "ttft_s"):
            value = found.values[key].value
            assert value is not None
            text = row[places[key]].text.replace(",", "")
            assert float(text) == pytest.approx(value * METRICS[key].scale, rel=0.006)
            assert len(text.replace(".", "").lstrip("0")) <= 4


@pytest.mark.parametrize("batches", [(4,), (1, 4)])
def test_first_table_fits_a_hundred_columns(tmp_path: Path, batches: tuple[int, ...]) -> None:
    console = Console(file=io.StringIO(), width=300, color_system=None)
    for table in build([made.usual(tmp_path, batches=batches)]).headline:
        show_table(table, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) > 14
    assert max(len(line.rstrip()) for line in lines) <= 100


def test_quality_stands_beside_the_speed_of_its_own_shape(tmp_path: Path) -> None:
    """Fidelity has a shape and joins it at every batch; recall here has none and joins every row of its policy."""
    figures = {"512+24": 0.1, "1024+24": 0.2}
    cells = []
    for shape, kl in figures.items():
        for batch in (1, 4):
            point = made.axes("speed", "h2o", "0.2", shape=shape, batch=batch)
            cells.append(made.record(point, values={"kv_bytes": Value(2**20 * batch)}))
        cells.append(made.record(made.axes("fidelity", "h2o", "0.2", shape=shape), values={"kl": Value(kl)}))
    cells.append(made.record(made.axes("recall", "h2o", "0.2"), values={"score": Value(0.5)}))
    cells.append(made.record(made.axes("fidelity", "h2o", "0.4", shape="512+24"), values={"kl": Value(0.3)}))
    table = build([made.write_run(tmp_path / "run", "joined", cells)]).tables[0]
    keys = [column.key for column in table.columns]
    rows = [{key: entry.text for key, entry in zip(keys, row, strict=True)} for row in table.rows]
    assert len(rows) == 5
    for row in rows[:-1]:
        if row["budget"] == "0.2":
            assert row["kl"] == f"{figures[row['shape']]:.4f}"
            assert row["score"] == "50.0"
            assert row["kv_bytes"] == f"{float(row['batch']):.2f}"
    alone = next(row for row in rows if row["budget"] == "0.4")
    assert (alone["kl"], alone["batch"], alone["kv_bytes"]) == ("0.3000", "–", "–")


def test_a_row_says_whether_its_questions_were_seen(tmp_path: Path) -> None:
    folder = made.usual(tmp_path / "run", batches=(1,), tasks=("needle", "needle(query=unseen)"))
    found = build([folder])
    titles = [column.title for table in (*found.headline, *found.tables) for column in table.columns]
    assert any("needle, question unseen" in title for title in titles)
    assert any("needle(query=unseen)" in title for title in titles)
    assert any("compressed before its question was read" in line for line in found.reading)
    alone = build([made.usual(tmp_path / "alone", batches=(1,), tasks=("needle(query=unseen)",))])
    first = [column.title for column in alone.headline[0].columns]
    assert any("needle, question unseen" in title for title in first), "also where it is the only task"
    seen = build([made.usual(tmp_path / "seen", batches=(1,), tasks=("needle",))])
    assert "unseen" not in str(seen)


def test_csv_has_a_row_for_each_cell_and_metric(usual: Path) -> None:
    rows = list(csv.DictReader((usual / "results.csv").open(newline="", encoding="utf-8")))
    places = {(row["cell"], row["metric"]) for row in rows}
    assert len(places) == len(rows)
    for cell in read_run(usual).cells:
        for key, value in cell.values.items():
            row = next(row for row in rows if row["cell"] == cell.id and row["metric"] == key)
            assert (float(row["value"]) if row["value"] else None) == value.value
            assert row["unit"] == (METRICS[key].base or ("" if METRICS[key].scale != 1 else METRICS[key].unit))
    wide = list(csv.DictReader((usual / "results-wide.csv").open(newline="", encoding="utf-8")))
    assert len(wide) == len(read_run(usual).cells)


def test_d2o_is_paired_with_its_rivals_on_the_same_items(usual: Path) -> None:
    rows = list(csv.DictReader((usual / "results.csv").open(newline="", encoding="utf-8")))
    found = [row for row in rows if row["metric"].startswith("kl_rival:")]
    assert {row["metric"] for row in found} == {"kl_rival:streaming", "kl_rival:h2o"}
    by = {(row["shape"], row["policy"], row["budget"]): float(row["value"]) for row in rows if row["metric"] == "kl"}
    for row in found:
        rival = row["metric"].split(":")[1]
        mine, theirs = (by[row["shape"], policy, row["budget"]] for policy in ("d2o", rival))
        assert float(row["value"]) == pytest.approx(mine - theirs)
        assert float(row["lo"]) <= float(row["value"]) <= float(row["hi"])


def test_the_same_bytes_twice(usual: Path) -> None:
    before = views(usual)
    write_report(build([usual]), usual, FORMATS)
    assert views(usual) == before
    assert {"report.html", "report.md", "results.csv", "figures/speedup.svg"} <= set(before)


def test_published_run_is_rendered_to_the_same_bytes(usual: Path, tmp_path: Path) -> None:
    (tmp_path / "reports" / "coverage").mkdir(parents=True)
    (tmp_path / "reports" / "coverage" / "README.md").write_text("# Coverage of | intervals\n\nA study.\n", "utf-8")
    (tmp_path / "reports" / "baselines").mkdir()
    publish(usual, tmp_path / "reports", "first")
    kept = tmp_path / "reports" / "first"
    before = views(kept)
    assert not (kept / "samples").exists()
    assert before["report.html"] == (usual / "report.html").read_bytes()
    write_report(build([kept]), kept, ("json", "csv", "md", "html", "svg"))
    assert views(kept) == before
    index = (tmp_path / "reports" / "README.md").read_text("utf-8")
    assert "[first](first/report.md)" in index
    assert "* [coverage](coverage/README.md): Coverage of \\| intervals" in index
    assert "baselines" not in index


def test_a_published_run_is_replaced_on_purpose_only(tmp_path: Path) -> None:
    folder, kept = one_cell(tmp_path / "run"), tmp_path / "reports" / "first"
    publish(folder, tmp_path / "reports", "first")
    before = views(kept)
    with pytest.raises(RecordError, match="exists"):
        publish(folder, tmp_path / "reports", "first")
    (kept / "report.md").unlink()
    publish(folder, tmp_path / "reports", "first", replace=True)
    assert views(kept) == before


def test_a_published_run_names_no_folder_of_the_machine_it_was_made_on(tmp_path: Path) -> None:
    folder = one_cell(tmp_path / "run")
    record = json.loads((folder / "run.json").read_bytes())
    record["command"] = ["d2obench", "run", "quick", "--data", "coqa=/home/somebody/coqa.jsonl"]
    record["suite"].setdefault("quality", {})["data"] = {"coqa": "/home/somebody/coqa.jsonl"}
    (folder / "run.json").write_text(json.dumps(record), "utf-8")
    publish(folder, tmp_path / "reports", "mine")
    published = {path.name: path.read_bytes() for path in (tmp_path / "reports" / "mine").rglob("*") if path.is_file()}
    assert not [name for name, held in published.items() if b"somebody" in held]
    assert b"coqa=coqa.jsonl" in published["run.json"]


@pytest.mark.parametrize("name", ["../x", "baselines", "a/b", ".hidden"])
def test_a_published_name_stays_in_its_folder(usual: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        publish(usual, tmp_path, name)


def test_published_never_removes_what_is_no_run(usual: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(RecordError):
        publish(usual, tmp_path, "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def hostile(folder: Path) -> Path:
    """Names that try every format at once."""
    draw, cells = random.Random(1), []
    for number, evil in enumerate(EVIL):
        point = made.axes("speed", evil, "0.2", shape="64+8", batch=2, model=evil)
        cells.append(made.speed_cell(folder, point, None, draw)[0])
        task = made.axes(f"needle{evil}", evil, "0.2", model=evil)
        cells.append(made.quality_cell(folder, task, draw))
        more = made.axes("speed", "d2o", evil, shape=evil, batch=evil, device=evil, seed=number)
        cells.append(made.record(more, "failed", reason=evil, flags=(evil,), values={evil: Value(1.5, note=evil)}))
    suite = {"about": EVIL[0], EVIL[1]: {EVIL[2]: list(EVIL)}}
    facts = {"environment": {evil: evil for evil in EVIL}, "command": EVIL, "suite": suite}
    return made.write_run(folder, EVIL[0] + EVIL[2], cells, missing=EVIL, **facts)


def test_hostile_names_are_harmless(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "evil")
    write_report(build([folder]), folder, FORMATS)
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    figures = len(list((folder / "figures").glob("*.svg")))
    assert figures
    assert len(scripts) == 2 + figures + 1
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not [tag for tag, _ in page.tags if tag in ("svg", "iframe", "object", "embed", "base", "form")]
    sources = [str(attrs.get("src") or attrs.get("href") or "") for _, attrs in page.tags]
    assert all(source.startswith(("data:", "#")) for source in sources if source)
    assert "49" not in "".join(page.items)

    for name in ("report.md", "summary.md"):
        marked = (folder / name).read_text("utf-8")
        outside = re.sub(r"(`{3,}).*?\n\1", "", marked, flags=re.S)
        bare = re.sub(r"</?(details|summary|sub)>", "", outside)
        assert not re.search(r"(?<!\\)<", bare)
        assert not re.search(r"(?<!\\)@everyone", bare)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e\u2028]", marked)
        for block in re.findall(r"(?:^\|.*\n)+", marked, re.M):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1

    rows = list(csv.reader((folder / "results.csv").open(newline="", encoding="utf-8")))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert not [field for row in rows for field in row if field.startswith(("=", "@"))]
    tree = ET.parse(folder / "junit.xml")
    assert len(tree.findall(".//testcase")) == 4 * len(EVIL)
    for path in (folder / "figures").glob("*.svg"):
        tags = {element.tag.split("}")[-1] for element in ET.parse(path).iter()}
        assert not tags & {"script", "foreignObject", "image", "a"}


def test_hostile_names_do_not_steer_a_terminal(tmp_path: Path) -> None:
    folder, stream = hostile(tmp_path / "evil"), io.StringIO()
    report = build([folder])
    show_report(report, Console(file=stream, width=200, color_system=None))
    for table in (*report.headline, *report.machine, *report.environment, report.cells):
        show_table(table, Console(file=stream, width=200, color_system=None))
    assert not [char for char in stream.getvalue() if not char.isprintable() and char != "\n"]


def one_cell(folder: Path) -> Path:
    cell, _ = made.speed_cell(folder, made.axes("speed", "full", shape="64+8", batch=1), None, random.Random(0))
    return made.write_run(folder, "one", [cell])


def failures(folder: Path) -> Path:
    points = [made.axes("speed", policy, "0.2", shape="64+8", batch=1) for policy in ("h2o", "d2o")]
    return made.write_run(folder, "bad", [made.record(point, "failed", reason="it broke") for point in points])


def unfinished(folder: Path) -> Path:
    made.usual(folder)
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "cells.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:50])
    shutil.rmtree(folder / "samples")
    return folder


def nothing(folder: Path) -> Path:
    return made.write_run(folder, "none", [], missing=("speed/a", "speed/b"))


@pytest.mark.parametrize("make", [one_cell, failures, unfinished, nothing])
def test_odd_runs_make_a_sensible_page(tmp_path: Path, make: object) -> None:
    folder = make(tmp_path / "run")  # type: ignore[operator]
    write_report(build([folder]), folder, FORMATS)
    report = build([folder])
    assert report.verdict
    assert all(report.verdict)
    page = Page((folder / "report.html").read_text("utf-8"))
    assert page.items
    missing = len(read_run(folder).missing)
    assert sum(field.strip() == "not run" for field in page.fields) == missing
    assert any("not finished" in line for line in report.warnings) == bool(missing)


def test_failures_are_told_in_words(tmp_path: Path) -> None:
    report = build([failures(tmp_path / "run")])
    assert report.verdict == ("2 of 2 cells gave no figures: 2 failed.",)
    assert [row[0].text for row in report.cells.rows] == [case.id for case in report.cases]


def test_failures_say_why_where_they_are_seen_first(tmp_path: Path) -> None:
    point = made.axes("speed", "d2o", "0.2", shape="64+8", batch=1)
    cells = [made.record(point, "failed", reason="WorkerError: " + "x" * 300)]
    report = build([made.write_run(tmp_path, "bad", cells)])
    assert "speed: failed (WorkerError: xxx" in report.tables[0].rows[0][-1].text
    assert len(report.tables[0].rows[0][-1].text) < 200
    assert not any("interval" in line or "bold" in line for line in report.reading)


def test_of_too_many_rows_the_largest_settings_are_shown(tmp_path: Path) -> None:
    cells = []
    for shape, policy in ((shape, policy) for shape in ("64+8", "512+8") for policy in range(200)):
        point = made.axes("speed", f"p{policy}", None, shape=shape, batch=1)
        cells.append(made.record(point, values={"decode_tok_s": Value(100.0 + policy)}))
    report = build([made.write_run(tmp_path, "many", cells)])
    assert {row[0].text for row in report.headline[0].rows} == {"512+8"}
    assert any("376 rows" in note for note in report.headline[0].notes)
    table = report.tables[0]
    shapes = [row[0].text for row in table.rows]
    assert (shapes.count("512+8"), shapes.count("64+8"), table.left_out) == (200, 40, 160)
    assert shapes == sorted(shapes, reverse=True)
    assert table.groups == (0, 40)


def timed_cells(
    spread: float, kind: Bounded = "interval", policies: tuple[str, ...] = ("full", "h2o", "tova")
) -> list[CellRecord]:
    """Rates of 10, 11 and 12 tokens per second and so on, with such bounds."""
    return [
        made.record(
            made.axes("speed", name, shape="64+8", batch=1),
            values={"decode_tok_s": Value(10.0 + i, 10 + i - spread, 10 + i + spread, 9, kind=kind, df=8)},
            details={"processes": 4},
        )
        for i, name in enumerate(policies)
    ]


def test_what_the_intervals_hide_is_not_called_a_win(tmp_path: Path) -> None:
    noisy = build([made.write_run(tmp_path / "noisy", "noisy", timed_cells(2.0))])
    assert noisy.verdict == ("Fastest decode: the policies were not told apart.",)
    clear = build([made.write_run(tmp_path / "clear", "clear", timed_cells(0.05))])
    assert clear.verdict == ("Fastest decode: tova with 12.0 tok/s (95 % interval 11.9 … 12.1).",)


def test_a_range_is_called_one_and_wins_nothing(tmp_path: Path) -> None:
    report = build([made.write_run(tmp_path, "few", timed_cells(0.05, "range"))])
    assert report.verdict == ("Fastest decode: the policies were not told apart.",)
    fields = [field for table in (*report.headline, *report.tables) for row in table.rows for field in row]
    assert any(field.interval.endswith("(range of 9)") for field in fields)
    assert not [field for field in fields if field.mark == "best" or field.half]
    assert any("too few samples" in line for line in report.reading)


def against_full(tmp_path: Path, **more: Any) -> Report:
    """A run of full and of d2o, which is 1.5 times as fast where its bytes allow 2.0; or as ``more`` says."""
    point = {"shape": "64+8", "batch": 1}
    value = Value(1.5, 1.45, 1.55, 12, kind="interval", method="t", df=11)
    values = {"speedup": value, "speedup_bound": Value(2.0), "kv_bytes": Value(2**20)} | more.pop("values", {})
    cells = [
        made.record(made.axes("speed", "full", **point), values={"kv_bytes": Value(5 * 2**20)}),
        made.record(made.axes("speed", "d2o", "0.2", **point), values=values, details={"processes": 2} | more),
    ]
    return build([made.write_run(tmp_path, "pair", cells)])


def test_a_speed_up_that_its_interval_shows_is_said_with_it(tmp_path: Path) -> None:
    report = against_full(tmp_path)
    assert report.verdict == (
        "With a prompt of 64 tokens, 8 generated ones and batch 1, d2o with budget 0.2 holds 1.00 MiB of keys and "
        "values instead of 5.00 MiB and decodes 1.500 times as fast (95 % interval 1.450 … 1.550).",
    )
    (said,) = [claim for claim in report.claims if claim.metric == "speedup" and claim.word == "better"]
    assert said.lo is not None and said.lo > 1 and said.processes == 2


@pytest.mark.parametrize("bounds", [{}, {"lo": 1.45, "hi": 1.55, "n": 2, "kind": "range"}])
def test_a_ratio_without_an_interval_is_in_no_sentence(tmp_path: Path, bounds: dict[str, Any]) -> None:
    """That of one round, and the range of two."""
    report = against_full(tmp_path, values={"speedup": Value(1.5, **bounds)})
    assert "holds 1.00 MiB" in report.verdict[0]
    assert not any("1.5" in line or "times as fast" in line for line in report.verdict)
    assert not [claim for claim in report.claims if claim.metric == "speedup"]


def test_every_row_of_speed_names_what_decoded_it(usual: Path) -> None:
    """And every ratio in a table has its bounds beside it."""
    report = build([usual])
    keys = [column.key for column in report.cells.columns]
    paths = {row[keys.index("cell")].text: row[keys.index("path")].text for row in report.cells.rows}
    timed = [cell for cell in read_run(usual).cells if cell.axes.task == "speed"]
    assert len(timed) == 14
    assert {paths[cell.id] for cell in timed} == {"compiled CPU loops"}
    assert all(row.decode_path for row in report.results if row.task == "speed")
    ratios = [
        row[place]
        for table in (*report.headline, *report.tables)
        for place, column in enumerate(table.columns)
        if column.key.rpartition(":")[2] in RATIOS
        for row in table.rows
    ]
    assert len([field for field in ratios if field.lo and field.hi]) > 24
    assert {field.text for field in ratios if field.sort is not None and not field.lo} == {"1.000"}, "in every round"


def test_a_speed_up_beyond_what_bytes_allow_is_impossible(tmp_path: Path) -> None:
    report = against_full(tmp_path, values={"speedup_bound": Value(1.07)})
    assert "more than the bytes of a step allow, which is impossible" in report.verdict[1]
    assert not any("times as fast" in line for line in report.verdict)
    assert [field.text for field in report.headline[0].rows[1] if field.mark == "bad"] == ["impossible"]
    assert not report.claims or all(claim.metric == "kv_bytes" for claim in report.claims)


def test_on_a_busy_machine_nothing_is_said_of_speed(tmp_path: Path) -> None:
    report = against_full(tmp_path, busy=True)
    assert report.warnings[0].startswith("The machine was busy: other work disturbed most of the timings of 1 of 2")
    assert "run again" in report.warnings[0]
    assert "There is no verdict on speed, because the machine was busy." in report.verdict
    assert not any("times as fast" in line for line in report.verdict)
    assert "holds 1.00 MiB" in report.verdict[0]
    assert "no verdict" in {field.text for field in report.headline[0].rows[1]}


def test_flags_say_what_they_mean_and_counts_do_not_part_them(tmp_path: Path) -> None:
    flags = [(f"{count} of 24 windows left out: {kind}",) for count, kind in ((3, "other load"), (5, "stolen CPU"))]
    cells = [
        made.record(made.axes("speed", policy, shape="64+8", batch=1), values={"kv_bytes": Value(1.0)}, flags=found)
        for policy, found in zip(("full", "h2o"), flags, strict=True)
    ]
    notes = build([made.write_run(tmp_path, "flags", cells)]).notes
    assert notes[0] == (
        "2 cells carry the flag “some windows left out”: they were disturbed by other work and are in no "
        "figure of time."
    )


def test_what_would_narrow_the_intervals_is_said(tmp_path: Path) -> None:
    wide = Value(1.0, 0.5, 2.0, 12, kind="interval", method="t", df=11)
    report = against_full(tmp_path, values={"speedup": wide})
    assert report.verdict[1] == (
        "This run can't tell d2o with budget 0.2 apart from full in decode speed. More rounds (--rounds) narrow the "
        "intervals of speed."
    )
    assert "1.000" not in " ".join(report.verdict)


def test_how_caches_took_turns_is_said(tmp_path: Path) -> None:
    report = against_full(tmp_path, turns="windows")
    assert any("in windows of decode steps" in line and "in 2 fresh processes" in line for line in report.reading)


def test_one_process_is_said(tmp_path: Path) -> None:
    assert "measured in one process)" in against_full(tmp_path, processes=1).verdict[0]


def test_scores_are_made_again_from_the_predictions(tmp_path: Path) -> None:
    point = made.axes("recall", "full", shape="64+8")
    cell = made.record(point, values={"score": Value(0.0)}, samples="samples/a.json")
    folder = made.write_run(tmp_path / "run", "old", [cell])
    items = [{"id": "0", "document": "0", "text": " Rex.", "gold": "Rex", "score": 0.0}]
    write_atomic(folder / "samples" / "a.json", dump({"items": items}))
    assert rescore(folder) == [cell.id]
    assert read_run(folder).cells[0].values["score"].value == 1.0
    assert rescore(folder) == []
    write_atomic(folder / "samples" / "a.json", dump({"items": [{"id": "0"}]}))
    with pytest.raises(RecordError, match="can't be scored"):
        rescore(folder)


def test_two_thousand_cells(tmp_path: Path) -> None:
    """Within the limits of a page, of a file that GitHub shows, and of a step summary."""
    cells: list[CellRecord] = []
    template, _ = made.speed_cell(
        tmp_path / "t", made.axes("speed", "full", shape="64+8", batch=1), None, random.Random(0)
    )
    for number in range(2000):
        point = made.axes("speed", f"policy{number % 8}", "0.2", shape="64+8", batch=1 + number % 5, seed=number // 40)
        cells.append(made.record(point, values=template.values))
    folder = tmp_path / "many"
    folder.mkdir()
    made.write_run(folder, "many", [])
    info = made.info("many", [cell.id for cell in cells])
    (folder / "run.json").write_bytes(dump(info))
    (folder / "cells.jsonl").write_bytes(b"".join(dump(cell) + b"\n" for cell in cells))
    write_report(build([folder]), folder, ("md", "csv", "html", "github"))
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert (folder / "report.md").stat().st_size < 500_000
    assert (folder / "summary.md").stat().st_size < 900_000
    rows = list(csv.DictReader((folder / "results.csv").open(newline="", encoding="utf-8")))
    assert len({row["cell"] for row in rows}) == 2000


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    first = made.usual(tmp_path / "a", tasks=("fidelity",), shapes=("512+24",))
    facts = {"environment": {"cpu": "Other CPU", "torch": "2.13.0"}, "environment_hash": "f" * 16}
    second = made.usual(tmp_path / "b", tasks=("fidelity",), shapes=("512+24",), **facts)
    report = build([first, second])
    assert {row[0].text for row in report.headline[0].rows} == {"a", "b ≠"}
    assert any("unlike environments" in line and "cpu" in line for line in report.warnings)
    for table in (*report.tables, report.machine[1], report.cells):
        marks = {row[0].text for row in table.rows}
        assert marks == {"a", "b ≠"}, table.title
    assert {row.run for row in report.results} == {"a", "b ≠"}
    assert any("≠" in line for line in report.reading)
    alike = build([first, made.usual(tmp_path / "c", tasks=("fidelity",), shapes=("512+24",))])
    assert {row.run for row in alike.results} == {"a", "c"}
    assert not any("≠" in line for line in alike.reading)
    facts_row = next(row for row in report.environment[0].rows if row[0].text == "cpu")
    assert [entry.text for entry in facts_row[1:]] == ["Example CPU", "Other CPU"]
    assert facts_row[1].mark == "warn"


def test_every_eviction_of_a_layer_is_merged_or_lost(usual: Path) -> None:
    merges = next(figure for figure in build([usual]).figures if figure.kind == "merges")
    run = read_run(usual)
    shown = {row["label"] for row in merges.records()}
    assert shown == {f"{policy}@{budget}" for policy, budget in made.POLICIES if budget}
    chosen = [cell for cell in run.cells if "evicted_layers" in cell.details and cell.axes.batch == 4]  # the largest
    assert len(chosen) == len(shown)
    for cell in chosen:
        for layer, evicted in enumerate(cell.details["evicted_layers"]):
            label = f"{cell.axes.policy}@{cell.axes.budget}"
            rows = [row for row in merges.records() if (row["label"], row["layer"]) == (label, layer)]
            assert {row["fate"]: row["entries"] for row in rows}["merged"] == cell.details["merged_layers"][layer]
            assert sum(row["entries"] for row in rows) == evicted
            assert sum(row["percent"] for row in rows) == pytest.approx(100, abs=0.02)


def test_a_diagnosis_shows_every_layer_beside_the_two_rules_of_budgets(tmp_path: Path) -> None:
    layers = {"evicted": [0.2, 0.1], "own": [0.1, 0.0], "due": [0.4, 0.0], "drawn": [0.1, 0.0], "error": [0.5, 0.25],
              "cost": [9.0, 1.0], "density": [3.0, 7.0]}  # fmt: skip
    point = made.axes("diagnosis", "d2o", "0.2", shape="512+24")
    run = made.write_run(tmp_path / "run", "diagnosis", [made.record(point, details={"diagnosis": layers})])
    figure = next(figure for figure in build([run]).figures if figure.kind == "diagnosis")
    shown: dict[tuple[str, str], list[float]] = {}
    for row in figure.records():
        shown.setdefault((row["policy"], row["panel"]), []).append(row["value"])
    assert shown["d2o", "attention evicted, %"] == [20, 10]
    assert shown["d2o", "drawn ÷ due by merge targets"] == [0.25]  # nothing was merged in the other layer
    assert shown["d2o", "output error, %"] == [50, 25]
    assert shown["d2o", "share of budget ÷ mean"] == [1.5, 0.5]  # as the square root of the cost
    even = 2 / (1 + math.exp(-1))
    assert shown["exp(−variance)", "share of budget ÷ mean"] == pytest.approx([even, even * math.exp(-1)], abs=1e-4)


def test_the_first_table_of_many_budgets_shows_all_policies_at_the_smallest(tmp_path: Path) -> None:
    """And so does the sentence above it."""
    policies = [f"d2o(beta=0.{i})" for i in range(9)] + ["d2o"]
    draw = random.Random(1)
    cells = [
        made.quality_cell(tmp_path / "run", made.axes("fidelity", policy, budget, shape="512+24"), draw)
        for policy in policies for budget in ("0.1", "0.2", "0.4")
    ]  # fmt: skip
    report = build([made.write_run(tmp_path / "run", "many", cells)])
    table = report.headline[0]
    at = {column.key: place for place, column in enumerate(table.columns)}
    assert [row[at["policy"]].text for row in table.rows] == policies
    assert {row[at["budget"]].text for row in table.rows} == {"0.1"} and "budget 0.1" in report.verdict[0]
    assert table.notes[0].startswith("20 rows of other budgets")


def test_policies_of_one_figure_have_colours_of_their_own() -> None:
    names = ["full", "d2o", *(f"d2o(beta=0.{i})" for i in range(len(charts.SPARE)))]
    found = charts.palette(names)
    assert len(set(found)) == len(names)
    assert found[:2] == [charts.POLICIES["full"], charts.POLICIES["d2o"]] and charts.palette(names[2:]) == found[2:]


def test_quality_of_full_is_not_marked_best(usual: Path) -> None:
    table = build([usual]).tables[0]
    policy = next(place for place, column in enumerate(table.columns) if column.key == "policy")
    full = [row for row in table.rows if row[policy].text.startswith("full")]
    quality = [place for place, column in enumerate(table.columns) if column.key.split(":")[-1] in ("kl", "score_diff")]
    assert full
    assert quality
    assert not [row for row in full for place in quality if row[place].mark == "best"]


def test_a_torn_sample_file_costs_only_its_comparison(usual: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(usual, folder)
    for path in (folder / "samples").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    report: Report = build([folder])
    assert report.headline[0].rows
    assert not [row for row in report.results if row.metric.endswith("_diff")]


def test_last_record_of_a_cell_stands(tmp_path: Path) -> None:
    folder = one_cell(tmp_path / "run")
    cell = read_run(folder).cells[0]
    append_cell(folder, made.record(cell.axes, "failed", reason="second try"))
    assert build([folder]).verdict == ("1 of 1 cells gave no figures: 1 failed.",)


def test_imports_no_torch(usual: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from d2obench.report import build, charts, publish, write_report; "
        f"run = Path({str(usual)!r}); write_report(build([run]), run, ('csv', 'json', 'junit', 'github')); "
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_renders_and_tells_where(usual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["report", str(usual), "--format", "csv,junit", "--out", str(tmp_path)])
    assert done.value.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results-wide.csv", "junit.xml"}
    assert "junit.xml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "is not a run folder"),
        (["RUN", "--format", "docx"], "unknown format 'docx'"),
        (["RUN", "RUN"], "--out"),
        (["publish", "nowhere"], "is not a run folder"),
        (["publish", "RUN", "--name", "../up"], "can't name a report"),
    ],
)
def test_wrong_words_are_one_line(usual: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["report", *(str(usual) if word == "RUN" else word for word in words)])
    assert done.value.code == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


PUBLISHED = sorted(path.parent for path in (Path(__file__).parents[1] / "reports").glob("*/run.json"))


PICTURED = [folder for folder in PUBLISHED if (folder / "terminal.svg").exists()]


def test_there_are_published_runs() -> None:
    assert len(PUBLISHED) > 9
    assert PICTURED


@pytest.mark.parametrize("folder", PICTURED, ids=lambda folder: folder.name)
def test_a_picture_of_the_terminal_shows_what_the_terminal_prints(folder: Path) -> None:
    """Its words, not its bytes: those may change with a version of rich."""
    text = (folder / "terminal.svg").read_text("utf-8")
    (matrix,) = [part for part in ET.fromstring(text).iter() if part.get("class") == "terminal-matrix"]
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    show_report(build([folder]), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "".join("".join(matrix.itertext()).split()) == "".join(printed.split())
    assert "url(http" not in text


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_runs_render_and_say_nothing_their_intervals_do_not(folder: Path) -> None:
    report = build([folder])
    run = read_run(folder)
    assert {row.cell for row in report.results} == {cell.id for cell in run.cells}
    kept = json.loads((folder / "report.json").read_text("utf-8"))
    before = {(row["cell"], row["metric"]): row["value"] for row in kept["tidy"]}
    assert {(row.cell, row.metric): row.value for row in report.results} == before
    for name in FORMATS:
        assert all(text for _, text in render(name, report, {}))
    for claim in report.claims:
        assert claim.word == "best" or claim.lo is not None, claim
    bounds = {(cell.id, key): value for cell in run.cells for key, value in cell.values.items()}
    for claim in report.claims:
        value = bounds.get((claim.cell, claim.metric))
        if METRICS[claim.metric.partition(":")[0]].kind == "bounded":  # peaks are told by the range of all of them
            continue
        assert value is None or value.kind in ("interval", "exact") or value.lo is None, claim
