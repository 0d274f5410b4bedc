"""The machine card: what a run says of the place it was measured in, and of what measuring cost there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import report_runs as made

from d2obench.record import Value
from d2obench.report.build import build
from d2obench.report.render import markdown
from d2obench.report.render.html import html
from d2obench.report.view import Report

SAMPLERS = "samplers of memory and power"


def report_of(*overheads: list[float | None], folder: Path) -> Report:
    """A report of one run for each list; its cells took these shares of a core to follow."""
    runs = []
    for number, shares in enumerate(overheads):
        cells = []
        for batch, share in enumerate(shares, 1):
            cell = made.record(made.axes("speed", "full", shape="64+8", batch=batch))
            values = {} if share is None else {"sampler_overhead": Value(share)}
            cells.append(msgspec.structs.replace(cell, values={"ttft_s": Value(1.0), **values}))
        runs.append(made.write_run(folder / str(number), f"run{number}", cells))
    return build(runs)


def facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Row → what each run says there, with its mark."""
    card = next(table for table in report.machine if table.title == "Machine")
    return {row[0].text: [(entry.text, entry.mark) for entry in row[1:]] for row in card.rows}


def test_the_cost_of_sampling_stands_on_the_page(tmp_path: Path) -> None:
    report = report_of([0.002, None, 0.004, 0.011], folder=tmp_path)
    assert facts(report)[SAMPLERS] == [("0.40 % of one core, at most 1.10", "")]
    for page in (markdown.markdown(report, []), html(report, {})):
        assert SAMPLERS in page
        assert "0.40 % of one core, at most 1.10" in page


def test_one_figure_has_no_highest_and_none_has_no_row(tmp_path: Path) -> None:
    assert facts(report_of([0.002], folder=tmp_path / "a"))[SAMPLERS] == [("0.20 % of one core", "")]
    assert SAMPLERS not in facts(report_of([None], folder=tmp_path / "b"))


def test_runs_are_not_unlike_for_it(tmp_path: Path) -> None:
    found = facts(report_of([0.002], [None], [0.003], folder=tmp_path))[SAMPLERS]
    assert found == [("0.20 % of one core", ""), ("–", ""), ("0.30 % of one core", "")]
